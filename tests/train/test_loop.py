"""The loop: learns, resumes to the bit, trains as transformers does, and is the same in pieces as whole."""

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig as TheirConfig
from transformers import ViTForImageClassification

from opsin import checkpoints
from opsin.errors import TrainError
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.train import loop
from opsin.train.config import Phase
from opsin.train.loader import Plan, drawn
from opsin.train.loop import Training
from opsin.train.process import Process
from train.conftest import CONFIG, NAMES, SHAPE, InMemory, pictures

Make = Callable[..., Training]


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(training: Any) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in training.records]


def test_it_learns_and_says_so(training: Make) -> None:
    run = training(steps=60, eval_every=30, log_every=20)
    assert run.run()
    records = run.records  # type: ignore[attr-defined]
    assert [record["step"] for record in records] == [20, 30, 40, 60]
    assert records[-1]["loss"] < 0.2 < records[0]["loss"]
    assert records[-1]["top1"] == 1
    assert records[-1]["epoch"] == 60 * 6 / 48
    assert records[-1]["lr"] == pytest.approx(0, abs=1e-5)
    assert all(record["images_per_s"] > 0 for record in records)


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9, "mixup": 0.4, "cutmix": 1.0, "erase_rate": 0.5, "log_every": 5},
        {"optimizer": "muon", "model": replace(SHAPE, dropout_rate=0.2, drop_path_rate=0.3)},
        {"optimizer": "lamb", "phases": (Phase(share=0.5, image_size=12, keep_tokens=5),)},
        {"optimizer": "sgd", "precision": "bf16", "micro_batch_size": 2, "rand_augment": (2, 9), "workers": 1},
    ],
    ids=["adamw-ema-mix", "muon-dropout", "lamb-phases", "sgd-bf16-workers"],
)
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, which other tests load and no worker uses
def test_resumed_run_equals_the_uninterrupted_one(
    training: Make, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training("whole", **changes)
    assert whole.run()

    cut = training("cut", **changes)
    steps, update = 0, Training._update

    def power_cut(self: Training) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 7:  # the last state is of step 4
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(Training, "_update", power_cut)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    monkeypatch.undo()
    cut.states.wait()

    resumed = training("cut", **changes)
    assert resumed.progress.step == 4
    assert resumed.run()
    assert equal(weights(whole), weights(resumed))
    ours, theirs = dict(losses(resumed)), dict(losses(whole))
    assert ours == {step: loss for step, loss in theirs.items() if step > 4}
    if whole.ema:
        assert resumed.ema
        assert equal(whole.ema.state_dict(), resumed.ema.state_dict())
    other = training("other", **changes, seed=1)
    other.run()
    assert not equal(weights(whole), weights(other))


def test_a_run_asked_to_stop_goes_on_as_if_it_had_not(training: Make) -> None:
    whole = training("whole")
    whole.run()
    stopped = training("stopped")
    stopped.stopping = lambda: stopped.progress.step == 6  # between two states
    assert not stopped.run()
    resumed = training("stopped")
    assert resumed.progress.step == 6
    assert resumed.run()
    assert equal(weights(whole), weights(resumed))


def test_accumulated_micro_batches_equal_the_whole_batch(training: Make) -> None:
    whole = training("whole")
    whole.run()
    pieces = training("pieces", micro_batch_size=2)
    assert pieces.accumulation == 3
    pieces.run()
    for (_, a), (_, b) in zip(losses(whole), losses(pieces), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    with pytest.raises(TrainError, match="batch_size 6 is not a multiple of 1 processes × micro_batch_size 4"):
        training("odd", micro_batch_size=4)


def test_gradient_checkpointing_changes_nothing(training: Make) -> None:
    shape = replace(SHAPE, drop_path_rate=0.3)
    plain = training("plain", model=shape)
    saving = training("saving", model=shape)
    assert equal(weights(plain), weights(saving))
    saving.model.gradient_checkpointing = True
    plain.run()
    saving.run()
    assert losses(plain) == losses(saving)


def test_perceiver_with_sigmoid_loss_and_class_weights(training: Make) -> None:
    shape = ImagePerceiverConfig(
        image_size=(16, 16), max_resolution=(4, 4), num_bands=3, num_latents=5, latent_dim=16, num_blocks=2,
        layers_per_block=1, num_heads=2, num_classes=3, embed_dim=8,
    )  # fmt: skip
    run = training(
        network=ImagePerceiver(shape), optimizer="lamb", lr=0.02, loss="sigmoid", class_weights=True, steps=40,
        eval_every=40, decay_positions=True, weight_decay=0.1,
    )  # fmt: skip
    run.run()
    assert run.class_weights.tolist() == [1, 1, 1]
    assert losses(run)[-1][1] < losses(run)[0][1] / 2
    assert run.records[-1]["top1"] == 1  # type: ignore[attr-defined]


def test_several_labels_an_image(training: Make) -> None:
    """A picture is amber, blue or both; the head learns each by itself."""
    files, targets = pictures(60)
    several = np.eye(3, dtype=np.uint8)[targets]
    several[:, 2] |= several[:, 0]
    data = InMemory(files, several, Labels(NAMES, multi_label=True))
    run = training(data=data, loss="sigmoid", steps=60, eval_every=60)
    run.run()
    pixels = torch.stack([run.preprocess(file) for file in files[:3]])
    with torch.no_grad():
        assert ((run.model(pixels) > 0).int().numpy() == several[:3]).all()


def test_class_weights_are_inverse_to_the_number_of_images(training: Make) -> None:
    files, targets = pictures(60)
    keep = [i for i in range(60) if targets[i] != 2 or i < 15]  # 20, 20, 5; each fifth is held out
    data = InMemory([files[i] for i in keep], targets[keep], Labels(NAMES))
    run = training(data=data, class_weights=True)
    assert run.class_weights.tolist() == pytest.approx([36 / 16 / 3, 36 / 16 / 3, 36 / 4 / 3])


def test_unreadable_images_are_counted_once_named_and_skipped(training: Make, samples: InMemory) -> None:
    samples.files[0] = samples.files[0][:60]
    samples.files[7] = b"GIF89a"
    run = training(steps=40, eval_every=40, micro_batch_size=1)  # some micro-batches are empty
    run.run()
    assert sorted(bad.key for bad in run.bads) == ["image-000.png", "image-007.png"]  # type: ignore[attr-defined]
    assert run.records[-1]["bad_images"] == 2  # type: ignore[attr-defined]
    assert run.records[-1]["top1"] == 1  # type: ignore[attr-defined]
    with pytest.raises(TrainError, match=r"2 of 48 training images could not be read, more than the 1 allowed"):
        training("strict", steps=40, max_bad=0.03).run()


def test_no_finite_loss_is_an_error(training: Make) -> None:
    run = training()
    with torch.no_grad():
        run.model.head.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(TrainError, match=r"the loss is nan at step 1. Begin again with a lower --lr \(0.003\)"):
        run.run()


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    draws = list(drawn(7, 0, 21, seed=3))
    epochs = [[place for place, epoch in draws if epoch == e] for e in range(3)]
    assert [sorted(places) for places in epochs] == [list(range(7))] * 3
    assert all(a != b for a, b in pairwise(epochs))
    assert list(drawn(7, 5, 16, seed=3)) == draws[5:16]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_out_the_same_batches(world: int) -> None:
    def plan(rank: int, world: int, first: int = 0) -> list[list[Any]]:
        rows = np.arange(100, 117)
        return list(
            Plan(rows=rows, batch_size=6, micro_batch_size=1, seed=5, rank=rank, world=world,
                 size_of=lambda step: (step, step), first=first, last=4)
        )  # fmt: skip

    parts = [plan(rank, world) for rank in range(world)]
    per_step = 6 // world
    together = [
        draw for step in range(4) for part in parts for micro in part[step * per_step : (step + 1) * per_step]
        for draw in micro
    ]  # fmt: skip
    assert together == [draw for micro in plan(0, 1) for draw in micro]
    assert plan(0, world, first=2) == parts[0][2 * per_step :]


def test_phases_come_in_order_and_end_with_the_run(training: Make) -> None:
    phases = (Phase(share=0.25, image_size=8, keep_tokens=3), Phase(share=0.5, image_size=12))
    run = training(phases=phases, steps=12)
    assert [run._phase(step) for step in (0, 2, 3, 8, 9, 11)] == [
        ((8, 8), 3), ((8, 8), 3), ((12, 12), None), ((12, 12), None), ((16, 16), None), ((16, 16), None),
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_trains_as_transformers_trains(
    optimizer: str, training: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same start, data and optimiser: transformers' ViT in our loop gives our ViT's losses."""
    shape = ViTConfig(
        image_size=(16, 16), patch_size=4, embed_dim=24, num_layers=2, num_heads=2, mlp_dim=40, num_classes=3
    )
    torch.manual_seed(3)
    ours = ViT(shape)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    checkpoints.write_hf(tmp_path / "start", ours, None, Labels(NAMES))
    theirs = ViTForImageClassification.from_pretrained(
        tmp_path / "start", config=TheirConfig.from_pretrained(tmp_path / "start", attn_implementation="eager")
    )
    changes = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 3e-3, "steps": 30, "eval_every": 30}
    mine = training("ours", network=ours, **changes)
    mine.run()

    class Student(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, *, with_teacher: bool = False) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor, *_: Any) -> Any:
            logits = self.model(pixels).logits
            return (logits, logits) if self.training else logits

    def all_trained(model: torch.nn.Module, config: Any) -> list[torch.optim.Optimizer]:
        kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        options = {"momentum": 0.9} if optimizer == "sgd" else {"weight_decay": 0.0}
        made = kind(model.parameters(), lr=config.lr, **options)
        made.param_groups[0]["base_lr"] = config.lr
        return [made]

    monkeypatch.setattr(loop, "_Student", Student)
    monkeypatch.setattr(loop, "make_optimizer", all_trained)
    other = training("theirs", network=theirs, **changes)
    other.run()
    for (_, a), (_, b) in zip(losses(mine), losses(other), strict=True):
        assert a == pytest.approx(b, abs=2e-4)
    assert losses(mine)[-1][1] < 0.5 * losses(mine)[0][1]


def test_16_bit_pictures_and_alpha_train_like_any_other(training: Make, samples: InMemory) -> None:
    for index, mode in enumerate(("RGBA", "L", "P", "I;16")):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(samples.files[index])).convert("L" if mode == "I;16" else mode).save(buffer, "PNG")
        samples.files[index] = buffer.getvalue()
    run = training()
    run.run()
    assert not run.bads  # type: ignore[attr-defined]


def test_a_second_head_learns_with_the_first_where_nobody_teaches_it(training: Make) -> None:
    """What is trained is what is used: the mean of the two."""
    shape = replace(SHAPE, class_token=True, distillation_token=True, pool="token")
    run = training(network=ViT(shape), steps=3)
    model: Any = run.model.train()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for head in (model.head, model.head_dist):
            head.weight.normal_()
        used, (trained, _) = model(pixels), run.student.train()(pixels)
    assert torch.allclose(used, trained, atol=1e-5)
    before = weights(run)
    run.run()
    assert not torch.equal(model.head_dist.weight, before["head_dist.weight"])


def test_dropping_tokens_never_drops_the_class_token(training: Make) -> None:
    """Without layers the class token alone decides, so that every picture gets the same logits."""
    shape = replace(SHAPE, class_token=True, pool="token", num_layers=0)
    run = training(network=ViT(shape))
    model: Any = run.model
    with torch.no_grad():
        model.cls_token.normal_()
        model.head.weight.normal_()
        logits, _ = run.student.train()(torch.randn(9, 3, 16, 16), 3, torch.Generator().manual_seed(0))
    assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-6)


def test_an_overflow_in_fp16_steps_nothing(training: Make) -> None:
    run = training(precision="fp16", optimizer="muon", ema_decay=0.9, steps=3, eval_every=3)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = weights(run)
    run.run()
    assert equal(weights(run), before)
    assert run.ema
    assert all(tensor.isfinite().all() for tensor in run.ema.state_dict().values())


def test_a_run_that_was_stopped_writes_the_metrics_of_one_that_was_not(training: Make) -> None:
    whole = training("whole", log_every=5, eval_every=12)
    whole.run()
    stopped = training("stopped", log_every=5, eval_every=12)
    stopped.stopping = lambda: stopped.progress.step == 7
    stopped.run()
    resumed = training("stopped", log_every=5, eval_every=12)
    resumed.run()
    assert losses(stopped) + losses(resumed) == losses(whole)


def test_more_processes_than_images_in_a_batch_are_refused(training: Make, samples: InMemory) -> None:
    with pytest.raises(TrainError, match="batch_size 2 is not a multiple of 3 processes"):
        replace(training(), process=Process(0, 3, torch.device("cpu")), config=replace(CONFIG, batch_size=2))
