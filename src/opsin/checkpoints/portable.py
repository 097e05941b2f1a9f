"""A model in the form that most programs read."""

from pathlib import Path

from torch import nn

from opsin.checkpoints import hf, native
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.preprocess import PreprocessConfig


def write(folder: Path, model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> str:
    """Write a folder that transformers loads too, where it has such a model; else one in opsin's own form.

    Returns:
        Which, as `Source.format` has it.
    """
    try:
        hf.write(folder, model, preprocess, labels)
    except CheckpointError:
        native.write(folder, model, preprocess, labels)
        (folder / "preprocessor_config.json").unlink(missing_ok=True)  # of an older model in the same folder
        return native.FORMAT
    return hf.FORMAT
