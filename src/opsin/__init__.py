"""opsin: image understanding with attention models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.labels import Labels
    from opsin.models.vit import ViT, ViTConfig
    from opsin.pipeline import Classifier, load
    from opsin.preprocess import PreprocessConfig, decode

__version__ = "0.1.0"

_HOME = {
    "Classifier": "opsin.pipeline",
    "Labels": "opsin.labels",
    "PreprocessConfig": "opsin.preprocess",
    "ViT": "opsin.models.vit",
    "ViTConfig": "opsin.models.vit",
    "decode": "opsin.preprocess",
    "load": "opsin.pipeline",
}

__all__ = ["Classifier", "Labels", "PreprocessConfig", "ViT", "ViTConfig", "decode", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import opsin` does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
