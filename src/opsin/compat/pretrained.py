"""What all of transformers' model classes share: outputs, `config`, `from_pretrained`, the loss."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin import checkpoints
from opsin.checkpoints import Checkpoint
from opsin.errors import CheckpointError
from opsin.labels import Labels

P = TypeVar("P", bound="Pretrained")


class ModelOutput(dict[str, Any]):
    """Outputs by attribute, key, index or slice; what was not computed is None by attribute and absent otherwise."""

    names: tuple[str, ...] = ()

    def __init__(self, **values: Any) -> None:
        super().__init__({name: values[name] for name in self.names if values.get(name) is not None})

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self.names:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}. It has {', '.join(self.names)}.")

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class Config:
    """`model.config` under transformers' names. A view: changing the shape here does not change the model."""

    def __init__(self, labels: Labels | None, **values: Any) -> None:
        self.__dict__.update(values)
        self.id2label = dict(enumerate(labels.names)) if labels else {}
        self.label2id = {name: index for index, name in self.id2label.items()}
        self.problem_type: str | None = None
        self.output_attentions = False
        self.output_hidden_states = False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"config has no {name!r}. It has {', '.join(vars(self))}.")

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __repr__(self) -> str:
        return f"Config {json.dumps(vars(self), indent=2)}"


HARMLESS = ("attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors")


class Pretrained(nn.Module):
    """`model` is opsin's own; this wraps its inputs and outputs."""

    kind: type[nn.Module]
    config: Config

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        if not isinstance(checkpoint.model, self.kind):
            found, wanted = type(checkpoint.model).__name__, self.kind.__name__
            raise CheckpointError(f"{checkpoint.source.name} is a {found}, not a {wanted}. opsin.load takes it.")
        self.model: Any = checkpoint.model
        self._preprocess, self._labels = checkpoint.preprocess, checkpoint.labels

    @classmethod
    def from_pretrained(
        cls: type[P], name: str | os.PathLike[str], *, revision: str | None = None, **harmless: Any
    ) -> P:
        """Read a model: hub id, local folder, or whatever `opsin.load` takes. It comes in eval mode, fp32, on the CPU.

        Of transformers' other arguments those in `HARMLESS` are taken, and mean nothing here.

        Raises:
            UnknownModel, HubError, CheckpointError: as `opsin.load`.
            NoHead: a classifier was asked of a checkpoint without one. (transformers gives a random one.)
        """
        for argument in harmless:
            if argument not in HARMLESS:
                raise TypeError(f"unexpected argument {argument!r}. Known: revision, {', '.join(HARMLESS)}.")
        return cls(checkpoints.read(name, revision=revision)).eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model, labels and preprocessing so that transformers loads them.

        Raises:
            CheckpointError: transformers has no such model; the message says what stands in the way.
        """
        checkpoints.write_hf(Path(folder), self.model, self._preprocess, self._labels)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By `config.problem_type`; where that is None, by the number of classes and the type of the labels."""
        kind = self.config.problem_type
        if kind is None and self.config.num_labels == 1:
            kind = "regression"
        elif kind is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        raise ValueError(
            f'config.problem_type is "{kind}". Known: "regression", "single_label_classification", '
            '"multi_label_classification", None.'
        )
