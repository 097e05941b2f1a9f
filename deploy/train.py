"""A recipe of `opsin train` under Ray Train, unchanged: one process a GPU, on any machines of a Ray cluster.

python deploy/train.py vit_l16_in21k 's3://bucket/shards/{0000..4095}.tar' --out /shared/runs/1 --workers 64 --gpus 1

The same run as `torchrun -m opsin train --recipe … --data … --out …`. After a lost worker Ray begins all of them again,
and opsin goes on from the last state that it wrote; so it does if this command is given again. Wants "ray[train]".
"""

import argparse
import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from opsin.recipes import recipe
from opsin.train.config import to_dict, with_settings


def work(job: dict[str, Any]) -> None:
    """One process of the run; Ray Train has set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for it."""
    from opsin.train import run
    from opsin.train.config import from_dict
    from opsin.train.process import process

    leave()
    out = Path(job["out"])
    with process() as this:
        if this.is_main and not (out / "train.json").exists():
            run.begin(out, from_dict(job["config"]), job["data"])
        this.gather([None])  # the others wait until it is there
        run.go(out, this)


def leave() -> None:
    """Leave the group that Ray has formed: opsin forms its own, with gloo beside NCCL, at a port that is free."""
    import torch.distributed as dist

    if not dist.is_initialized():  # a single worker
        return
    with socket.socket() as free:
        free.bind(("", 0))
        port = [free.getsockname()[1]]
        dist.broadcast_object_list(port)  # the main process's
    os.environ["MASTER_PORT"] = str(port[0])
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of `opsin train --list`")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="on storage that all machines see under this path")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of a worker")
    parser.add_argument("--cpus", type=float, default=1, help="of a worker")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--failures", type=int, default=3, help="lost workers, until Ray gives up")
    parser.add_argument("--address", default="auto", help="of the cluster; local: this machine alone")
    arguments = parser.parse_args()
    config = with_settings(recipe(arguments.recipe), arguments.settings)
    ray.init(arguments.address, log_to_driver=False)
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": to_dict(config), "data": arguments.data, "out": str(arguments.out.absolute())},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=arguments.workers,
            use_gpu=arguments.gpus > 0,
            resources_per_worker={"CPU": arguments.cpus} | ({"GPU": arguments.gpus} if arguments.gpus else {}),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(arguments.out.absolute().parent),
            failure_config=FailureConfig(max_failures=arguments.failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
