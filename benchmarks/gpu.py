"""ViT-B/16, ViT-L/16 and Perceiver conv on a GPU, beside transformers and timm; and from JPEG bytes to labels.

python benchmarks/gpu.py OUT [--only NAME …] [--data DATA]      # wants an H100 and opsin[bench]; ten minutes a model

Same random weights for all. At each batch size all take turns in one process; the median counts, and the best batch
size is shown. Into OUT goes a JSON file for each name: ViT-B-16, ViT-L-16, Perceiver-conv, folder (the way from JPEG
bytes, and what bounds it) and, with DATA, embedded: the agreement of the trained models with fp32 on the held-out
images of `benchmarks/embedded.py`, which no training saw.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import opsin
from opsin import checkpoints
from opsin.bench import compare, flops_of, import_library, interleaved, machine
from opsin.checkpoints import rules
from opsin.checkpoints import timm as timm_names
from opsin.device import exact_fp32
from opsin.engine import cuda
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

MODELS: dict[str, Any] = {
    "ViT-B-16": ViTConfig(),
    "ViT-L-16": ViTConfig(embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096),
    "Perceiver-conv": ImagePerceiverConfig(numerics="transformers"),  # or theirs is another model
}
PRECISIONS: tuple[cuda.CudaPrecision, ...] = ("bf16", "fp16", "fp8")
BATCHES = (512, 256, 128)  # the largest first: opsin compiles once, for what it then sees
ROUNDS = 10
SIDE = 8192  # of the square matrices whose product is the peak
PHOTOS, PHOTO_SIZE = 8192, (480, 640)  # (H, W)

Net = Callable[[Tensor], Tensor]


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model: nn.Module = ViT(config) if isinstance(config, ViTConfig) else ImagePerceiver(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a head begins at zero, and so would all logits be
                parameter.normal_(std=0.02)
    return model.eval()


def finished(run: Callable[[], object], device: torch.device) -> None:
    """Run, and wait for the GPU."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(run: Callable[[], object], count: int) -> bool:
    for _ in range(count):
        run()
    return True


# ── the model alone ──────────────────────────────────────────────────────────────────────────────────────────────────


def transformers_net(model: Any, device: torch.device) -> Any:
    """bf16; its attention is SDPA where it has that: its Perceiver has not."""
    transformers = import_library("transformers")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_hf(Path(folder), model, None, None)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = theirs.eval().to(device)
    return lambda pixels: theirs(pixels).logits


def timm_net(model: Any, device: torch.device) -> Any:
    """bf16, SDPA."""
    import_library("timm")
    from timm.models.vision_transformer import VisionTransformer

    c: ViTConfig = model.config
    theirs = VisionTransformer(
        img_size=c.image_size,
        patch_size=c.patch_size,
        num_classes=c.num_classes,
        embed_dim=c.embed_dim,
        depth=c.num_layers,
        num_heads=c.num_heads,
        mlp_ratio=c.mlp_dim / c.embed_dim,
    )
    theirs.load_state_dict(rules.invert(model.state_dict(), timm_names.rules(c), c))
    return theirs.to(device, torch.bfloat16).eval()


def compiled(make: Callable[[Any, torch.device], Net], model: Any, device: torch.device) -> Net:
    return torch.compile(make(model, device), mode="reduce-overhead")  # CUDA graphs too


def contenders(model: Any, device: torch.device) -> dict[str, tuple[str, Callable[[], Net]]]:
    """Name → precision, and what makes it."""
    made: dict[str, tuple[str, Callable[[], Net]]] = {}
    for precision in PRECISIONS:
        made[f"opsin {precision}"] = precision, partial(cuda.pack, model, precision, device)
    libraries = {"transformers": transformers_net} | ({"timm": timm_net} if isinstance(model, ViT) else {})
    for name, make in libraries.items():
        made[name] = "bf16", partial(make, model, device)
        made[f"{name} compiled"] = "bf16", partial(compiled, make, model, device)
    return made


def product(precision: str, device: torch.device) -> Callable[[], object]:
    """The matrix product that a precision's peak is measured by."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    if precision == "fp8":
        one = torch.ones(SIDE, 1, device=device)
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        return partial(torch._scaled_mm, a, b, one, one.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return partial(torch.mm, a.to(cuda.DTYPES[precision]), b.to(cuda.DTYPES[precision]).t())


def allocated(device: torch.device, *, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def attempt(call: Callable[[], Any], what: str) -> Any:
    """Its result; None, and a line that says why, where it fails: the others go on."""
    try:
        return call()
    except Exception as error:  # of any library
        lines = str(error).splitlines()
        print(f"{what} is left out: {type(error).__name__}: {lines[0] if lines else ''}", flush=True)
        return None


def measure(config: Any, device: torch.device) -> dict[str, Any]:
    """Every contender at its best batch size, and at all."""
    model = random_model(config)
    flops = flops_of(model, config.image_size)
    nets: dict[str, Net] = {}
    precisions: dict[str, str] = {}
    weights: dict[str, int] = {}
    for name, (precision, make) in contenders(model, device).items():
        before = allocated(device)
        if (net := attempt(make, name)) is not None:
            nets[name], precisions[name], weights[name] = net, precision, allocated(device) - before
    products: dict[str, Callable[[], object]] = {}
    for precision in dict.fromkeys(precisions.values()):
        if (run := attempt(partial(product, precision, device), f"the peak of {precision}")) is not None:
            products[precision] = run

    with torch.inference_mode():
        rows, peaks = take_turns(nets, precisions, weights, products, config.image_size, device)
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        peak = peaks.get(row["precision"])
        row["peak_share"] = None if peak is None else row["images_per_s"] * flops / peak
        best[row["name"]] = max(best.get(row["name"], row), row, key=lambda row: row["images_per_s"])

    def in_its_type(name: str, pixels: Tensor) -> Tensor:
        return nets[name](pixels.to(cuda.DTYPES[precisions[name]]))

    exact: dict[str, Net] = {"fp32": cuda.pack(model, "fp32", device)}
    batches = list(torch.randn(64, 3, *config.image_size, device=device).split(32))
    with torch.inference_mode(), exact_fp32(device):
        compared = compare(exact | {name: partial(in_its_type, name) for name in best}, "fp32", batches, 64)
    for name, row in best.items():
        row["drift_relative"] = compared[name].drift_relative
    return {
        "gflops": flops / 1e9,
        "peaks_tflops": {precision: peak / 1e12 for precision, peak in peaks.items()},
        "best": list(best.values()),
        "all": rows,
    }


def take_turns(
    nets: dict[str, Net],
    precisions: dict[str, str],
    weights: dict[str, int],
    products: dict[str, Callable[[], object]],
    image_size: tuple[int, int],
    device: torch.device,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each net and batch size; precision → FLOP/s of its product, the best that was seen."""
    rows: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    for batch_size in BATCHES:
        noise = torch.randn(batch_size, 3, *image_size, device=device)
        calls: dict[Any, Callable[[], object]] = {}
        memory: dict[str, int] = {}
        for name, net in nets.items():
            call = partial(finished, partial(net, noise.to(cuda.DTYPES[precisions[name]])), device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            before = allocated(device)
            if attempt(partial(times, call, 3), f"{name} at batch {batch_size}"):
                calls[name], memory[name] = call, weights[name] + allocated(device, peak=True) - before
        for precision, run in products.items():
            calls["peak", precision] = partial(finished, run, device)
        seconds = interleaved(calls, ROUNDS)
        for precision in products:
            rate = 2 * SIDE**3 / statistics.median(seconds["peak", precision])
            peaks[precision] = max(rate, peaks.get(precision, 0.0))
        for name in memory:
            first, middle, last = np.quantile([batch_size / turn for turn in seconds[name]], [0.25, 0.5, 0.75])
            rows.append(
                {"name": name, "precision": precisions[name], "batch_size": batch_size, "images_per_s": float(middle),
                 "images_per_s_quartiles": (float(first), float(last)), "memory_bytes": memory[name]}
            )  # fmt: skip
    return rows, peaks


def show(report: dict[str, Any]) -> None:
    peaks = ", ".join(f"{name} {rate:,.0f}" for name, rate in report["peaks_tflops"].items())
    print(f"{report['gflops']:.1f} GFLOP an image; TFLOP/s of a product of {SIDE}² matrices: {peaks}")
    print(f"{'':24} {'batch':>5} {'images/s':>10} {'of peak':>8} {'memory':>9} {'drift / σ':>10}")
    for row in report["best"]:
        share = "" if row["peak_share"] is None else f"{row['peak_share']:.1%}"
        print(
            f"{row['name']:24} {row['batch_size']:5} {row['images_per_s']:10,.0f} {share:>8} "
            f"{row['memory_bytes'] / 1e9:6.2f} GB {row['drift_relative']:10.2e}",
            flush=True,
        )


# ── trained models ───────────────────────────────────────────────────────────────────────────────────────────────────


def agreement(name: str, images: Sequence[bytes], device: torch.device) -> dict[str, Any]:
    """Precision → share of the images that keep their best label, and the largest change of a logit."""
    classifier = opsin.load(name, dtype="fp32", device="cpu")
    upload = cuda.Uploader(classifier.preprocess, device)
    resized = [classifier.preprocess.load(image)[0] for image in images]
    batches = [upload(resized[start : start + 256]) for start in range(0, len(resized), 256)]
    nets = {p: cuda.pack(classifier.model, p, device) for p in ("fp32", *PRECISIONS)}
    with exact_fp32(device):
        compared = compare(nets, "fp32", batches, len(images))
    return {precision: found._asdict() for precision, found in compared.items()}


# ── from JPEG bytes ──────────────────────────────────────────────────────────────────────────────────────────────────


def photos(count: int, size: tuple[int, int]) -> list[bytes]:
    """JPEG files of smooth shapes under a little noise: about as many bits a pixel as a photo has."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 6, (*size, 1))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def decode_all(pool: ThreadPoolExecutor, load: Callable[[bytes], Any], files: Sequence[bytes]) -> None:
    deque(pool.map(load, files), maxlen=0)


def folder(config: Any, device: torch.device) -> dict[str, Any]:
    """Images/s of each stage alone and of all at once, decoding on all cores beside the GPU."""
    torch.set_num_threads(1)  # of one decoding thread
    cores = len(os.sched_getaffinity(0))
    batch_size = BATCHES[0]
    count = max(PHOTOS // batch_size, 2) * batch_size
    some = photos(min(64, count), PHOTO_SIZE)
    files = [some[i % len(some)] for i in range(count)]
    preprocess = PreprocessConfig(size=config.image_size)
    net = cuda.pack(random_model(config), "bf16", device)
    upload = cuda.Uploader(preprocess, device, torch.bfloat16)

    def rate(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            finished(run, device)
            seconds.append(time.perf_counter() - start)
        return count / statistics.median(seconds[1:])  # the first warms up

    report: dict[str, Any] = {"batch_size": batch_size, "images": count, "threads": cores}
    report["bytes_per_file"] = sum(map(len, some)) / len(some)
    with ThreadPoolExecutor(cores) as pool:
        batch = [pixels for pixels, _ in pool.map(preprocess.load, files[:batch_size])]
        pixels = upload(batch)
        model_rate = rate(partial(times, partial(net, pixels), count // batch_size))
        upload_rate = rate(partial(times, partial(upload, batch), count // batch_size))
        kinds: tuple[Literal["exact", "fast"], ...] = ("exact", "fast")
        for kind in kinds:
            load = partial(preprocess.load, decode=kind)

            def whole(load: Callable[[bytes], Any] = load) -> None:
                waiting: deque[Any] = deque()
                running: Tensor | None = None
                source = iter(files)
                for _ in range(count // batch_size):
                    while len(waiting) < 3 * batch_size and (file := next(source, None)) is not None:
                        waiting.append(pool.submit(load, file))
                    ready = net(upload([waiting.popleft().result()[0] for _ in range(batch_size)])).argmax(dim=1)
                    if running is not None:
                        running.cpu()  # of the batch before: the GPU has the next one already
                    running = ready
                assert running is not None
                running.cpu()

            parts = {"decode": rate(partial(decode_all, pool, load, files))}
            parts |= {"upload": upload_rate, "model": model_rate}
            report[kind] = parts | {"whole": rate(whole), "bound_by": min(parts, key=parts.__getitem__)}
    return report


def show_folder(report: dict[str, Any]) -> None:
    height, width = PHOTO_SIZE
    print(f"JPEGs of {width}×{height}, {report['bytes_per_file'] / 1e3:.0f} kB, {report['threads']} threads; images/s")
    print(f"{'decode':8} {'decode':>10} {'upload':>10} {'model':>10} {'whole':>10}")
    for kind in ("exact", "fast"):
        rates = " ".join(f"{report[kind][part]:10,.0f}" for part in ("decode", "upload", "model", "whole"))
        print(f"{kind:8} {rates}   bound by: {report[kind]['bound_by']}", flush=True)


# ── command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hardware(device: torch.device) -> dict[str, Any]:
    facts = machine(("transformers", "timm"))
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    facts["commit"] = done.stdout.strip() or None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def run(name: str, data: Path | None, device: torch.device) -> dict[str, Any]:
    print(f"\n{name}")
    if name == "folder":
        report = folder(MODELS["ViT-B-16"], device)
        show_folder(report)
    elif name == "embedded":
        from embedded import NAMES, held_out

        assert data is not None
        images = [image for _, image in held_out(data)]
        report = {model: agreement(model, images, device) for model in NAMES}
        for model, found in report.items():
            for precision, row in found.items():
                print(f"{model:24} {precision}  agreement {row['agreement']:.2%}  drift {row['drift']:.3g}")
    else:
        report = measure(MODELS[name], device)
        show(report)
    return {"name": name, **report, "machine": hardware(device)}


def main() -> None:
    names = [*MODELS, "folder", "embedded"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--data", type=Path, help="folder with the Tiny-ImageNet shards")
    arguments = parser.parse_args()
    chosen = arguments.only or [name for name in names if name != "embedded" or arguments.data]
    if "embedded" in chosen and arguments.data is None:
        parser.error("embedded needs --data.")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures a GPU, and torch sees none here. Run it on a machine that has one.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        report = run(name, arguments.data, torch.device("cuda"))
        (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
