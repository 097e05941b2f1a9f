"""A name → a model: tells the formats apart and says where a model came from."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

from torch import Tensor, nn

from opsin.checkpoints import files, haiku, hf, native, npz, timm
from opsin.errors import CheckpointError, UnknownModel
from opsin.labels import Labels
from opsin.models.perceiver_io import PerceiverConfig
from opsin.preprocess import PreprocessConfig

EMBEDDED = {  # name → folder inside the package
    "opsin/vit-tiny": "assets/vit-tiny",
    "opsin/perceiver-tiny": "assets/perceiver-tiny",
}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Source:
    """Where a model came from.

    Args:
        name: as it was asked for.
        revision: commit on the hub.
        path: the folder or file that was read.
        format: opsin, transformers, timm, npz or haiku.
        files: the weights.
        sha256: of them, where it is known already.
    """

    def __init__(
        self, name: str, revision: str | None, path: str, format: str, files: tuple[Path, ...] = (), sha256: str = ""
    ) -> None:
        self.name, self.revision, self.path, self.format, self.files = name, revision, path, format, files
        self._sha256 = sha256

    @property
    def sha256(self) -> str:
        """Of the weight file, in hex; of the listing that `sha256sum` prints where there are several shards.

        Computed when first asked for: 1.2 GB take about a second, which nobody who only wants labels should wait for.
        """
        if not self._sha256:
            digests = [(_sha256(path), path.name) for path in self.files]
            listing = "".join(f"{digest}  {name}\n" for digest, name in digests)
            self._sha256 = digests[0][0] if len(digests) == 1 else hashlib.sha256(listing.encode()).hexdigest()
        return self._sha256


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    model: nn.Module  # fp32, on the CPU, in eval mode
    preprocess: PreprocessConfig | None  # None: it takes no images, or no single ones
    labels: Labels | None  # None: no head
    source: Source
    ranges: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]] | None = None  # for int8, of an optimised folder


def read(
    name: str | os.PathLike[str], *, revision: str | None = None, config: PerceiverConfig | None = None
) -> Checkpoint:
    """Read a model by name. In this order: an embedded model, a folder or file here, a model of the hub.

    Args:
        name: an embedded model (`EMBEDDED`) | path of a folder or of a .safetensors, .npz, .pth, .pt, .bin, .pystate
            or .pickle file | hub id such as `google/vit-large-patch16-224`.
        revision: branch, tag or commit on the hub.
        config: the shape of the model in a .pystate or .pickle file, where it is not one that DeepMind published.
    Raises:
        UnknownModel: none of these.
        HubError: the hub could not be reached, or refused.
        CheckpointError: the files do not fit the model they claim to be.
    """
    try:
        return _find(os.fspath(name), revision, config)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}.") from error


def _find(name: str, revision: str | None, config: PerceiverConfig | None) -> Checkpoint:
    path = Path(os.path.expanduser(name))  # noqa: PTH111, Path.expanduser raises for an unknown user
    if config is not None and path.suffix.lower() not in files.HAIKU_SUFFIXES:
        raise CheckpointError(f"{name} says itself what its model is; a config is for .pystate and .pickle files.")
    if name in EMBEDDED:
        folder = Path(str(package_files("opsin"))) / EMBEDDED[name]
        if not folder.is_dir():
            raise UnknownModel(f"{name} is not in this installation of opsin ({folder} is missing). Reinstall it.")
        return _read(folder, name, None)
    if name and path.exists():
        return _read(path, name, None, config)
    if not HUB_ID.fullmatch(name) or path.suffix in files.SUFFIXES or name.startswith("opsin/"):
        raise UnknownModel(_unknown(name))
    from opsin.checkpoints import hub  # brings huggingface_hub

    folder = hub.download(name, revision=revision)
    return _read(folder, name, folder.name if folder.parent.name == "snapshots" else revision)


def _unknown(name: str) -> str:
    from opsin.checkpoints.catalog import nearest

    names = " or ".join(f'"{known}"' for known in nearest(name))
    hint = f" Did you mean {names}?" if names else ""
    return (
        f'no model "{name}": no such file or folder here, and not the id of a model on the hub (owner/name).{hint} '
        "`opsin models` lists all."
    )


def _read(path: Path, name: str, revision: str | None, shape: PerceiverConfig | None = None) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    described = (folder / "config.json").is_file() and (path.is_dir() or path.name in files.FOLDER_FILES)
    if described:  # a lone model.safetensors is of use only with the config beside it
        config = files.read_json(folder / "config.json")
        reader = next((form for form in (native, timm, hf) if form.claims(config)), None)
        if reader is None:
            raise CheckpointError(
                f'{folder / "config.json"} has none of "format" (opsin), "architecture" (timm) and "model_type" '
                f"(transformers: {', '.join(hf.MODEL_TYPES)}), so its model is unknown."
            )
        path = path if path.suffix in files.SUFFIXES else folder
        try:
            model, preprocess, labels = reader.read(folder, config, path)
        except (
            AttributeError,
            ArithmeticError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # a list where a name should be, …
            raise CheckpointError(f"{folder / 'config.json'} is not as {reader.FORMAT} writes it: {error}") from error
        format = reader.FORMAT
    elif path.is_dir():
        raise CheckpointError(f"{path} has no config.json: opsin cannot know the model. Give the weight file itself.")
    elif path.suffix.lower() == ".npz":
        model, preprocess, labels = npz.read(path)
        format = npz.FORMAT
    elif path.suffix.lower() in files.HAIKU_SUFFIXES:
        model, preprocess, labels = haiku.read(path, shape)
        format = haiku.FORMAT
    else:
        model, preprocess, labels = timm.read_file(path)
        format = timm.FORMAT
    source = Source(name, revision, str(path), format, tuple(files.weight_files(path)))
    ranges = native.read_ranges(folder, model) if format == native.FORMAT else None
    return Checkpoint(model, preprocess, labels, source, ranges)
