"""What a recipe returns: one frozen object that says everything about a run."""

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from opsin.models.perceiver_io import ImagePerceiverConfig
from opsin.models.vit import ViTConfig
from opsin.models.vt import VTConfig
from opsin.preprocess import PreprocessConfig

Method = Literal["pretrain", "finetune", "lora", "probe", "fewshot"]
OptimizerName = Literal["sgd", "adam", "adamw", "lamb", "muon"]
Schedule = Literal["cosine", "linear", "constant", "flat_cosine", "step"]
Loss = Literal["softmax", "sigmoid"]
Precision = Literal["fp32", "bf16", "fp16"]
Strategy = Literal["ddp", "fsdp"]
CropBy = Literal["area", "side"]
ModelConfig = ViTConfig | VTConfig | ImagePerceiverConfig

SHAPES: dict[str, type[ModelConfig]] = {"vit": ViTConfig, "vt": VTConfig, "perceiver": ImagePerceiverConfig}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of a run on smaller pictures: short sequences first is most of the training for a part of the cost."""

    share: float  # of the run's steps
    image_size: int  # pixels
    keep_tokens: int | None = None  # of the patch tokens, drawn per image; None: all (Liu et al. 2023, PatchDropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A run, whole. What is None is taken from the model, the data or another field, as its comment says."""

    method: Method = "finetune"
    # ── model
    init: str | None = None  # a name that `opsin.load` takes; None: random weights, and `model` says the shape
    model: ModelConfig | None = None  # None: the shape of `init`
    preprocess: PreprocessConfig | None = None  # of evaluation and of the trained model; None: that of `init`
    image_size: int | None = None  # pixels; None: the model's
    sincos_positions: bool = False  # learned positions begin as sine and cosine, times 0.1
    probe_head: bool = False  # begin with the head that a linear probe finds (Kumar et al. 2022, LP-FT), not with zeros
    head_bias: float = 0.0  # of a new head; −10 makes 21,843 sigmoids begin near zero
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0  # stochastic depth of the last layer; grows linearly from 0
    lora_rank: int = 8
    lora_alpha: float = 16.0
    # ── data
    num_images: int | None = None  # of the data that the recipe is for: what a dry run without data counts with
    holdout: float = 0.1  # share of each class to validate on, where the data has no division of its own
    min_crop_area: float = 0.05  # Inception crop: share of the image, at least; 1: no crop, as in evaluation
    crop_by: CropBy = "area"  # what is drawn uniformly: area and aspect (torchvision), or the height (TensorFlow)
    flip_rate: float = 0.5
    rand_augment: tuple[int, int] | None = None  # (layers, magnitude 0–30)
    auto_augment: bool = False
    erase_rate: float = 0.0
    mixup: float = 0.0  # α of the Beta distribution; 0: off
    cutmix: float = 0.0
    max_bad: float | None = None  # share of images that may be unreadable before the run stops; None: 1 %, or 5 images
    # ── loss
    loss: Loss = "softmax"
    label_smoothing: float = 0.0
    class_weights: bool = False  # of each class, inverse to its number of images
    teacher: str | None = None  # distillation: a name that `opsin.load` takes
    distillation: Literal["hard", "soft"] = "hard"
    distillation_weight: float = 0.5  # of the teacher's part in the loss
    distillation_temperature: float = 3.0  # soft only
    # ── optimiser
    optimizer: OptimizerName = "sgd"
    lr: float = 0.01  # of the whole batch
    muon_lr: float = 3e-3  # muon: of the layers' matrices; `lr` is then AdamW's, of everything else
    momentum: float = 0.9  # sgd
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled, times the learning rate
    decay_all: bool = False  # also norms, biases, positions and class token, as the JAX release does
    decay_positions: bool = False  # also positions, latents and class token, but no norm and no bias: Perceiver
    layer_decay: float = 1.0  # learning rate of a layer, relative to the one above it
    clip_norm: float | None = 1.0
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    end_lr: float = 0.0
    flat_share: float = 0.5  # flat_cosine: share of the steps at the full learning rate
    # ── run
    epochs: float | None = None  # either this
    steps: int | None = None  # or that; of a probe: iterations of its solver
    batch_size: int = 512
    micro_batch_size: int | None = None  # images at once on a device; None: the whole batch's share of it
    phases: tuple[Phase, ...] = ()  # in order, before the rest of the run at `image_size`
    precision: Precision = "bf16"
    ema_decay: float | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    strategy: Strategy = "ddp"
    seed: int = 0
    log_every: int = 20  # steps
    eval_every: int | None = None  # steps; None: ten times a run
    save_every: int | None = None  # steps; None: as `eval_every`
    workers: int | None = None  # processes that read images; None: as many as cores, on a CPU half

    def __post_init__(self) -> None:
        for name in ("method", "loss", "optimizer", "schedule", "precision", "strategy", "distillation", "crop_by"):
            known = get_args(get_type_hints(TrainConfig)[name])
            if getattr(self, name) not in known:
                raise ValueError(f'{name} is "{getattr(self, name)}". Known: {", ".join(known)}.')
        if self.init is None and self.model is None:
            raise ValueError("neither init nor model is set: name a checkpoint, or give the shape of a new model.")
        if (self.epochs is None) == (self.steps is None) and self.method in ("pretrain", "finetune", "lora"):
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; give one of them.")
        positive = ("batch_size", "lr", "log_every", "lora_rank", "epochs", "steps", "micro_batch_size", "image_size")
        for name in (*positive, "num_images", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be more than 0.")
        rates = ("holdout", "flip_rate", "erase_rate", "max_bad", "label_smoothing", "dropout_rate", "drop_path_rate")
        for name in (*rates, "distillation_weight", "flat_share"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        for name in (
            "lr",
            "muon_lr",
            "weight_decay",
            "mixup",
            "cutmix",
            "momentum",
            "eps",
            "end_lr",
            "seed",
            "lora_alpha",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number from 0 on.")
        if self.epochs is not None and not math.isfinite(self.epochs):
            raise ValueError(f"epochs is {self.epochs}; it must be a finite number.")
        if self.holdout > 0.5:
            raise ValueError(f"holdout is {self.holdout}; at most half of the images can be held out.")
        if self.rand_augment is not None and (len(self.rand_augment) != 2 or not 0 <= self.rand_augment[1] <= 30):
            raise ValueError(f"rand_augment is {self.rand_augment}; it is (layers, magnitude from 0 to 30).")
        if self.method in ("probe", "fewshot") and self.init is None:
            raise ValueError(f"method {self.method} needs a trained model: --model NAME.")
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(f"min_crop_area is {self.min_crop_area}; it is a share of the image, above 0, up to 1.")
        if sum(phase.share for phase in self.phases) > 1 + 1e-9:
            raise ValueError(f"the phases' shares sum to {sum(phase.share for phase in self.phases)}, more than 1.")
        if self.method == "lora" and self.strategy == "fsdp":
            raise ValueError('lora trains few weights, which strategy "fsdp" would not share out. Use "ddp".')
        if self.precision == "fp16" and self.strategy == "fsdp":
            raise ValueError('fp16 needs a scaled loss, which strategy "fsdp" does not have here. Use "bf16".')
        if self.rand_augment and self.auto_augment:
            raise ValueError("rand_augment and auto_augment are both set; choose one.")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """As JSON has it; `from_dict` is the inverse. The model's shape says which kind it is."""
    data = dataclasses.asdict(config)
    if config.model is not None:
        data["model"]["architecture"] = next(name for name, kind in SHAPES.items() if type(config.model) is kind)
    return data


def from_dict(data: dict[str, Any]) -> TrainConfig:
    """
    Raises:
        TypeError, ValueError: unknown fields, or values out of range.
    """
    fields = dict(data)
    if (model := fields.get("model")) is not None:
        model = dict(model)
        kind = SHAPES[model.pop("architecture")]
        fields["model"] = kind(**{name: _tuple(value) for name, value in model.items()})
    if (preprocess := fields.get("preprocess")) is not None:
        fields["preprocess"] = PreprocessConfig.from_spec({n: _tuple(v) for n, v in preprocess.items()})
    fields["phases"] = tuple(Phase(**phase) for phase in fields.get("phases", ()))
    return TrainConfig(**{name: _tuple(value) for name, value in fields.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def with_settings(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """`key=value` texts applied to a config: a value is JSON, or text; `model.num_layers=4` reaches into the shape.

    Raises:
        ValueError: an unknown key, with the nearest known; no "=", or a value of the wrong kind.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f'"{setting}" is no setting. Write key=value, for example weight_decay=0.05.')
        try:
            value = _tuple(json.loads(text))
        except ValueError:
            value = text
        if key == "phases" and isinstance(value, tuple):
            try:
                value = tuple(Phase(**phase) for phase in value)
            except TypeError as error:
                raise ValueError(
                    f'phases is {text}; it is [{{"share": 0.5, "image_size": 48}}, …]: {error}.'
                ) from error
        config = _with(config, key, key.split("."), value)
    return config


def _with(part: Any, key: str, path: list[str], value: Any) -> Any:
    known = {field.name for field in dataclasses.fields(part)}
    if path[0] not in known:
        near = difflib.get_close_matches(path[0], known, 1)
        hint = f'Did you mean "{near[0]}"?' if near else f"Known: {', '.join(sorted(known))}."
        raise ValueError(f'no setting "{key}". {hint}')
    if len(path) > 1:
        inner = getattr(part, path[0])
        if not dataclasses.is_dataclass(inner):
            raise ValueError(f'no setting "{key}": {path[0]} is {inner!r} and has no parts.')
        value = _with(inner, key, path[1:], value)
    elif isinstance(value, bool) != isinstance(getattr(part, path[0]), bool) and value is not None:
        raise ValueError(f"{key} is {getattr(part, path[0])!r} and cannot become {value!r}.")
    elif isinstance(getattr(part, path[0]), int | float) and not isinstance(value, int | float | None):
        raise ValueError(f"{key} is {getattr(part, path[0])!r}, a number, and cannot become {value!r}.")
    try:
        return dataclasses.replace(part, **{path[0]: value})
    except TypeError as error:
        raise ValueError(f"{key} cannot be {value!r}: {error}.") from error
