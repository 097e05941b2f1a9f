"""A run, whole: data and a config in, a folder out that is a model and says how it came to be.

runs/1/
  config.json, model.safetensors, …   the best model by held-out accuracy: `--model runs/1`
  last/                               the last one, the same way
  train.json                          the config and the data, what `--resume` goes on with
  environment.json                    versions, hardware, command
  held_out.txt                        the images that it was measured on, a name a line
  metrics.jsonl, curves.png           each logged step
  evaluation.json, .md, confusion.png, reliability.png     the best model on the held-out images
  bad_images.jsonl                    images that could not be read
  state/                              where the run stands; tensorboard/
"""

import contextlib
import copy
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from opsin import __version__, checkpoints, evaluate, plots
from opsin.checkpoints import Checkpoint, Source, files
from opsin.checkpoints.reader import EMBEDDED
from opsin.data import open_samples
from opsin.data.samples import Samples, split
from opsin.device import has_bf16
from opsin.errors import CheckpointError, MissingExtra, TrainError
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.position import sincos_2d
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig
from opsin.pipeline import Classifier, load
from opsin.preprocess import PreprocessConfig
from opsin.results import json_line
from opsin.train import config as configs
from opsin.train import probe
from opsin.train.augment import augment_of
from opsin.train.config import TrainConfig
from opsin.train.heads import new_head, preprocess_for
from opsin.train.loader import Bad
from opsin.train.loop import Model, Training, averaged, check_bad
from opsin.train.lora import add_lora, merge
from opsin.train.plan import Cost, cost, forward_flops, peak_flops
from opsin.train.process import Process
from opsin.train.state import StateFolder
from opsin.train.teacher import Teacher

log = logging.getLogger(__name__)

MIN_CALIBRATION = 100  # images: fewer say too little of a temperature
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    folder: Path
    finished: bool  # False: it was asked to stop; `--resume` goes on
    num_bad: int  # images to train on that could not be read
    top1: float | None = None  # of the best model on the held-out images; None without any
    top5: float | None = None
    mean_average_precision: float | None = None  # instead of these, where an image may have several labels


def next_folder(parent: Path) -> Path:
    """The first of parent/1, parent/2, … behind all that are there; made."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    while True:
        folder = parent / str(max(taken, default=0) + 1)
        try:
            folder.mkdir()
        except FileExistsError:  # another run began at the same time
            taken.append(int(folder.name))
        else:
            return folder


def begin(out: Path, config: TrainConfig, data: Sequence[str]) -> None:
    """Write down what the run is, before anything else: `go` does it.

    Raises:
        TrainError: the folder holds a run already.
    """
    if (out / "train.json").exists():
        raise TrainError(f"{out} holds a run. Go on with it: opsin train --resume {out}; or choose another --out.")
    where = [_absolute(path) for path in data]
    init, teacher = (name if name is None else _absolute(name) for name in (config.init, config.teacher))
    config = replace(config, init=init, teacher=teacher)
    files.write_json(out / "train.json", {"opsin": __version__, "data": where, "config": configs.to_dict(config)})


def _absolute(path: str) -> str:
    """A run may go on from another folder. What is no file here is a name, a URL or a pattern."""
    return path if path in EMBEDDED or "://" in path or not Path(path).exists() else str(Path(path).absolute())


def abandon(out: Path) -> None:
    """Take back what `begin` and a start that failed have written, so that the folder can be used again."""
    if not (out / "metrics.jsonl").exists() and not (out / "state").exists():
        for name in ("train.json", "data.json", "environment.json", "held_out.txt"):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is in it
            out.rmdir()


def go(
    out: Path,
    process: Process,
    *,
    cache: Path | None = None,
    on_start: Callable[[Record], None] = lambda facts: None,
    on_metrics: Callable[[Record], None] = lambda record: None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Summary:
    """Do the run that `begin` wrote into `out`, or what is left of it.

    Args:
        cache: where the features of a probe are kept; without it they are computed each time.
        on_start, on_metrics: facts of the run, then of each logged step.
        on_images: how many images of how many have gone through the model, where that takes long by itself.
        stopping: asked after each step; the state is then written, and `finished` False.
    Raises:
        TrainError, DataError, ModelError: what is wrong.
    """
    config, data = read(out)
    if config.precision == "bf16" and process.device.type == "cpu" and not has_bf16():
        log.warning("this CPU computes bf16 slower than fp32 (it has no AVX512-BF16 and no AMX): training in fp32.")
        config = replace(config, precision="fp32")
    samples = open_samples(data)
    if samples.labels.multi_label:
        config = _for_several_labels(config)
    rows, val_rows = split(samples, config.holdout)
    _check_identity(out, samples, process)
    if process.is_main:
        _write_environment(out, process)
        keys = "".join(f"{samples.key(row)}\n" for row in val_rows)
        (out / "held_out.txt").write_text(keys, encoding="utf-8", errors="surrogateescape")
    facts: Record = {
        "method": config.method,
        "images": len(rows),
        "held_out": len(val_rows),
        "classes": len(samples.labels),
        "device": str(process.device),
        "processes": process.world,
    }
    if config.method in ("probe", "fewshot"):
        return _probe(out, config, samples, rows, val_rows, process, facts, cache, on_start, on_metrics, on_images)

    built = build(config, samples.labels)
    model, preprocess = built.model, built.preprocess
    image_size = preprocess.image_size
    states = StateFolder(out / "state", rank=process.rank, world=process.world)
    if config.probe_head and states.newest() is None:
        _set_head(built, config, samples, rows, process, cache, on_images, out)
    facts["flops_per_image"] = 3 * forward_flops(model, image_size)
    if config.method == "lora":
        add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha)
    steps = num_steps(config, len(rows))
    config = _fitted(config, steps, image_size)
    metrics = Metrics(out, on_metrics) if process.is_main else None

    def write_best() -> None:
        _write_training(out, model, preprocess, samples.labels, process)

    model.to(process.device)
    training = Training(
        model=model,
        config=config,
        samples=samples,
        rows=rows,
        val_rows=val_rows,
        preprocess=preprocess,
        augment=augment_of(config, preprocess),
        steps=steps,
        image_size=image_size,
        process=process,
        states=states,
        teacher=Teacher(config.teacher, samples.labels, process.device) if config.teacher else None,
        flops=facts["flops_per_image"],
        peak_flops=peak_flops(process.device, config.precision),
        on_metrics=metrics.add if metrics else lambda record: None,
        on_best=write_best,
        on_bad=lambda bad: _write_bad(out, bad),
        stopping=stopping,
    )
    training.restore()
    if training.progress.step == steps and (out / "evaluation.json").exists():
        if metrics:
            metrics.close()
        return _finished(out, len(training.progress.bad))  # there is nothing left to do
    if metrics:
        metrics.forget_after(training.progress.step)
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        on_start(
            facts | {"steps": steps, "step": training.progress.step, "trained_params": params, "reused": built.reused}
        )
    finished = training.run()
    with averaged(model, training.ema):
        _write_training(out / "last", model, preprocess, samples.labels, process)
        if not len(val_rows):
            _write_training(out, model, preprocess, samples.labels, process)
    summary = Summary(out, finished, len(training.progress.bad))
    if process.is_main:
        assert metrics
        metrics.close()
        if finished:
            summary = _judge(out, summary, samples, val_rows, process.device, on_images)
    return summary


def read(out: Path) -> tuple[TrainConfig, list[str]]:
    """The config and the data of a run's folder.

    Raises:
        TrainError: it holds no run, or one of an opsin with other settings.
    """
    path = out / "train.json"
    if not path.is_file():
        raise TrainError(f"{out} holds no run: there is no train.json in it.")
    try:
        content = files.read_json(path)
        return configs.from_dict(content["config"]), list(content["data"])
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainError(f"{path} is not what this opsin ({__version__}) writes: {error}.") from error


def _for_several_labels(config: TrainConfig) -> TrainConfig:
    if config.teacher:
        raise TrainError("a teacher gives one class an image; these images may have several. Train without one.")
    if config.method == "fewshot":
        raise TrainError("few-shot heads are for one class an image; these may have several. Use --method probe.")
    return replace(config, loss="sigmoid")  # each class by itself, as the probe does too


def _fitted(config: TrainConfig, steps: int, image_size: tuple[int, int]) -> TrainConfig:
    """The parts of a recipe that are made for its own length and image size, for those of this run."""
    if config.warmup_steps > steps / 5:
        log.warning("a warm-up of %d steps is too long for %d: it takes %d.", config.warmup_steps, steps, steps // 5)
        config = replace(config, warmup_steps=steps // 5)
    if config.phases and config.model is not None and image_size != config.model.image_size:
        ratio = image_size[0] / config.model.image_size[0]
        stride = config.model.stride
        phases = tuple(
            replace(
                phase,
                image_size=max(round(phase.image_size * ratio / stride), 1) * stride,
                keep_tokens=None if phase.keep_tokens is None else max(round(phase.keep_tokens * ratio**2), 1),
            )
            for phase in config.phases
        )
        config = replace(config, phases=phases)
    return config


def num_steps(config: TrainConfig, num_images: int) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(round(config.epochs * num_images / config.batch_size), 1)


def estimate(config: TrainConfig, labels: Labels, num_images: int, world: int) -> Cost:
    """What `--dry-run` prints."""
    if config.method in ("probe", "fewshot"):
        raise TrainError("a probe has no steps to plan: it costs one forward pass of each image.")
    steps = num_steps(config, num_images)
    built = build(config, labels)
    if config.method == "lora":
        add_lora(built.model, rank=config.lora_rank, alpha=config.lora_alpha)
    return cost(built.model, config, steps=steps, image_size=built.preprocess.image_size, world=world)


@dataclass(frozen=True, slots=True)
class Built:
    """A model to train."""

    model: Model
    preprocess: PreprocessConfig  # of evaluation
    source: Source | None  # of the weights; None: random ones
    reused: int = 0  # classes of its head that came with them


def build(config: TrainConfig, labels: Labels) -> Built:
    """
    Raises:
        ModelError: the checkpoint cannot be loaded.
        TrainError: it is no classifier of images, or the sizes do not fit.
    """
    torch.manual_seed(config.seed)
    try:
        if config.init is None:
            return _from_scratch(config, labels)
        checkpoint = checkpoints.read(config.init)
        if not isinstance(checkpoint.model, ViT | VT | ImagePerceiver) or checkpoint.preprocess is None:
            raise TrainError(f"{config.init} does not classify images; training is for models that do.")
        preprocess = config.preprocess or checkpoint.preprocess
        if config.image_size is not None:
            preprocess = preprocess_for(preprocess, (config.image_size, config.image_size))
        model, reused = new_head(
            checkpoint.model,
            checkpoint.labels,
            labels,
            bias=config.head_bias,
            image_size=preprocess.image_size,
            dropout_rate=config.dropout_rate,
            drop_path_rate=config.drop_path_rate,
            for_features=config.probe_head or config.method in ("probe", "fewshot"),
        )
    except ValueError as error:
        raise TrainError(str(error)) from error
    _prepare(model, config)
    return Built(model, preprocess, checkpoint.source, reused)


def _from_scratch(config: TrainConfig, labels: Labels) -> Built:
    shape = config.model
    assert shape is not None
    if config.image_size is not None:
        shape = replace(shape, image_size=(config.image_size, config.image_size))
    model: Model
    if not isinstance(shape, ViTConfig) and (config.dropout_rate or config.drop_path_rate):
        kind = "VT" if isinstance(shape, VTConfig) else "Perceiver"
        raise TrainError(f"a {kind} has no dropout and no stochastic depth: set both rates to 0.")
    if isinstance(shape, ImagePerceiverConfig):
        model = ImagePerceiver(replace(shape, num_classes=len(labels)))
        head = model.decoder.out
    elif isinstance(shape, VTConfig):
        model = VT(replace(shape, num_classes=len(labels)))
        head = model.head
    else:
        shape = replace(shape, dropout_rate=config.dropout_rate, drop_path_rate=config.drop_path_rate)
        model = ViT(replace(shape, num_classes=len(labels)))
        head = model.head
        if config.sincos_positions:
            table = sincos_2d(model.config.grid, model.config.embed_dim) * 0.1
            with torch.no_grad():
                model.pos_embed[:, model.config.num_positioned :].copy_(table)
    assert head is not None
    nn.init.constant_(head.bias, config.head_bias)
    preprocess = config.preprocess or PreprocessConfig(size=shape.image_size)
    if preprocess.image_size != shape.image_size:
        preprocess = preprocess_for(preprocess, shape.image_size)
    _prepare(model, config)
    return Built(model, preprocess, None)


def _prepare(model: Model, config: TrainConfig) -> None:
    if isinstance(model, VT):
        if config.method == "lora":
            raise TrainError("LoRA is for matrices of attention; a VT is mostly convolutions. Use --method finetune.")
        if config.gradient_checkpointing or any(phase.keep_tokens for phase in config.phases):
            raise TrainError(
                "a VT is trained without gradient_checkpointing and keep_tokens: its batch norms would see an image "
                "twice, and its tokens are few already."
            )
    elif isinstance(model, ViT):
        model.gradient_checkpointing = config.gradient_checkpointing
    else:
        model.encoder.gradient_checkpointing = config.gradient_checkpointing


# ── models, written ──────────────────────────────────────────────────────────────────────────────────────────────────


def _write_training(folder: Path, model: Model, preprocess: PreprocessConfig, labels: Labels, process: Process) -> None:
    """The model as it stands, whole, from however many shards; written by the main process."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        state = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
            for name, tensor in model.state_dict().items()
        }
        if process.is_main:
            plain = type(model)(model.config)  # type: ignore[arg-type]
            plain.load_state_dict(state)
            checkpoints.write_portable(folder, plain, preprocess, labels)
    elif process.is_main:
        plain = copy.deepcopy(model).cpu()
        merge(plain)
        checkpoints.write_portable(folder, plain, preprocess, labels)


def _judge(
    out: Path, summary: Summary, samples: Samples, val_rows: np.ndarray, device: torch.device,
    on_images: Callable[[int, int], None],
) -> Summary:  # fmt: skip
    """Score the best model by the public path, calibrate it, draw the pictures."""
    try:
        plots.curves(out / "curves.png", _read_lines(out / "metrics.jsonl"))
    except MissingExtra as error:
        log.warning("no curves.png: %s", error)
    if not len(val_rows):
        return summary
    classifier = load(out, device=str(device))
    predictions = evaluate.predict(classifier, samples, val_rows, on_batch=on_images)
    logits, targets = predictions.logits[predictions.ok], samples.targets[val_rows][predictions.ok]
    if not len(logits):
        raise TrainError(f"none of the held-out images can be read; the first: {predictions.errors[0].message}")
    temperature = 1.0
    if len(logits) >= MIN_CALIBRATION:
        temperature = evaluate.fit_temperature(logits, targets, multi_label=samples.labels.multi_label)
        evaluate.calibrate(classifier.model, temperature)
        checkpoints.write_portable(out, classifier.model, classifier.preprocess, samples.labels)
    metrics = evaluate.metrics(logits / temperature, targets, samples.labels)
    facts = {"model": str(out), "images": "held out", "temperature": temperature}
    evaluate.report(out, metrics, predictions, facts=facts)
    figures = {name: getattr(metrics, name) for name in ("top1", "top5", "mean_average_precision")}
    return replace(summary, **figures)


def _finished(out: Path, num_bad: int) -> Summary:
    figures = files.read_json(out / "evaluation.json")
    scores = {name: figures.get(name) for name in ("top1", "top5", "mean_average_precision")}
    return Summary(out, True, num_bad, **scores)


# ── probes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _probe(
    out: Path, config: TrainConfig, samples: Samples, rows: np.ndarray, val_rows: np.ndarray, process: Process,
    facts: Record, cache: Path | None, on_start: Callable[[Record], None], on_metrics: Callable[[Record], None],
    on_images: Callable[[int, int], None],
) -> Summary:  # fmt: skip
    """A linear head on frozen features: seen once by the model, then solved for."""
    if process.world > 1:
        raise TrainError("a probe runs in one process: start it without torchrun.")
    built = build(config, samples.labels)
    trained_params = sum(parameter.numel() for parameter in _head(built.model).parameters())
    on_start(facts | {"steps": config.steps, "step": 0, "trained_params": trained_params})
    (out / "metrics.jsonl").unlink(missing_ok=True)  # a probe that was cut begins again; its features are kept
    metrics = Metrics(out, on_metrics)
    history, errors = _set_head(built, config, samples, rows, process, cache, on_images, out)
    for record in history:
        metrics.add(record)
    metrics.close()
    for folder in (out, out / "last"):
        checkpoints.write_portable(folder, built.model, built.preprocess, samples.labels)
    return _judge(out, Summary(out, True, len(errors)), samples, val_rows, process.device, on_images)


def _set_head(
    built: Built, config: TrainConfig, samples: Samples, rows: np.ndarray, process: Process, cache: Path | None,
    on_images: Callable[[int, int], None], out: Path,
) -> tuple[list[Record], list[Bad]]:  # fmt: skip
    """Solve for the last layer of a model, nothing else; says how it went, and what could not be read."""
    labels, model = samples.labels, built.model
    assert built.source is not None
    classifier = Classifier(Checkpoint(model, built.preprocess, labels, built.source), device=str(process.device))
    found = probe.extract(
        classifier, samples, rows, cache=cache, batch_size=min(config.batch_size, 256), on_batch=on_images
    )
    bad = [Bad(*error) for error in found.errors]
    if bad and process.is_main:
        _write_bad(out, bad)
    check_bad(bad, len(rows), config.max_bad)
    x, y = found.features[found.ok], samples.targets[rows][found.ok]
    if config.method == "fewshot":
        weight, bias = probe.fewshot_weights(x, y, len(labels))
        logits = torch.as_tensor(x) @ torch.as_tensor(weight).T + torch.as_tensor(bias)
        loss = evaluate.metrics(logits.numpy(), y, labels).loss
        history: list[Record] = [{"step": 1, "loss": loss}]
    else:
        steps = config.steps if config.steps is not None or config.epochs is None else max(round(config.epochs), 1)
        result = probe.probe(
            x,
            y,
            len(labels),
            multi_label=labels.multi_label,
            class_weights=config.class_weights,
            seed=config.seed,
            max_iter=steps if config.method == "probe" else None,
            lr=config.lr if config.method == "probe" else 1.0,
        )
        weight, bias, history = result.weight, result.bias, result.history
        if config.method == "probe":
            facts = {"solver": result.method, "l2": result.l2, "cv_accuracy": result.cv_accuracy, "tried": result.table}
            files.write_json(out / "probe.json", facts)
    head = _head(model)
    halves = 2 if isinstance(model, ViT) and model.head_dist is not None else 1  # logits are the mean of two heads
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight) * halves)
        head.bias.copy_(torch.as_tensor(bias) * halves)
    return history, bad


def _head(model: Model) -> nn.Linear:
    head = model.decoder.out if isinstance(model, ImagePerceiver) else model.head
    assert head is not None
    return head


# ── what a run writes down ───────────────────────────────────────────────────────────────────────────────────────────


class Metrics:
    """metrics.jsonl, a line a record; TensorBoard, and wandb where its environment asks for it."""

    def __init__(self, out: Path, on_metrics: Callable[[Record], None]) -> None:
        self.path, self.on_metrics = out / "metrics.jsonl", on_metrics
        self.board: Any = None
        self.wandb: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass  # comes with the extra "train"; the figures are in metrics.jsonl all the same
        else:
            self.board = SummaryWriter(str(out / "tensorboard"))
        if any(name in os.environ for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE")):
            try:
                import wandb  # type: ignore[import-not-found]
            except ImportError:
                log.warning("WANDB_… is set, and wandb is not installed: pip install wandb")
            else:
                wandb.init(dir=str(out), name=str(out), resume="allow")
                self.wandb = wandb

    def forget_after(self, step: int) -> None:
        """Drop the lines behind the state that the run goes on from: they will be written again."""
        if self.path.exists():
            lines = [line for line in _read_lines(self.path) if line["step"] <= step]
            with files.replacing(self.path) as part:
                part.write_text("".join(f"{json_line(line)}\n" for line in lines), encoding="utf-8")

    def add(self, record: Record) -> None:
        _append(self.path, [record])
        for name, value in record.items():
            if self.board and name != "step" and isinstance(value, int | float):
                self.board.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        self.on_metrics(record)

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _read_lines(path: Path) -> list[Record]:
    """The records of a file of JSON lines; a last one that was cut off while it was written is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _write_bad(out: Path, bad: Sequence[Bad]) -> None:
    with files.replacing(out / "bad_images.jsonl") as part:
        part.write_text("".join(f"{json_line(asdict(each))}\n" for each in bad), encoding="utf-8")


def _append(path: Path, records: Sequence[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json_line(record)}\n" for record in records))


def _check_identity(out: Path, samples: Samples, process: Process) -> None:
    """The data of a run that goes on are those it began with."""
    path, identity = out / "data.json", samples.identity()
    if path.exists():
        before = files.read_json(path).get("identity")
        if before != identity:
            raise TrainError(
                f"the data are not those that {out} began with: files were added, removed or changed. "
                "Put them back, or begin a new run."
            )
    elif process.is_main:
        classes = [samples.labels.name(i) for i in range(len(samples.labels))]
        files.write_json(path, {"identity": identity, "images": len(samples), "classes": classes})


def _write_environment(out: Path, process: Process) -> None:
    cuda = process.device.type == "cuda"
    facts = {
        "opsin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(process.device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": process.world,
        "command": sys.argv,
    }
    files.write_json(out / "environment.json", facts)
