"""Start-up, in fresh processes. `import opsin` and `opsin --help` must answer in under 0.3 s. One photo through
ViT-B/16 from a folder (random weights, as `save_pretrained` leaves them) is held against the transformers scripts that
do the same.

python benchmarks/startup.py [ROUNDS]      # 7 without it; transformers installed, Linux or macOS

Contenders run in turn, so that each round sees the same machine. Wall and CPU seconds are those of the whole process,
exit included; the peak is that of its resident memory, mapped files included. Ratios are medians over the rounds.
"""

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "photos" / "rocket.jpg"

LIGHT = {
    "python -c pass": ["-c", "pass"],
    "import opsin": ["-c", "import opsin"],
    "opsin --help": ["-m", "opsin", "--help"],
    "opsin models": ["-m", "opsin", "models"],
    "import torch": ["-c", "import torch"],
}

# in processes of their own: what this one held at its largest would count as the peak of those it starts
MAKE = """
import sys, torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
torch.manual_seed(0)
ViTForImageClassification(ViTConfig(num_labels=1000)).save_pretrained(sys.argv[1])
ViTImageProcessor().save_pretrained(sys.argv[1])
"""
PIPELINE = """
import sys
from transformers import pipeline
print(pipeline("image-classification", model=sys.argv[1])(sys.argv[2]))
"""
BY_HAND = """
import sys, torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor
processor = ViTImageProcessor.from_pretrained(sys.argv[1])
model = ViTForImageClassification.from_pretrained(sys.argv[1])
with torch.inference_mode():
    logits = model(**processor(Image.open(sys.argv[2]).convert("RGB"), return_tensors="pt")).logits
scores, classes = logits.softmax(-1)[0].topk(5)
print([(model.config.id2label[i], score) for i, score in zip(classes.tolist(), scores.tolist())])
"""
HIDE = 'import sys; sys.modules["torchvision"] = None\n'
REFERENCE = "transformers pipeline"


def hidden() -> str:
    """A torchvision built for another torch is as good as none, and transformers faster to start without it."""
    if importlib.util.find_spec("torchvision") is None:
        return ""
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False)
    return HIDE if tried.returncode else ""


def run(arguments: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak MB of `python arguments`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said.decode())
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, KiB on Linux
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6


def table(contenders: dict[str, list[str]], rounds: int, reference: str) -> None:
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    for arguments in contenders.values():
        run(arguments)  # files into the system's cache
    for _ in range(rounds):
        for name, arguments in contenders.items():
            figures[name].append(run(arguments))
    print(f"{'':22}  wall s (spread)       CPU s  peak MB    less wall  less CPU  of its peak")
    for name, rows in figures.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        pairs = list(zip(figures[reference], rows, strict=True))
        ratios = [statistics.median(base[i] / own[i] for base, own in pairs) for i in range(3)]
        spread = f"({min(row[0] for row in rows):.2f}-{max(row[0] for row in rows):.2f})"
        print(
            f"{name:22} {wall:7.3f} {spread:13} {cpu:6.2f} {peak:8.0f}   "
            f"{ratios[0]:8.2f}× {ratios[1]:8.2f}× {1 / ratios[2]:8.2f}"
        )


def main(rounds: int) -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    table(LIGHT, rounds, "import torch")
    hide = hidden()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", hide + MAKE, folder], check=True, capture_output=True)
        ours = ["-m", "opsin", "classify", str(PHOTO), "--model", folder]
        contenders = {
            REFERENCE: ["-c", hide + PIPELINE, folder, str(PHOTO)],
            "transformers by hand": ["-c", hide + BY_HAND, folder, str(PHOTO)],
            "opsin": ours,
            "opsin --dtype bf16": [*ours, "--dtype", "bf16"],
            "opsin --dtype fp32": [*ours, "--dtype", "fp32"],
        }
        print(f"\none photo, ViT-B/16 from a folder{', transformers without torchvision' if hide else ''}")
        table(contenders, rounds, REFERENCE)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
