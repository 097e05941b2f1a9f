"""This process among the others of a run: one on a laptop, one a GPU under torchrun or any launcher that sets its
environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from opsin.device import find_device
from opsin.models.layers import CrossAttentionLayer, TransformerLayer


@dataclass(frozen=True, slots=True)
class Process:
    """Which one this is, of how many, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def local_world(self) -> int:
        """How many of them are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.world > 1 else 1

    @property
    def is_main(self) -> bool:
        """The one that writes models and metrics."""
        return self.rank == 0

    def wrap(self, module: nn.Module, strategy: str) -> nn.Module:
        """The module with its gradients averaged over all processes; under FSDP each keeps a share of the weights."""
        if self.world == 1:
            return module
        if strategy == "fsdp":
            for part in module.modules():
                if isinstance(part, TransformerLayer | CrossAttentionLayer):
                    fully_shard(part)
            fully_shard(module)  # in place
            return module
        return DistributedDataParallel(module, device_ids=[self.device] if self.device.type == "cuda" else None)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, items: list[Any]) -> list[Any]:
        """All processes' items, in each, in the order of the processes."""
        if self.world == 1:
            return items
        everyones: list[Any] = [None] * self.world
        dist.all_gather_object(everyones, items)
        return [item for part in everyones for item in part]

    def any(self, flag: bool) -> bool:
        """Whether it is so in at least one process: they stop together."""
        # of a tensor on the CPU, so that no GPU is waited for
        return flag if self.world == 1 else bool(self.total(torch.tensor(int(flag))).item())

    def broadcast(self, values: Tensor) -> None:
        """The main process's values become everybody's."""
        if self.world > 1:
            dist.broadcast(values, 0)


@contextmanager
def process(device: str = "auto") -> Iterator[Process]:
    """Join the processes that the environment speaks of, for the length of the block.

    Raises:
        ValueError: the device is not there.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1 and (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank % torch.cuda.device_count())}"
    found = find_device(device)
    if world == 1:
        yield Process(0, 1, found)
        return
    if found.type == "cuda":
        torch.cuda.set_device(found)
    # results and errors travel as objects, for which gloo is there beside NCCL
    dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    try:
        yield Process(rank, world, found)
    finally:
        dist.destroy_process_group()


@contextmanager
def synchronising(module: nn.Module, now: bool) -> Iterator[None]:
    """Within, gradients are averaged over the processes only if `now`: once a step, not once a micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    with nullcontext() if now or not isinstance(module, DistributedDataParallel) else module.no_sync():
        yield
