"""Checkpoint files ↔ models.

    native.py  opsin's own form: model.safetensors + config.json
    hf.py      transformers: ViT, DeiT, DINOv2, with and without registers; Perceiver through hf_perceiver.py
    timm.py    timm, and the original DeiT, DINO, DINOv2 and MAE files, which share its names
    npz.py     the JAX releases: vision_transformer, big_vision
    haiku.py   DeepMind's Perceiver IO

    name ── read ──> Checkpoint ──┬── write ──> folder in opsin's own form
                                  ├── write_as ──> any of these: portable.py
                                  └── write_portable ──> transformers' form, or else opsin's

Only this package knows foreign names. `files.py` and `pickles.py` get tensors out of files without executing
anything in them, `rules.py` turns a table of names into a reader and a writer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.checkpoints.native import write
    from opsin.checkpoints.portable import write as write_portable
    from opsin.checkpoints.portable import write_as, write_hf
    from opsin.checkpoints.reader import Checkpoint, Source, read

__all__ = ["Checkpoint", "Source", "read", "write", "write_as", "write_hf", "write_portable"]

_HOME = {
    "Checkpoint": ("reader", "Checkpoint"),
    "Source": ("reader", "Source"),
    "read": ("reader", "read"),
    "write": ("native", "write"),
    "write_as": ("portable", "write_as"),
    "write_hf": ("portable", "write_hf"),
    "write_portable": ("portable", "write"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: the catalogue and the hub answer without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'opsin.checkpoints' has no attribute {name!r}. There are {', '.join(__all__)}.")
    module, attribute = _HOME[name]
    return getattr(import_module(f"opsin.checkpoints.{module}"), attribute)
