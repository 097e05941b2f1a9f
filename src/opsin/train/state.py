"""Where a run stands, on disk: written behind the training's back, whole or not at all, and never by pickle.

    state/step-00000400/rank-0.pt, rank-1.pt, …

Each process writes what it holds: under FSDP its shard of every tensor, else everything. A run goes on from the newest
step of which every process has its file. torch.distributed.checkpoint is not used: its metadata is a pickle that
could run any code (torch 2.13, `filesystem.py` and `default_planner.py`), and files here come from other people too.
What it would add is going on with another number of processes.
"""

import contextlib
import os
import re
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from opsin.checkpoints.files import check_expansion
from opsin.errors import TrainError

State = dict[str, Any]


class StateFolder:
    """The states of one process in a run's folder.

    Args:
        folder: of the run's states; the processes of other machines may have one of their own.
    """

    def __init__(self, folder: Path, *, rank: int = 0, world: int = 1) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, step: int, state: State) -> None:
        """Copy the state now, write it while the training goes on; waits for the last one to be written first."""
        self.wait()
        copied = tree_map(_copied, {"world": self.world, "step": step} | state)
        self._writing = self._pool.submit(self._write, step, copied)

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}" / f"rank-{self.rank}.pt"

    def _write(self, step: int, state: State) -> None:
        path = self._path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing behind it
        part.replace(path)
        # a process may be one state behind the others, so the last that all have is among the newest three
        for old in self._steps()[: -1 if self.world == 1 else -3]:
            self._path(old).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others still have theirs in it
                self._path(old).parent.rmdir()

    def _steps(self) -> list[int]:
        found = self.folder.glob(f"step-*/rank-{self.rank}.pt")
        return sorted(int(m[1]) for path in found if (m := re.fullmatch(r"step-(\d+)", path.parent.name)))

    def newest(self) -> int | None:
        """The last step that every process has a state of."""
        steps = self._steps()
        if self.world > 1:
            everyones: list[Any] = [None] * self.world
            dist.all_gather_object(everyones, steps)
            steps = sorted(set.intersection(*map(set, everyones)))
        return steps[-1] if steps else None

    def load(self) -> State | None:
        """The newest state that every process has, or None where there is none.

        Raises:
            TrainError: another number of processes wrote it, or the file is damaged.
        """
        for part in self.folder.glob(f"step-*/rank-{self.rank}.part"):
            part.unlink()  # of a process that was killed while it wrote
        step = self.newest()
        if step is None:
            return None
        path = self._path(step)
        try:
            with zipfile.ZipFile(path) as archive:
                check_expansion(path, archive)
            state = torch.load(path, map_location="cpu", weights_only=True)
            world = state["world"]
        except Exception as error:  # a damaged file fails in torch in any way it likes
            raise TrainError(f"{path} is damaged ({str(error).splitlines()[0][:200]}). Delete its folder.") from error
        if world != self.world:
            raise TrainError(
                f"{path} is of a run on {world} processes, and this one has {self.world}. "
                f"Go on with {world}: torchrun --nproc-per-node {world} …"
            )
        return state


def _copied(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.to_local()
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def restore(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy saved values into tensors of the same names, shards into shards.

    Raises:
        TrainError: the names or shapes differ: the run was another one.
    """
    if tensors.keys() != saved.keys():
        odd = sorted(tensors.keys() ^ saved.keys())
        raise TrainError(f"the saved state is of another model: {', '.join(odd[:5])} are in only one of the two.")
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.shape != saved[name].shape:
            raise TrainError(f"the saved {name} is {tuple(saved[name].shape)}, the model's {tuple(local.shape)}.")
        local.copy_(saved[name])


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: State) -> None:
    """`load_state_dict` that puts shards back where the parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def sharded(parameter: Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or not value.ndim:
            return value
        return DTensor.from_local(
            value.to(parameter.to_local().device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    state = {
        index: {name: sharded(parameters[index], value) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
