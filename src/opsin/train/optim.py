"""Optimisers, parameter groups, learning-rate schedules and the moving average of the weights."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsin.train.config import TrainConfig

# ── parameter groups ─────────────────────────────────────────────────────────────────────────────────────────────────

# What a parameter is called in `models/`, from the front of its name …
FRONT = re.compile(
    r"(cls_token|dist_token|registers|pos_embed|stem|stem_proj|stem_norm|patch_embed|front_end|encoder\.latents|encoder\.cross)(\.|$)"
)
LAYER = re.compile(r"(?:encoder\.)?layers\.(\d+)\.")
BACK = re.compile(r"(norm|attn_pool|pre_logits|head|head_dist|decoder)\.")
# … and from its end.
TOKENS = {"cls_token", "dist_token", "registers", "pos_embed", "latents", "probe", "table"}
LAYER_SCALES = {"attn_scale", "mlp_scale"}
MATRICES = {"weight", "a", "b"}  # unless the module is a norm; a, b: the factors of `train/lora.py`


def param_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The parameters that are trained, by how.

    Weight decay is for the matrices of dense layers and convolutions; with `config.decay_positions` also for positions,
    latents, registers and class tokens; with `config.decay_all` for everything. The learning rate is times
    `config.layer_decay` ** (N − i) in layer i of N, from 0; ** (N + 1) in front of the layers, ** 0 behind them.
    In a Perceiver the latents and the cross-attention that fills them are in front, and layers that several blocks
    share count once.

    Returns:
        {"params", "lr_scale", "weight_decay", "names"}, one for each pair of settings, in the order in which the model
        first has them.
    Source: layers: BEiT (Bao et al. 2021) and MAE (He et al. 2021, Table 9). Decay: spec perceiver.md §5.1.
    """
    named = list(model.named_parameters())
    num_layers = 1 + max((int(found[1]) for name, _ in named if (found := LAYER.match(name))), default=-1)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            lr_scale = config.layer_decay ** (num_layers + 1 - _depth(name, num_layers))
            weight_decay = config.weight_decay if _is_decayed(name, config) else 0.0
            empty = {"params": [], "lr_scale": lr_scale, "weight_decay": weight_decay, "names": []}
            group = groups.setdefault((lr_scale, weight_decay), empty)
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def _depth(name: str, num_layers: int) -> int:
    """0 in front of the layers, i + 1 in layer i, N + 1 behind them."""
    if layer := LAYER.match(name):
        return int(layer[1]) + 1
    if FRONT.match(name):
        return 0
    assert BACK.match(name), f'parameter "{name}" is neither in front of the layers, in one of them, nor behind them'
    return num_layers + 1


def _is_decayed(name: str, config: TrainConfig) -> bool:
    *modules, leaf = name.split(".")
    in_norm = bool(modules) and (modules[-1].startswith("norm") or modules[-1].endswith("_norm"))
    if leaf in TOKENS:
        return config.decay_all or config.decay_positions
    if leaf == "bias" or leaf in LAYER_SCALES or in_norm:
        return config.decay_all
    assert leaf in MATRICES, f'parameter "{name}" is of no known kind; say in optim.py whether it is decayed'
    return True


# ── optimisers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def make_optimizer(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One optimiser, for "muon" two: Muon for the matrices of attention and MLPs, AdamW for the rest.

    Weight decay is decoupled and times the learning rate in all of them, so "adam" is AdamW. Every group remembers its
    own learning rate as `base_lr`, for `set_lr`. To be called when the parameters are what they will be while
    training: on their device and, with FSDP, sharded.
    """
    groups = param_groups(model, config)
    if config.optimizer == "muon":
        matrices = [_subset(group, muon=True) for group in groups]
        rest = [_subset(group, muon=False) for group in groups]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices := [group for group in matrices if group["params"]]:
            groups = _with_lr(matrices, config.muon_lr)
            optimizers.append(torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"))
        if rest := [group for group in rest if group["params"]]:
            optimizers.append(_adamw(_with_lr(rest, config.lr), config))
        return optimizers
    groups = _with_lr(groups, config.lr)
    if config.optimizer == "sgd":
        return [SGD(groups, momentum=config.momentum)]
    if config.optimizer == "lamb":
        return [Lamb(groups, betas=config.betas, eps=config.eps)]
    return [_adamw(groups, config)]


def _subset(group: dict[str, Any], *, muon: bool) -> dict[str, Any]:
    """The group's parameters that Muon takes, or those that it does not."""
    kept = [
        (parameter, name)
        for parameter, name in zip(group["params"], group["names"], strict=True)
        if (parameter.ndim == 2 and (".attn." in name or ".mlp." in name)) == muon
    ]
    return group | {"params": [parameter for parameter, _ in kept], "names": [name for _, name in kept]}


def _with_lr(groups: Sequence[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """As an optimiser takes them. Names are left out: what stays in a group is written into every checkpoint."""
    return [
        {
            "params": group["params"],
            "lr": lr * group["lr_scale"],
            "base_lr": lr * group["lr_scale"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused or None)


class SGD(torch.optim.SGD):
    """With momentum, and with decoupled decay: w ← w − lr · (m + weight_decay · w).

    torch's adds the decay to the gradient, where it ends up in the momentum.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for group in self.param_groups:  # where torch's step does not see it
            group["decoupled_decay"], group["weight_decay"] = group["weight_decay"], 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params and group["decoupled_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["decoupled_decay"])
        super().step()
        return loss


class Lamb(torch.optim.Optimizer):
    """Adam's step plus decay, of each tensor, made as long as lr times the tensor itself.

    u = m̂ / (√v̂ + eps) + weight_decay · w;  w ← w − lr · u · |w| / |u|, the last ratio 1 where either norm is 0. Norms
    are of whole tensors, also where FSDP keeps a part of them on each device. Clipping is the caller's.

    Source: You et al. 2020, Algorithm 2, with φ(z) = z; all tensors, biases and norms too, as `optax.lamb` and the
    Perceiver release have it.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._step(params, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})
        return loss

    def _step(
        self, params: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),  # on the CPU, so that reading it waits for no device
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in params]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        steps = []
        for state in states:
            state["step"] += 1
            steps.append(float(state["step"]))

        torch._foreach_lerp_(means, grads, 1 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - betas[1] ** step) for step in steps])
        torch._foreach_add_(roots, eps)
        updates = list(torch._foreach_div(means, roots))
        torch._foreach_div_(updates, [1 - betas[0] ** step for step in steps])
        if weight_decay:
            torch._foreach_add_(updates, params, alpha=weight_decay)

        norms = torch.stack([*torch._foreach_norm(params), *torch._foreach_norm(updates)])
        if hasattr(norms, "full_tensor"):  # a DTensor, of norms of parts
            norms = norms.full_tensor()
        of_params, of_updates = norms.chunk(2)
        ratios = torch.where((of_params > 0) & (of_updates > 0), of_params / of_updates, 1.0)
        torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(params, updates, alpha=-lr)


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────


def lr_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Factor on every learning rate: a linear warm-up from 0 times a curve from 1 to `end_lr` / `lr`.

    cosine, linear: from the end of the warm-up to `steps`. flat_cosine: 1 for `flat_share` of all steps, then half a
    cosine. constant: 1. step: a tenth after each third of the steps, as ResNets are trained. `end_lr` is where a group
    at the full learning rate ends; Muon's and those of lower layers end at the same fraction of theirs.

    Args:
        step: of `steps`, from 0, as optax counts and with it the releases of ViT and Perceiver. With a warm-up, step 0
            has factor 0 and fills the moments only.
    Source: lr · ½(1 + cos(π(t − w)/(T − w))) · min(1, t/w), vision_transformer `create_learning_rate_schedule`;
    flat_cosine: "constant_cosine" of deepmind-research `perceiver/train/utils.py`.
    """
    start = config.warmup_steps
    if config.schedule == "flat_cosine":
        start = max(start, int(config.flat_share * steps))
    progress = min(max((step - start) / max(steps - start, 1), 0.0), 1.0)
    if config.schedule == "constant":
        curve = 1.0
    elif config.schedule == "step":
        curve = 0.1 ** min(3 * step // max(steps, 1), 2)
    elif config.schedule == "linear":
        curve = 1 - progress
    else:
        curve = 0.5 * (1 + math.cos(math.pi * progress))
    end = config.end_lr / config.lr if config.end_lr else 0.0
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * (end + (1 - end) * curve)


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Every group's learning rate becomes `factor` times the one that `make_optimizer` gave it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


# ── moving average ───────────────────────────────────────────────────────────────────────────────────────────────────


class EMA:
    """Moving average of a model's parameters and floating-point buffers: s ← decay · s + (1 − decay) · w.

    It begins as the weights at hand. Integer buffers (counters) are not kept. torch's `AveragedModel` deep-copies the
    module, which FSDP2 refuses.

    Args:
        model: the module itself, not its DDP wrapper; sharded already, if it will be.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: tensor.clone() for name, tensor in _floats(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """To be called after each step of the optimiser."""
        now = _floats(model)
        torch._foreach_lerp_(list(self.shadow.values()), [now[name] for name in self.shadow], 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """The average becomes the model's weights; those it had are gone."""
        for name, tensor in _floats(model).items():
            tensor.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by the model's names for them."""
        return dict(self.shadow)


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


# ── for a loop of one's own, without a TrainConfig: examples/audio_digits.py ──────────────────────────────────────────


def muon_and_adamw(
    model: nn.Module, *, muon_lr: float, adamw_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embeddings, norms, biases and heads.

    Decay applies to matrices only, not to norms, biases, positions and latents.
    """
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if (".attn." in name or ".mlp." in name) and parameter.ndim == 2:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith(("pos_embed", "latents", "positions.table")):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=adamw_lr,
        betas=(0.9, 0.99),
    )
    return [muon, adamw]


def warmup_cosine(step: int, *, steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate: linear over `warmup_steps`, then half a cosine to 0 at `steps`; never 0 before."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
