"""Optimisers, schedules and averages against optax, timm and formulas written out here; groups against tables."""

import importlib
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opsin.errors import TrainError
from opsin.models.perceiver_io import FrontEnd, ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig
from opsin.train.config import OptimizerName, TrainConfig
from opsin.train.lora import add_lora
from opsin.train.optim import EMA, SGD, Lamb, lr_factor, make_optimizer, param_groups, set_lr, warmup_cosine
from opsin.train.state import restore

SMALL = ViTConfig(image_size=(12, 20), patch_size=4, embed_dim=14, num_layers=3, num_heads=2, mlp_dim=22, num_classes=5)
EVERYTHING = replace(  # every parameter that a ViT can have
    SMALL, num_layers=2, stem=(1,), image_size=(32, 48), distillation_token=True, num_registers=3, layer_scale=True,
    pool="map", pre_logits=True, gated_mlp=True,
)  # fmt: skip
PERCEIVER = ImagePerceiverConfig(
    image_size=(24, 40), num_latents=3, latent_dim=10, num_blocks=4, layers_per_block=2, num_heads=2, embed_dim=6,
    num_bands=2, num_classes=5,
)  # fmt: skip
VISUAL = VTConfig(
    image_size=(20, 28), depth=50, width=2, small_stem=True, num_modules=2, map_dim=6, token_dim=12, num_tokens=3,
    num_heads=3, num_groups=2, position_size=3, num_classes=5,
)  # fmt: skip
CONFIG = TrainConfig(model=SMALL, steps=7, lr=0.02, weight_decay=0.3)

SHAPES = [(2, 3), (5,), (7, 1, 2, 3), (), (3, 11), (13,), (2, 5)]
ZERO, STILL = 4, 5  # begins as zeros; has no gradient to speak of


def trajectory(steps: int = 12) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Starting values, and gradients of each step, of very different sizes."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) * 3.0 ** (i - 3) for i, shape in enumerate(SHAPES)]
    start[ZERO] = np.zeros(SHAPES[ZERO])
    grads = [[rng.normal(size=shape) * 10.0 ** (i - 4) for i, shape in enumerate(SHAPES)] for _ in range(steps)]
    for grad in grads:
        grad[STILL] = np.zeros(SHAPES[STILL])
    return start, grads


def ours(make: Any, lrs: list[float]) -> list[np.ndarray]:
    """Where `make(parameters)` goes, in double precision."""
    start, grads = trajectory(len(lrs))
    parameters = [nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in start]
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make([*parameters, unused])
    for lr, step in zip(lrs, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    assert torch.equal(unused, torch.ones_like(unused))  # no gradient, no step, no decay
    return [parameter.detach().numpy() for parameter in parameters]


@pytest.fixture(scope="module")
def optax() -> Any:
    return importlib.import_module("optax")  # without types


def optax_goes(make: Any, lrs: list[float]) -> list[np.ndarray]:
    """Where `make(schedule)` of optax goes."""
    import jax
    import jax.numpy as jnp

    start, grads = trajectory(len(lrs))
    with jax.enable_x64(True):
        transform = make(lambda count: jnp.asarray(lrs)[count])

        @jax.jit
        def step(values: Any, state: Any, grad: Any) -> Any:
            updates, state = transform.update(grad, state, values)
            return [value + update for value, update in zip(values, updates, strict=True)], state

        values, state = start, transform.init(start)
        for grad in grads:
            values, state = step(values, state, grad)
        return [np.asarray(value) for value in values]


def agree(ours: list[np.ndarray], theirs: list[np.ndarray], rtol: float = 1e-12) -> None:
    start, _ = trajectory(1)
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=rtol * 1e-3, err_msg=f"tensor {i}")
        assert i == STILL or not np.allclose(mine, start[i], rtol=1e-3), "nothing has moved"


LRS = [0.03 * (1 + math.sin(step)) for step in range(12)]


def test_lamb_is_optax_lamb(optax: Any) -> None:
    mine = ours(lambda params: Lamb(params, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1), LRS)
    agree(mine, optax_goes(lambda lr: optax.lamb(lr, 0.8, 0.95, 1e-4, weight_decay=0.1), LRS))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_is_timm_lamb(weight_decay: float) -> None:
    from timm.optim import Lamb as TimmLamb

    settings: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    theirs = ours(lambda params: TimmLamb(params, **settings, max_grad_norm=None, always_adapt=True), LRS)
    agree(ours(lambda params: Lamb(params, **settings), LRS), theirs)


def test_lamb_counts_the_steps_of_each_tensor() -> None:
    """A tensor that has its first gradient later is corrected as in its own first step."""
    late, alone = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    other = nn.Parameter(torch.ones(1))
    both, one = Lamb([other, late], lr=0.1), Lamb([alone], lr=0.1)
    other.grad = torch.ones(1)
    both.step()
    late.grad, alone.grad = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])
    both.step()
    one.step()
    assert torch.equal(late, alone)
    # |w| = 5, the update is (1, −1) of length √2
    assert torch.allclose(late, torch.tensor([3.0, 4.0]) - 0.1 * 5 / 2**0.5 * torch.tensor([1.0, -1.0]))


def test_adamw_is_optax_adamw(optax: Any) -> None:
    config = replace(CONFIG, optimizer="adamw", betas=(0.8, 0.95), eps=1e-5, decay_all=True)

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        model = nn.Module()  # parameters under names that are known
        for i, parameter in enumerate(params):
            model.register_module(f"head{i}", nn.Module())
            model.get_submodule(f"head{i}").weight = parameter
        holder = nn.Module()
        holder.decoder = model
        (optimizer,) = make_optimizer(holder, config)
        return optimizer

    agree(ours(make, LRS), optax_goes(lambda lr: optax.adamw(lr, 0.8, 0.95, 1e-5, weight_decay=0.3), LRS), 1e-11)


def test_sgd_decays_beside_the_momentum(optax: Any) -> None:
    def theirs(lr: Any) -> Any:
        return optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.3), optax.scale_by_learning_rate(lr))

    agree(ours(lambda params: SGD(params, momentum=0.9, weight_decay=0.3), LRS), optax_goes(theirs, LRS))


def test_closures_are_evaluated() -> None:
    kinds: list[Any] = [SGD, Lamb]
    for kind in kinds:
        weight = nn.Parameter(torch.tensor([2.0]))

        def closure(weight: nn.Parameter = weight) -> float:
            loss = (weight**2).sum()
            loss.backward()
            return float(loss.detach())

        optimizer = kind([weight], lr=0.25)
        assert optimizer.step(closure) == 4.0
        assert weight.item() != 2.0


# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(model: nn.Module, config: TrainConfig) -> dict[str, tuple[float, float]]:
    """Name → (learning rate's factor, decay); asserts that every parameter is there once, under its own name."""
    groups = param_groups(model, config)
    names = [name for group in groups for name in group["names"]]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(names) == sorted(trained)
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is trained[name]
    settings = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert len(set(settings)) == len(settings)
    return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}


LAYER_MATRICES = {f"{part}.weight" for part in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.fc1", "mlp.fc2")}
CROSS = {f"cross.{name}" for name in LAYER_MATRICES}
VIT_MATRICES = {
    *("stem.root.weight", "stem.stages.0.0.conv1.weight", "stem.stages.0.0.conv2.weight"),
    *("stem.stages.0.0.conv3.weight", "stem.stages.0.0.proj.weight", "patch_embed.weight"),
    *(f"layers.{i}.{name}" for i in range(2) for name in LAYER_MATRICES),
    *(f"attn_pool.{name}" for name in LAYER_MATRICES),
    *("pre_logits.weight", "head.weight", "head_dist.weight"),
}
VIT_TOKENS = {"cls_token", "dist_token", "registers", "pos_embed", "attn_pool.probe"}
PERCEIVER_MATRICES = {
    *(f"encoder.layers.{i}.{name}" for i in range(2) for name in LAYER_MATRICES),
    *(f"{part}.{name}" for part in ("encoder", "decoder") for name in CROSS),
    "decoder.out.weight",
}
PERCEIVER_TOKENS = {"encoder.latents", "decoder.positions.table"}
FRONT_ENDS: list[tuple[FrontEnd, set[str], set[str]]] = [
    ("conv", {"front_end.stages.0.conv.weight"}, set()),
    ("pixels", set(), set()),
    ("conv1x1", {"front_end.conv.weight", "front_end.pos_proj.weight"}, {"front_end.positions.table"}),
]
CASES = [
    pytest.param(ViT(EVERYTHING), VIT_MATRICES, VIT_TOKENS, id="vit"),
    *(
        pytest.param(
            ImagePerceiver(replace(PERCEIVER, front_end=kind)),
            PERCEIVER_MATRICES | matrices,
            PERCEIVER_TOKENS | tokens,
            id=kind,
        )
        for kind, matrices, tokens in FRONT_ENDS
    ),
]


@pytest.mark.parametrize(("model", "matrices", "tokens"), CASES)
def test_decay_is_for_matrices_and_for_what_else_is_asked(
    model: nn.Module, matrices: set[str], tokens: set[str]
) -> None:
    everything = {name for name, _ in model.named_parameters()}
    assert matrices | tokens < everything

    def decayed(config: TrainConfig) -> set[str]:
        rows = table(model, config)
        assert {decay for _, decay in rows.values()} <= {0.0, 0.3}
        assert {scale for scale, _ in rows.values()} == {1.0}
        assert len(param_groups(model, config)) <= 2
        return {name for name, (_, decay) in rows.items() if decay}

    assert decayed(CONFIG) == matrices
    assert decayed(replace(CONFIG, decay_positions=True)) == matrices | tokens
    assert decayed(replace(CONFIG, decay_all=True)) == everything
    assert decayed(replace(CONFIG, decay_all=True, decay_positions=True)) == everything
    assert decayed(replace(CONFIG, weight_decay=0.0)) == set()


def test_learning_rates_fall_layer_by_layer() -> None:
    rows = {name: scale for name, (scale, _) in table(ViT(EVERYTHING), replace(CONFIG, layer_decay=0.5)).items()}
    for name, scale in rows.items():
        part = name.split(".")[0]
        if part == "layers":
            expected = {"0": 0.25, "1": 0.5}[name.split(".")[1]]
        elif part in ("cls_token", "dist_token", "registers", "pos_embed", "stem", "patch_embed"):
            expected = 0.125
        else:
            assert part in ("norm", "attn_pool", "pre_logits", "head", "head_dist")
            expected = 1.0
        assert scale == expected, name


def test_of_a_vt_norms_and_biases_are_not_decayed_and_the_resnet_is_in_front() -> None:
    model = VT(VISUAL)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert "stem.stages.1.0.conv3.weight" in matrices
    assert "layers.0.tokenizer.value.weight" in matrices
    rows = table(model, replace(CONFIG, layer_decay=0.5))
    assert {name for name, (_, decay) in rows.items() if decay} == matrices
    scales = {"stem": 0.125, "stem_proj": 0.125, "stem_norm": 0.125, "layers.0": 0.25, "layers.1": 0.5, "head": 1.0}
    for name, (scale, _) in rows.items():
        parts = name.split(".")
        assert scale == scales[".".join(parts[:2]) if parts[0] == "layers" else parts[0]], name
    rows = table(VT(replace(VISUAL, num_modules=0, image_size=(32, 40))), replace(CONFIG, layer_decay=0.5))
    assert {name.split(".")[0]: scale for name, (scale, _) in rows.items()} == {"stem": 0.5, "head": 1.0}


@pytest.mark.parametrize("front_end", ["conv", "pixels", "conv1x1"])
def test_shared_layers_of_a_perceiver_count_once(front_end: FrontEnd) -> None:
    model = ImagePerceiver(replace(PERCEIVER, front_end=front_end))
    for name, (scale, _) in table(model, replace(CONFIG, layer_decay=0.5)).items():
        if name.startswith("encoder.layers."):
            expected = {"0": 0.25, "1": 0.5}[name.split(".")[2]]
        else:
            expected = 1.0 if name.startswith("decoder.") else 0.125
        assert scale == expected, name


def test_groups_are_timms_but_for_the_last_norm() -> None:
    """timm counts the norm behind the layers to the last layer; BEiT and MAE to the head."""
    import timm
    from timm.optim import param_groups_layer_decay

    other = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=14, num_heads=2, depth=3, num_classes=5)
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    theirs = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            other, 0.3, no_weight_decay_list=other.no_weight_decay(), layer_decay=0.65
        )
        for parameter in group["params"]
    }
    for name, row in table(ViT(SMALL), replace(CONFIG, layer_decay=0.65)).items():
        timms = name.replace("layers.", "blocks.").replace("attn.out", "attn.proj").replace("embed.", "embed.proj.")
        for part in "qkv":
            timms = timms.replace(f"attn.{part}.", "attn.qkv.")
        scale, decay = theirs.pop(timms) if "attn.qkv" not in timms or ".v." in name else theirs[timms]
        assert row == (pytest.approx(scale / 0.65 if name.startswith("norm.") else scale, rel=1e-12), decay), name
    assert not theirs


def test_frozen_parameters_have_no_group() -> None:
    model = ViT(SMALL).requires_grad_(False)
    model.layers[1].requires_grad_(True)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    rows = table(model, replace(CONFIG, layer_decay=0.5))
    assert {name.split(".")[0] for name in rows} == {"layers", "head"}
    assert rows["layers.1.attn.q.weight"] == (0.25, 0.3)  # still the second of three


def test_factors_of_lora_are_matrices_of_their_layer() -> None:
    model = ViT(SMALL)
    add_lora(model, rank=2, targets=("v", "fc1"))
    rows = table(model, replace(CONFIG, layer_decay=0.5))
    factors = {f"layers.{i}.{part}.{leaf}" for i in range(3) for part in ("attn.v", "mlp.fc1") for leaf in "ab"}
    assert rows.keys() == factors | {"head.weight", "head.bias"}
    assert rows["layers.2.attn.v.a"] == rows["layers.2.mlp.fc1.b"] == (0.5, 0.3)


@pytest.mark.parametrize(
    ("name", "message"),
    [("neck", '"neck" is neither in front of the layers'), ("decoder.gate", '"decoder.gate" is of no known kind')],
)
def test_unknown_parameters_are_not_guessed(name: str, message: str) -> None:
    model = nn.Module()
    model.decoder = nn.Module()
    *modules, leaf = name.split(".")
    model.get_submodule(".".join(modules)).register_parameter(leaf, nn.Parameter(torch.zeros(2)))
    with pytest.raises(AssertionError, match=message):
        param_groups(model, CONFIG)


def test_group_order_does_not_change() -> None:
    config = replace(CONFIG, layer_decay=0.5)
    names = [[group["names"] for group in param_groups(ViT(SMALL), config)] for _ in range(2)]
    assert names[0] == names[1]
    assert names[0][0] == ["cls_token", "pos_embed", "patch_embed.bias"]
    assert len(names[0]) == 2 * 5


# ── optimisers ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", SGD), ("adam", torch.optim.AdamW), ("adamw", torch.optim.AdamW), ("lamb", Lamb)],
)
def test_settings_reach_the_optimizer(name: OptimizerName, kind: type) -> None:
    config = replace(CONFIG, optimizer=name, betas=(0.7, 0.8), eps=1e-3, momentum=0.6, layer_decay=0.5)
    model = ViT(SMALL)
    (optimizer,) = make_optimizer(model, config)
    assert type(optimizer) is kind
    for group, expected in zip(optimizer.param_groups, param_groups(model, config), strict=True):
        assert len(group["params"]) == len(expected["params"])
        assert all(a is b for a, b in zip(group["params"], expected["params"], strict=True))
        assert group["lr"] == group["base_lr"] == 0.02 * expected["lr_scale"]
        assert group["decoupled_decay" if name == "sgd" else "weight_decay"] == expected["weight_decay"]
        if name == "sgd":
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.6, False, 0.0)
        else:
            assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-3)


@pytest.mark.parametrize(
    ("model", "front"),
    [(ViT(EVERYTHING), ("layers.", "attn_pool.")), (ImagePerceiver(PERCEIVER), ("encoder.", "decoder."))],
)
def test_matrices_of_layers_go_to_muon(model: nn.Module, front: tuple[str, ...]) -> None:
    config = replace(CONFIG, optimizer="muon", muon_lr=0.05, betas=(0.9, 0.99), layer_decay=0.5)
    muon, adamw = make_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = (
        [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        for optimizer in (muon, adamw)
    )
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    matrices = VIT_MATRICES if isinstance(model, ViT) else PERCEIVER_MATRICES
    assert set(by_muon) == {n for n in matrices if n.startswith(front) and n != "decoder.out.weight"}
    scale = {name: s for name, (s, _) in table(model, config).items()}
    for optimizer, lr in ((muon, 0.05), (adamw, 0.02)):
        for group in optimizer.param_groups:
            assert {lr * scale[names[id(parameter)]] for parameter in group["params"]} == {group["base_lr"]}
    assert all(group["adjust_lr_fn"] == "match_rms_adamw" for group in muon.param_groups)
    assert all(group["betas"] == (0.9, 0.99) for group in adamw.param_groups)


def test_muon_moves_a_matrix_by_its_learning_rate() -> None:
    """All singular values of an update are about 1, so its entries are about lr · 0.2, as AdamW's (Moonshot's rule)."""
    torch.manual_seed(0)
    model = ViT(replace(SMALL, embed_dim=48, mlp_dim=48))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = make_optimizer(model, replace(CONFIG, optimizer="muon", muon_lr=0.05, weight_decay=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.fc1.weight"):
            rms = float((parameter.detach() - before[name]).square().mean().sqrt())
            assert 0.7 < rms / (0.05 * 0.2) < 1.3


def test_only_a_head_needs_no_muon() -> None:
    model = ViT(SMALL).requires_grad_(False)
    model.head.requires_grad_(True)  # type: ignore[union-attr]
    (optimizer,) = make_optimizer(model, replace(CONFIG, optimizer="muon"))
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "muon"])
def test_saved_optimizers_go_on_to_the_bit(name: OptimizerName) -> None:
    config = replace(CONFIG, optimizer=name, layer_decay=0.5)

    def advance(model: ViT, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            set_lr(optimizers, lr_factor(step, 7, config))
            for optimizer in optimizers:
                optimizer.step()

    torch.manual_seed(0)
    model = ViT(SMALL)
    optimizers = make_optimizer(model, config)
    advance(model, optimizers, range(3))
    again = ViT(SMALL)
    again.load_state_dict(model.state_dict())
    others = make_optimizer(again, replace(config, lr=9.0))  # what was saved counts
    for other, optimizer in zip(others, optimizers, strict=True):
        other.load_state_dict(deepcopy(optimizer.state_dict()))
    advance(model, optimizers, range(3, 6))
    advance(again, others, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────


def factors(steps: int, **settings: Any) -> list[float]:
    return [lr_factor(step, steps, replace(CONFIG, **settings)) for step in range(steps + 1)]


@pytest.mark.parametrize(("steps", "warmup"), [(103, 10), (103, 0), (7, 1)])
def test_cosine_is_the_vit_releases_formula(steps: int, warmup: int) -> None:
    """lr · ½(1 + cos(π(t − w)/(T − w))) · min(1, t/w), the angle 0 during the warm-up."""
    expected = [
        0.5 * (1 + math.cos(math.pi * max(t - warmup, 0) / (steps - warmup))) * (min(1, t / warmup) if warmup else 1)
        for t in range(steps + 1)
    ]
    assert factors(steps, warmup_steps=warmup) == pytest.approx(expected, abs=1e-12)
    assert expected[0] == (0 if warmup else 1)
    assert expected[warmup] == 1
    assert abs(expected[-1]) < 1e-12


@pytest.mark.parametrize("warmup", [0, 10])
def test_linear_ends_at_a_learning_rate(warmup: int) -> None:
    """vision_transformer: (end + (lr − end)(1 − progress)) · min(1, t/w); ImageNet-21k ends at 1e-5."""
    expected = []
    for t in range(104):
        lr = 1e-5 + (1e-3 - 1e-5) * (1 - max(t - warmup, 0) / (103 - warmup))
        expected.append(lr * (min(1, t / warmup) if warmup else 1) / 1e-3)
    assert factors(103, schedule="linear", lr=1e-3, end_lr=1e-5, warmup_steps=warmup) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(0.01)


def test_perceiver_is_flat_then_cosine() -> None:
    """Half of 55 + 55 epochs at the full rate, then half a cosine to 0, without a warm-up."""
    got = factors(103, schedule="flat_cosine")
    assert got[:52] == [1.0] * 52  # int(0.5 · 103) = 51 is the cosine's first, still 1
    assert got[51:] == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 52)) for t in range(53)], abs=1e-12)
    assert factors(10, schedule="flat_cosine", flat_share=1.0)[:10] == [1.0] * 10
    assert factors(10, schedule="flat_cosine", flat_share=0.0) == factors(10)


def test_step_is_a_tenth_after_each_third() -> None:
    got = factors(9, schedule="step", warmup_steps=2)
    assert got[:9] == pytest.approx([0, 0.5, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])
    assert factors(90, schedule="step")[29:31] == pytest.approx([1, 0.1])
    assert factors(90, schedule="step")[59:61] == pytest.approx([0.1, 0.01])


def test_constant_only_warms_up() -> None:
    assert factors(6, schedule="constant", warmup_steps=4, end_lr=1e-3) == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_schedules_are_optaxs(optax: Any) -> None:
    import jax

    with jax.enable_x64(True):
        cosine = optax.warmup_cosine_decay_schedule(0.0, 0.02, 10, 103, end_value=0.001)
        linear = optax.join_schedules(
            [optax.linear_schedule(0.0, 0.02, 10), optax.linear_schedule(0.02, 0.001, 93)], [10]
        )
        flat = optax.join_schedules(
            [optax.constant_schedule(0.02), optax.cosine_decay_schedule(0.02, 103 - 72, alpha=0.05)], [72]
        )
        settings: list[tuple[Any, dict[str, Any]]] = [
            (cosine, {"schedule": "cosine", "warmup_steps": 10}),
            (linear, {"schedule": "linear", "warmup_steps": 10}),
            (flat, {"schedule": "flat_cosine", "flat_share": 0.7}),
        ]
        for theirs, fields in settings:
            expected = [float(theirs(step)) / 0.02 for step in range(104)]
            assert factors(103, end_lr=0.001, **fields) == pytest.approx(expected, rel=1e-6), fields


def test_after_the_end_the_rate_stays_and_a_long_warmup_is_cut() -> None:
    assert lr_factor(150, 103, replace(CONFIG, end_lr=0.005)) == 0.25
    assert factors(4, warmup_steps=8) == [0, 0.125, 0.25, 0.375, 0.5]
    assert factors(8, schedule="flat_cosine", flat_share=0.25, warmup_steps=4)[:5] == [0, 0.25, 0.5, 0.75, 1]


def test_the_examples_schedule_wastes_no_step() -> None:
    got = [warmup_cosine(step, steps=100, warmup_steps=10) for step in range(101)]
    assert got[0] == 0.1
    assert got[9] == got[10] == 1.0
    assert got[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 90)) for t in range(91)])


def test_set_lr_keeps_the_groups_ratios() -> None:
    optimizers = make_optimizer(
        ViT(SMALL), replace(CONFIG, optimizer="muon", muon_lr=0.05, weight_decay=0.0, layer_decay=0.5)
    )
    for factor in (0.5, 0.0, 1.0):  # from what it was at first, not from the last
        set_lr(optimizers, factor)
        assert [group["lr"] for group in optimizers[0].param_groups] == [0.05 * factor * s for s in (0.125, 0.25, 0.5)]
        scales = (0.0625, 0.125, 0.25, 0.5, 1.0)
        assert [group["lr"] for group in optimizers[1].param_groups] == [0.02 * factor * s for s in scales]


# ── moving average ───────────────────────────────────────────────────────────────────────────────────────────────────


def shake(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 3 + 1)


def test_average_follows_the_recursion() -> None:
    """Parameters and batch norm's statistics; its counter is of integers and stays the model's."""
    model = ImagePerceiver(PERCEIVER)
    shake(model, 0)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    ema = EMA(model, 0.9)
    for step in range(1, 9):
        shake(model, step)
        ema.update(model)
        for name, tensor in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * tensor.double()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    assert ema.state_dict().keys() == expected.keys() - counters
    assert "front_end.stages.0.norm.running_var" in ema.state_dict()
    for name, tensor in ema.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-6), name

    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema.copy_to(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, last[name] if name in counters else ema.state_dict()[name])
    kept = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    shake(model, 99)  # the average does not share the model's memory
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ema.state_dict().items())


def test_loaded_average_goes_on_to_the_bit() -> None:
    model = ViT(SMALL)
    ema = EMA(model, 0.99)
    shake(model, 1)
    ema.update(model)
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other = EMA(model, 0.99)
    restore(other.state_dict(), saved)
    shake(model, 2)
    ema.update(model)
    other.update(model)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in ema.state_dict().items())
    assert not torch.equal(saved["head.bias"], other.state_dict()["head.bias"])


def test_average_of_another_model_is_refused() -> None:
    saved = EMA(ViT(SMALL), 0.9).state_dict()
    with pytest.raises(TrainError, match="of another model: head.bias, head.weight are in only one of the two"):
        restore(EMA(ViT(replace(SMALL, num_classes=0)), 0.9).state_dict(), saved)
    with pytest.raises(TrainError, match=r"the saved head.weight is \(5, 14\), the model's \(7, 14\)"):
        restore(EMA(ViT(replace(SMALL, num_classes=7)), 0.9).state_dict(), saved)


# ── sharded ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_shards_are_one_whole(tmp_path: Path) -> None:
    """This file, run by two processes."""
    command = [sys.executable, __file__, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


def sharded(store: str, rank: int) -> None:
    """Optimisers and average of an FSDP2 model, saved and loaded on the way, against those of the whole model."""
    import torch.distributed as dist
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

    def build() -> ViT:
        model = ViT(replace(SMALL, num_layers=1))
        shake(model, 0)
        torch.nn.init.zeros_(model.cls_token)  # type: ignore[arg-type]
        return model

    def shard(model: ViT) -> ViT:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def full(tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.full_tensor().detach()

    names: tuple[OptimizerName, ...] = ("lamb", "sgd", "muon")  # and with it AdamW
    for name in names:
        config = replace(CONFIG, optimizer=name, layer_decay=0.7)
        whole, parts = build(), shard(build())
        ours, theirs = make_optimizer(whole, config), make_optimizer(parts, config)
        average, averages = EMA(whole, 0.8), EMA(parts, 0.8)
        for step in range(3):
            if step == 1:
                saved = dcp.get_optimizer_state_dict(parts, theirs)
                theirs = make_optimizer(parts, replace(config, lr=9.0))
                dcp.set_optimizer_state_dict(parts, theirs, saved)
            generator = torch.Generator().manual_seed(step)
            for parameter, part in zip(whole.parameters(), parts.parameters(), strict=True):
                assert isinstance(part, DTensor)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                part.grad = distribute_tensor(parameter.grad.clone(), part.device_mesh, part.placements)
            set_lr([*ours, *theirs], lr_factor(step, 7, config))
            for optimizer in (*ours, *theirs):
                optimizer.step()
            average.update(whole)
            averages.update(parts)
        weights = {key: full(tensor) for key, tensor in parts.state_dict().items()}
        averages.copy_to(parts)
        for key, tensor in parts.state_dict().items():
            atol = 1e-3 if name == "muon" and (".attn." in key or ".mlp." in key) else 1e-6  # bfloat16 inside of Muon
            torch.testing.assert_close(weights[key], whole.state_dict()[key], rtol=1e-6, atol=atol)
            torch.testing.assert_close(full(tensor), average.state_dict()[key], rtol=1e-6, atol=atol)
    dist.destroy_process_group()


if __name__ == "__main__":
    sharded(sys.argv[1], int(sys.argv[2]))
