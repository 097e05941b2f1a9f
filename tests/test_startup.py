"""What `opsin classify photo.jpg --model FOLDER` brings into a fresh process. Times: benchmarks/startup.py."""

import json
import subprocess
import sys
from pathlib import Path

from opsin import checkpoints
from opsin.checkpoints import Checkpoint

HEAVY = {
    # of torch, what compiles; each takes from a quarter of a second to several
    "torch._dynamo", "torch._inductor", "torch.onnx", "sympy",
    # the network, a terminal's bars and tables, result files, plots
    "huggingface_hub", "httpx", "requests", "rich", "tqdm.auto", "pyarrow", "pandas", "matplotlib",
    # other engines and libraries of models
    "openvino", "nncf", "onnx", "onnxruntime", "transformers", "timm", "torchvision", "scipy", "sklearn", "av",
    # other tasks of ours
    "opsin.text", "opsin.flow", "opsin.video", "opsin.evaluate", "opsin.doctor", "opsin.train.run", "opsin.plots",
    "opsin.checkpoints.hub",
}  # fmt: skip

PROGRAM = """
import sys
from opsin.cli import main
try:
    main(sys.argv[1:], prog_name="opsin")
finally:
    print(*sys.modules, file=sys.stderr)
"""


def test_one_photo_by_a_local_folder_imports_nothing_heavy(
    noisy_checkpoint: Checkpoint, photos: Path, tmp_path: Path
) -> None:
    checkpoints.write(tmp_path, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    command = [sys.executable, "-c", PROGRAM, "classify", str(photos / "rocket.jpg"), "--model", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["ok"]
    modules = set(done.stderr.splitlines()[-1].split())
    assert {"torch", "PIL.Image", "opsin.pipeline"} <= modules
    assert not HEAVY & modules
