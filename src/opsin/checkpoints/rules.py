"""Tables of names between a foreign checkpoint format and ours, read in both directions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opsin.checkpoints import files
from opsin.errors import CheckpointError
from opsin.models.perceiver_io import (
    FlowPerceiver,
    FlowPerceiverConfig,
    ImagePerceiver,
    ImagePerceiverConfig,
    MultimodalPerceiver,
    MultimodalPerceiverConfig,
    TextPerceiver,
    TextPerceiverConfig,
)
from opsin.models.position import FourierPositions
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig

State = dict[str, Tensor]
Names = str | tuple[str, ...]

MODELS: dict[type, type[nn.Module]] = {  # config → the model it shapes
    ViTConfig: ViT,
    VTConfig: VT,
    ImagePerceiverConfig: ImagePerceiver,
    TextPerceiverConfig: TextPerceiver,
    FlowPerceiverConfig: FlowPerceiver,
    MultimodalPerceiverConfig: MultimodalPerceiver,
}


@dataclass(frozen=True, slots=True)
class Transform:
    """Two layouts of one tensor. Each function undoes the other; the config gives what the tensor does not show."""

    to_native: Callable[[Tensor, Any], Tensor]
    to_foreign: Callable[[Tensor, Any], Tensor]


SAME = Transform(lambda t, _: t, lambda t, _: t)
TRANSPOSE = Transform(lambda t, _: t.mT, lambda t, _: t.mT)


@dataclass(frozen=True, slots=True)
class Rule:
    """One logical tensor under its native and its foreign name; `{i}` stands for every layer.

    Several native names share one foreign tensor in equal parts along axis 0 (a fused qkv); several foreign names make
    up one native tensor in the same way. No native name, `()`: known, and not needed (a mask token).
    When several rules give the same native tensor, a reader takes the first that the file has and a writer the first.
    """

    native: Names
    foreign: Names
    transform: Transform = SAME


def _each(names: Names, before: str = "", after: str = "") -> Names:
    return before + names + after if isinstance(names, str) else tuple(before + name + after for name in names)


def weight_and_bias(native: Names, foreign: Names) -> list[Rule]:
    """The two rules of a dense or norm layer that both sides keep in PyTorch's layout."""
    return [Rule(_each(native, after=end), _each(foreign, after=end)) for end in (".weight", ".bias")]


def within(native: str, foreign: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rules of a module as rules of the model: its names put after those of the module."""
    return [Rule(_each(rule.native, native), _each(rule.foreign, foreign), rule.transform) for rule in rules]


@dataclass(frozen=True, slots=True)
class Report:
    """What did not fit, in foreign names, in the order of the model (missing) or of the file (unexpected)."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()  # a sentence each: name, shape found, shape needed

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("wrong shape", self.reshaped))
        return "; ".join(f"{kind} ({len(names)}): {_shorten(names)}" for kind, names in kinds if names)


def _shorten(names: Sequence[str], limit: int = 10) -> str:
    if len(names) <= limit:
        return ", ".join(names)
    return ", ".join([*names[: limit - 2], f"… {len(names) - limit + 1} more …", names[-1]])


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the model; nothing is allocated."""
    return {name: tuple(tensor.shape) for name, tensor in _empty(config).state_dict().items()}


class _SkipInitialisation(TorchFunctionMode):
    """Random numbers for tensors without data do nothing, and cost 3 s: torch imports its compiler to find that out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def _empty(config: Any) -> nn.Module:
    with torch.device("meta"), _SkipInitialisation():
        return MODELS[type(config)](config)


def _expand(rules: Sequence[Rule], num_layers: int) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Transform]]:
    for rule in rules:
        native = (rule.native,) if isinstance(rule.native, str) else rule.native
        foreign = (rule.foreign,) if isinstance(rule.foreign, str) else rule.foreign
        for i in range(num_layers if "{i}" in foreign[0] else 1):
            yield (
                tuple(name.replace("{i}", str(i)) for name in native),
                tuple(name.replace("{i}", str(i)) for name in foreign),
                rule.transform,
            )


def convert(foreign: Mapping[str, Tensor], rules: Sequence[Rule], config: Any) -> tuple[State, Report]:
    """Foreign names and layouts → native ones.

    Nothing is filled in and nothing left out in silence: all that did not fit is in the report.
    """
    expected = shapes(config)
    native: State = {}
    lacking: dict[str, str] = {}  # native name → the foreign name that would have given it
    reshaped: dict[str, str] = {}
    used: set[str] = set()
    for targets, sources, transform in _expand(rules, config.num_layers):
        if not targets:
            used.update(sources)
            continue
        if targets[0] not in expected or targets[0] in native or targets[0] in reshaped:
            continue
        absent = [name for name in sources if name not in foreign]
        if absent:
            for target in targets:
                lacking.setdefault(target, absent[0])
            continue
        used.update(sources)
        found = ", ".join(f"{name} {tuple(foreign[name].shape)}" for name in sources)
        try:
            tensor = _join([transform.to_native(foreign[name], config) for name in sources])
            parts = dict(zip(targets, _part(tensor, len(targets)), strict=True))
        except (RuntimeError, ValueError, IndexError):  # too few axes, or sizes that do not divide
            reshaped |= dict.fromkeys(targets, f"{found} cannot be laid out as {expected[targets[0]]}")
            continue
        for target, part in parts.items():
            if tuple(part.shape) != expected[target]:
                reshaped[target] = f"{found} gives {tuple(part.shape)}, the model has {expected[target]}"
            else:
                native[target] = part
    missing = dict.fromkeys(lacking.get(n, n) for n in expected if n not in native and n not in reshaped)
    unexpected = (name for name in foreign if name not in used)
    return native, Report(tuple(missing), tuple(unexpected), tuple(dict.fromkeys(reshaped.values())))


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # a single one stays where it is: mapped from disk


def _part(tensor: Tensor, count: int) -> Sequence[Tensor]:
    return [tensor] if count == 1 else tensor.chunk(count)  # a counter has no axis to chunk


def invert(native: Mapping[str, Tensor], rules: Sequence[Rule], config: Any) -> State:
    """Native names and layouts → foreign ones: `convert` backwards.

    Raises:
        CheckpointError: the format has no name for a tensor of the model.
    """
    foreign: State = {}
    written: set[str] = set()
    for sources, targets, transform in _expand(rules, config.num_layers):
        if not sources or sources[0] not in native or sources[0] in written:
            continue
        written.update(sources)
        joined = _join([native[name] for name in sources])
        for target, part in zip(targets, _part(joined, len(targets)), strict=True):
            foreign[target] = transform.to_foreign(part, config).contiguous()
    nameless = [name for name in native if name not in written]
    if nameless:
        raise CheckpointError(f"the format has no place for {_shorten(nameless)}.")
    return foreign


def write_folder(folder: Path, contents: Mapping[str, Any]) -> list[Path]:
    """Write .safetensors and .json files, the tensors first; each appears whole or not at all."""
    for name, content in contents.items():
        write = files.write_tensors if name.endswith(".safetensors") else files.write_json
        write(folder / name, content)
    return [folder / name for name in contents]


def load(foreign: Mapping[str, Tensor], rules: Sequence[Rule], config: Any, where: str) -> Any:
    """The model of `config`, of the class in `MODELS`, with the tensors of a foreign state, fp32.

    Memory is only what the tensors take.

    Raises:
        CheckpointError: naming each tensor that is missing, unexpected or misshapen.
    """
    if config.num_layers > len(foreign):  # also keeps a wild number in a config from building a model of that size
        raise CheckpointError(f"{where}: {config.num_layers} layers by the config, {len(foreign)} tensors in the file.")
    native, report = convert(foreign, rules, config)
    if report:
        raise CheckpointError(f"{where} does not fit the model that its config describes. {report}.")
    model = _empty(config)
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in native.items()}
    model.load_state_dict({name: tensor.contiguous() for name, tensor in floats.items()}, assign=True)
    for module in model.modules():
        if isinstance(module, FourierPositions):
            module.reset()
    return model.eval()
