"""Where a model runs, and with which arithmetic."""

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def find_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is a CUDA device where torch sees one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch built without CUDA
        raise ValueError(f'device "{name}" cannot be used: {str(error).splitlines()[0]}') from error
    if device.type == "meta":
        raise ValueError('device "meta" holds no numbers. Use "cpu" or "cuda".')
    return device


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 by itself: with AVX512-BF16 or AMX; others emulate it, slower than fp32."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_int8() -> bool:
    """Whether this CPU multiplies int8 by itself, with AVX512-VNNI: others would be slow, or saturate."""
    return platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_vnni_supported()


def cache_folder() -> Path:
    """Where what was found out about this machine is kept: `OPSIN_CACHE`, or `opsin` in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("OPSIN_CACHE") or Path(caches) / "opsin")


_flags_lock = threading.RLock()


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Without TF32, which rounds fp32 products to 10 bits; its switches are the whole process's, so one at a time."""
    if device.type != "cuda":
        yield
        return
    with _flags_lock:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
