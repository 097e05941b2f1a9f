"""Two processes give what one gives: DDP, FSDP2, and a run that is killed and goes on. Real processes, by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opsin.checkpoints.files import read_tensors

SHAPE = [
    "model.image_size=[16,16]", "model.patch_size=4", "model.embed_dim=24", "model.num_layers=2", "model.num_heads=2",
    "model.mlp_dim=40", "phases=[]", "precision=fp32", "optimizer=adamw", "warmup_steps=2", "log_every=1",
    "eval_every=6", "save_every=2", "image_size=16", "ema_decay=0.9",
]  # fmt: skip


def command(photos: Path, out: Path, *more: str, world: int = 1) -> list[str]:
    settings = [part for setting in SHAPE for part in ("--set", setting)]
    options = ["--method", "pretrain", "--steps", "12", "--batch-size", "6", "--lr", "3e-3", "--workers", "0"]
    head = [sys.executable, "-m"]
    if world > 1:
        head += ["torch.distributed.run", f"--nproc-per-node={world}", "--standalone", "-m"]
    return [*head, "opsin", "train", str(photos), "--out", str(out), *options, *settings, *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "last" / "model.safetensors")


@pytest.fixture
def alone(photo_folder: Path, tmp_path: Path) -> Path:
    run(command(photo_folder, tmp_path / "alone"))
    return tmp_path / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_whole_batch(strategy: str, photo_folder: Path, tmp_path: Path) -> None:
    """By plain SGD: Adam would not notice gradients that are off by a factor, nor would clipped ones."""
    sgd = ("--set", "optimizer=sgd", "--set", "clip_norm=null", "--lr", "0.05")
    alone, both = tmp_path / "alone", tmp_path / strategy
    run(command(photo_folder, alone, *sgd))
    run(command(photo_folder, both, *sgd, "--set", f"strategy={strategy}", world=2))
    assert losses(alone)[-1][1] < 0.9 * losses(alone)[0][1]  # or there would be nothing to compare
    for (step, a), (other, b) in zip(losses(alone), losses(both), strict=True):
        assert step == other
        assert a == pytest.approx(b, abs=1e-5)
    ours, theirs = weights(alone), weights(both)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
    top1 = [json.loads((out / "evaluation.json").read_text())["top1"] for out in (alone, both)]
    assert top1[0] == top1[1]


@pytest.mark.slow
def test_sharded_run_that_stopped_goes_on_to_the_bit(photo_folder: Path, tmp_path: Path) -> None:
    """Each process finds its shards again; another number of processes is refused."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(command(photo_folder, whole, "--set", "strategy=fsdp", world=2))
    run(command(photo_folder, cut, "--set", "strategy=fsdp", world=2))
    for late in sorted((cut / "state").iterdir())[-1:]:  # as if the last state had not been reached by one of them
        (late / "rank-1.pt").unlink()
    before = losses(cut)
    resume = ["-m", "opsin", "train", "--resume", str(cut)]
    two = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    run([sys.executable, *two, *resume])
    assert losses(cut) == before == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(cut).values(), strict=True))
    alone = subprocess.run([sys.executable, *resume], capture_output=True, text=True, env=environment())
    assert alone.returncode == 1
    assert "is of a run on 2 processes, and this one has 1" in alone.stderr


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_bit(alone: Path, photo_folder: Path, tmp_path: Path) -> None:
    """kill -9, several times in one run, wherever it happens to be."""
    out = tmp_path / "killed"
    begin = command(photo_folder, out, "--set", "log_every=1")
    resume = [sys.executable, "-m", "opsin", "train", "--resume", str(out)]
    kills = 0
    for seen in (1, 5, 9):
        process = subprocess.Popen(
            resume if (out / "train.json").exists() else begin,
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            metrics = out / "metrics.jsonl"
            if metrics.exists() and len(metrics.read_text().splitlines()) >= seen:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.communicate()
    assert kills >= 2
    run(resume)
    assert losses(out) == losses(alone)
    assert all(torch.equal(a, b) for a, b in zip(weights(alone).values(), weights(out).values(), strict=True))
    assert not list((out / "state").glob("*/*.part"))
