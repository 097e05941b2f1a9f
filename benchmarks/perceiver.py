"""The published Perceivers against transformers, same random weights: peak memory, each in a process of its own.

python benchmarks/perceiver.py            # wants transformers; for time see models.py
"""

import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opsin.bench import import_library

SHARED: dict[str, Any] = {
    "num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6,
    "num_self_attention_heads": 8, "num_cross_attention_heads": 1, "num_labels": 1000,
}  # fmt: skip
MODELS = {
    "conv": ("PerceiverForImageClassificationConvProcessing", {"d_model": 322}),
    "fourier": ("PerceiverForImageClassificationFourier", {"d_model": 261}),
    "learned": ("PerceiverForImageClassificationLearned", {"d_model": 512, "image_size": 224}),
}


def transformers_class(name: str) -> Any:
    transformers = import_library("transformers")
    return getattr(transformers, MODELS[name][0])


def save(name: str, folder: Path) -> None:
    """A folder as transformers leaves it, random weights."""
    kind = transformers_class(name)
    torch.manual_seed(0)
    kind(kind.config_class(**SHARED, **MODELS[name][1])).save_pretrained(folder)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak(threading.Thread):
    """Largest resident size while it runs, looked at every half millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.stopped = 0, False

    def run(self) -> None:
        while not self.stopped:
            self.bytes = max(self.bytes, resident())
            time.sleep(0.0005)


def run_memory(name: str, who: str, folder: Path) -> None:
    """Prints the peak of the whole process, and what the forward pass added to what was there before it."""
    model: Callable[[torch.Tensor], Any]
    if who == "opsin":
        import opsin

        model = theirs = opsin.load(folder, dtype="fp32").model
    else:
        theirs = transformers_class(name).from_pretrained(folder).eval()

        def model(pixels: torch.Tensor) -> Any:
            return theirs(inputs=pixels).logits

    with torch.inference_mode():
        for parameter in theirs.parameters():  # mapped from disk, and in memory once they are looked at
            parameter.sum()
        pixels = torch.randn(1, 3, 224, 224)
        peak = Peak()
        before = resident()
        peak.start()
        model(pixels)
        peak.stopped = True
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak
    whole = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(whole, peak.bytes - before)


def main() -> None:
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in MODELS}
        for name, folder in folders.items():
            save(name, folder)
        print("peak memory, batch 1: the whole process, and what the forward pass adds to it")
        for name, folder in folders.items():
            peaks = {}
            for who in ("opsin", "transformers"):
                command = [sys.executable, __file__, "memory", name, who, str(folder)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peaks[who] = [int(number) / 1e6 for number in output.split()]
                print(f"  {name:8} {who:13} {peaks[who][0]:6.0f} MB  {peaks[who][1]:6.0f} MB")
            whole, added = (peaks["opsin"][i] / peaks["transformers"][i] for i in (0, 1))
            print(f"  {name:8} ratio         {whole:6.2f}     {added:6.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        run_memory(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        main()
