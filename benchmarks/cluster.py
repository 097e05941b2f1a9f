"""A bulk run on Ray with two workers of this machine, against the plain runner.

python benchmarks/cluster.py PHOTOS [--model opsin/vit-tiny] [--rounds 3] [--workers 2]     # wants opsin[ray]

Both write the same folder, in turn, with all the CPUs of the machine: the plain runner's threads have all, each worker
an equal share. Ray is started once, before. `start_s` is the time of the run until the first rows, which a cluster pays
once; `images_per_s` counts from there, where Ray is warm (take some thousands of photos), `whole_images_per_s` from the
call. `grown_mb` is the driver's largest growth between the first rows and the last. The parts of Ray are compared, byte
for byte, with those of a plain run of as many threads as a worker has, which is not timed: sums depend on them.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

import opsin
from opsin import bulk, cluster
from opsin.cli import describe
from opsin.data.inputs import plan
from opsin.pipeline import load


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Watch:
    """When rows came, and how the driver grew meanwhile."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first: tuple[float, int] | None = None  # seconds, images
        self.images = 0
        self.resident: list[int] = []

    def __call__(self, counts: bulk.Counts) -> None:
        self.images = counts.images
        if counts.images:
            self.resident.append(resident_bytes())
            self.first = self.first or (time.perf_counter() - self.began, counts.images)

    def figures(self) -> dict[str, float]:
        whole = time.perf_counter() - self.began
        start, images = self.first or (whole, 0)
        return {
            "start_s": start,
            "images_per_s": (self.images - images) / max(whole - start, 1e-9),
            "whole_images_per_s": self.images / whole,
            "grown_mb": (max(self.resident) - self.resident[0]) / 2**20 if self.resident else 0.0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--model", default="opsin/vit-tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--part-rows", type=int, default=1000)
    arguments = parser.parse_args()
    sizes = {"batch_size": arguments.batch_size, "part_rows": arguments.part_rows}
    classifier = load(arguments.model)
    manifest = describe(classifier, task="classify") | sizes | {"format": "parquet"}
    logging.getLogger("ray").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    ray.init(
        "local", num_cpus=threads, include_dashboard=False, log_to_driver=False,
        object_store_memory=cluster.OBJECT_STORE_BYTES,
    )  # fmt: skip
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, ray {ray.__version__}, "
        f"opsin {opsin.__version__}, {classifier!r}, {classifier.dtype}"
    )

    def plain(parts: bulk.Parts, watch: Watch) -> bulk.Counts:
        return bulk.run(classifier, parts, parts.to_do(), on_batch=watch, **sizes)

    def on_cluster(parts: bulk.Parts, watch: Watch) -> bulk.Counts:
        count = arguments.workers
        options: dict[str, Any] = {"address": "local", "workers": (count, count), **sizes}
        return cluster.run({"name": arguments.model}, parts, parts.to_do(), on_counts=watch, **options)

    runners: dict[str, Callable[[bulk.Parts, Watch], bulk.Counts]] = {
        "plain": plain,
        f"{arguments.workers} Ray workers": on_cluster,
    }
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    tables: list[dict[str, bytes]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(arguments.rounds + 1):  # the first, which fills the caches, does not count
            for name, runner in runners.items():
                folder = Path(scratch, f"{name} {turn}")
                parts = bulk.Parts(folder, manifest, plan([arguments.photos], rows=arguments.part_rows), resume=False)
                watch = Watch()
                counts = runner(parts, watch)
                if runner is on_cluster:
                    tables.append({path.name: path.read_bytes() for path in bulk.files(folder)})
                if turn:
                    figures[name].append(watch.figures())
        folder = Path(scratch, "threads of a worker")
        parts = bulk.Parts(folder, manifest, plan([arguments.photos], rows=arguments.part_rows), resume=False)
        torch.set_num_threads(max(1, threads // arguments.workers))
        plain(parts, Watch())
        wanted = {path.name: path.read_bytes() for path in bulk.files(folder)}
        for name, rows in figures.items():
            medians = {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}
            print(json.dumps({"runner": name, "images": counts.images, "failed": counts.failed, **medians}))
    one, other = (statistics.median(row["images_per_s"] for row in rows) for rows in figures.values())
    print(
        json.dumps(
            {
                "same_bytes": all(table == wanted for table in tables),
                "overhead_percent": round(100 * (one / other - 1), 1) if other else None,
            }
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
