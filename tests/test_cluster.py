"""A bulk run on a Ray cluster of this machine, two workers of a CPU each, against the plain runner."""

import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hub_server import HubServer
from opsin import bulk, checkpoints, cluster
from opsin.checkpoints import Checkpoint
from opsin.cli import describe
from opsin.data.inputs import Block, plan
from opsin.errors import BulkError, MissingExtra
from opsin.pipeline import Classifier, load

ROOT = Path(__file__).resolve().parent.parent
BATCH, PART, BLOCK = 3, 6, 11  # neither divides the next

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def hub(noisy_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub that has the model as me/noise."""
    given, folder = noisy_checkpoint, tmp_path_factory.mktemp("repo")
    checkpoints.write_hf(folder, given.model, given.preprocess, given.labels)
    with HubServer() as server:
        server.add("me/noise", folder)
        yield server


@pytest.fixture(scope="module")
def two_cpus(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # for the workers: this process has read its own
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            object_store_memory=cluster.OBJECT_STORE_BYTES,
        )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 images, one of which is none."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(random.integers(0, 256, (31 + i % 7, 37, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "17-bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 is how a JPEG begins")
    return folder


class Run:
    """The same images, model and manifest, into any folder by either runner."""

    def __init__(self, classifier: Classifier, images: Path) -> None:
        self.classifier, self.images = classifier, images
        facts = {"format": "jsonl", "batch_size": BATCH, "top_k": 2, "part_rows": PART}
        self.manifest = describe(classifier, task="classify") | facts

    def parts(self, folder: Path, *, resume: bool = False, **manifest: Any) -> bulk.Parts:
        return bulk.Parts(folder, self.manifest | manifest, plan([str(self.images)], rows=BLOCK), resume=resume)

    def plain(self, parts: bulk.Parts) -> bulk.Counts:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a worker has: the order of sums may depend on it
        try:
            return bulk.run(self.classifier, parts, parts.to_do(), batch_size=BATCH, part_rows=PART, top_k=2)
        finally:
            torch.set_num_threads(threads)

    def on_cluster(self, parts: bulk.Parts, **options: Any) -> bulk.Counts:
        given: dict[str, Any] = {
            "address": "local",
            "workers": (2, 2),
            "batch_size": BATCH,
            "part_rows": PART,
            "top_k": 2,
        }
        return cluster.run({"name": "me/noise", "dtype": "fp32"}, parts, parts.to_do(), **given | options)


@pytest.fixture(scope="module")
def run(hub: HubServer, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("copy")
    (files,) = hub.repos["me/noise"].commits.values()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Run(load(folder, dtype="fp32"), images)


def table(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bulk.files(folder)}


@pytest.fixture(scope="module")
def wanted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("plain")
    assert run.plain(run.parts(folder)) == bulk.Counts(61, 1)
    return table(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
class TestRun:
    def test_its_files_are_those_of_the_plain_runner(
        self, run: Run, wanted: dict[str, bytes], hub: HubServer, tmp_path: Path
    ) -> None:
        seen: list[int] = []
        counts = run.on_cluster(run.parts(tmp_path), on_counts=lambda counts: seen.append(counts.images))
        assert counts == bulk.Counts(61, 1)
        assert seen == sorted(seen)
        assert seen[-1] == 61
        assert table(tmp_path) == wanted
        assert not [path for path in tmp_path.glob(".*") if path.name != ".lock"]
        assert [row["path"] for row in bulk.errors(tmp_path)] == [str(run.images / "17-bad.jpg")]
        assert len(hub.bodies("model.safetensors")) == 1, "once for two workers on one machine"

    def test_a_killed_worker_is_made_up_for_and_the_driver_does_not_grow(self, run: Run, tmp_path: Path) -> None:
        killed: list[int] = []
        resident: list[int] = []

        def kill(counts: bulk.Counts) -> None:
            if counts.images:
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
                if not killed:
                    killed.append(workers()[0])
                    os.kill(killed[0], signal.SIGKILL)

        many = plan([str(run.images)] * 20, rows=BLOCK)
        parts = bulk.Parts(tmp_path / "cluster", run.manifest, many, resume=False)
        assert run.on_cluster(parts, on_counts=kill) == bulk.Counts(20 * 61, 20)
        assert killed
        assert max(resident) - resident[0] < 10 * 2**20
        plain = bulk.Parts(tmp_path / "plain", run.manifest, parts.blocks(), resume=False)
        run.plain(plain)
        assert table(tmp_path / "cluster") == table(tmp_path / "plain")

    def test_what_was_stopped_is_gone_on_with(self, run: Run, wanted: dict[str, bytes], tmp_path: Path) -> None:
        counts = run.on_cluster(run.parts(tmp_path), workers=(1, 1), stop=lambda: True)
        assert counts.images < 61
        parts = run.parts(tmp_path, resume=True)
        assert parts.num_done == counts.images
        for path in bulk.files(tmp_path)[1:]:  # as a machine that failed leaves it
            path.unlink()
        run.on_cluster(run.parts(tmp_path, resume=True))
        assert b"".join(table(tmp_path).values()) == b"".join(wanted.values())

    def test_another_model_is_refused(self, run: Run, tmp_path: Path) -> None:
        parts = run.parts(tmp_path, sha256="f" * 64)
        with pytest.raises(
            BulkError, match="has sha256 [0-9a-f]{64}, the driver ffff.*: me/noise must be the same for all"
        ):
            run.on_cluster(parts, workers=(1, 1))
        assert bulk.files(tmp_path) == []
        assert not list(tmp_path.glob(".cluster-*"))

    def test_what_does_not_fit_is_refused(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(
            BulkError, match=r"3 workers of 1 CPUs do not fit on this machine, which has 2 CPUs and 0 GPUs"
        ):
            run.on_cluster(run.parts(tmp_path / "a"), workers=(3, 3))
        with pytest.raises(BulkError, match=r"1 workers of 2 CPUs and 1 GPUs do not fit"):
            run.on_cluster(run.parts(tmp_path / "b"), workers=None, gpus_per_worker=1)


def workers() -> list[int]:
    """Processes of the pool, below this one."""
    lines = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.split(None, 2) for line in lines[1:]]
    mine, found = {os.getpid()}, []
    for pid, parent, _ in sorted(rows, key=lambda row: int(row[0])):
        if int(parent) in mine:
            mine.add(int(pid))
    for pid, _, command in rows:
        if int(pid) in mine and re.match(r"ray::.*Worker", command):
            found.append(int(pid))
    return found


class TestBoard:
    def test_a_block_is_counted_once_however_many_wrote_it(self) -> None:
        board = cluster.Board(5)
        assert board.begin(2, "a.tar", "one") == ([], False)
        board.write(2, part := cluster._Part(0, 7, 2, "part-000002-00000000-00000007.csv"))
        assert not board.tell("one", bulk.Counts(3, 1))
        assert board.read().counts == bulk.Counts(10, 3)
        assert board.begin(2, "a.tar", "two") == ([part], True)  # the first is lost, and what it had in hand
        assert board.read().counts == bulk.Counts(7, 2)
        board.write(2, part)
        board.write(2, cluster._Part(7, 11, 0, "part-000002-00000007-00000011-end.csv"))
        board.done(2)
        board.write(2, part)  # the first was not lost after all
        board.done(2)
        assert board.begin(2, "a.tar", "three") is None
        state = board.read()
        assert (state.counts, state.num_done, state.problem) == (bulk.Counts(11, 2), 1, None)

    def test_a_block_that_kills_workers_is_named(self) -> None:
        board = cluster.Board(1)
        for _ in range(cluster.MAX_LOST):
            assert board.begin(0, "s3://b/x.tar", "host, process 3")
        board.write(0, cluster._Part(0, 40, 0, "x"))  # it moves on: that was bad luck
        for _ in range(cluster.MAX_LOST - 1):
            assert board.begin(0, "s3://b/x.tar", "host, process 5")
        assert board.begin(0, "s3://b/x.tar", "host, process 7") is None
        problem = board.read().problem
        assert isinstance(problem, str)
        assert re.match(
            r"block 0 \(s3://b/x.tar, from row 40\) has cost 3 workers, the last on host, process 7: most", problem
        )
        assert board.tell("another", bulk.Counts())

    def test_the_first_problem_is_told(self) -> None:
        board = cluster.Board(1)
        board.fail("first")
        board.fail(OSError("second"))
        assert board.read().problem == "first"
        assert board.begin(0, "a.png", "one") is None


class TestWorker:
    """A worker without Ray: what it wants of its machine."""

    def job(self, folder: Path, **changes: Any) -> Any:
        (folder / ".cluster-1").touch()
        job = cluster._Job(
            folder=folder, manifest={"format": "csv"}, load_options={}, answers={}, batch_size=2, part_rows=4,
            on_error="record", threads=torch.get_num_threads(), token=".cluster-1", home=Path.cwd(), seen=None,
        )  # fmt: skip
        return replace(job, **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"token": ".cluster-2"},
                r"does not see /.*: workers write their parts themselves. Name a folder on storage",
            ),
            ({"seen": "/no/such/a.png"}, r"does not see /no/such/a.png, which is on a disk of the driver"),
            ({"manifest": {"opsin": "9.9"}}, r"has opsin .*, the driver 9.9: install the same version"),
            ({"manifest": {"dtype": "fp8"}}, r"has dtype fp32, the driver fp8: machines differ; choose one"),
            (
                {"manifest": {"preprocess_hash": "0"}},
                r"has preprocess_hash .*, the driver 0: the model must be the same",
            ),
            ({"load_options": {"dtype": "fp16", "device": "cpu"}}, r'process \d+: dtype "fp16" is for CUDA'),
        ],
    )
    def test_a_machine_that_lacks_something_is_named(
        self, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        options = changes.get("load_options", {"dtype": "fp32"})
        with pytest.raises(BulkError, match=message):
            cluster.Worker(self.job(tmp_path, **{**changes, "load_options": options}), None)._load()

    def test_relative_inputs_want_the_same_place(self, tmp_path: Path) -> None:
        bulk.Parts(tmp_path / "out", {"format": "csv"}, [Block("files", ("a.png", "b.png"))], resume=False)
        worker = cluster.Worker(self.job(tmp_path / "out", home=Path("/no/such/home")), None)
        with pytest.raises(BulkError, match=r"a.png and 1 more is relative to /no/such/home, which .* does not have"):
            worker._block(0)


class TestAddress:
    def parts(self, folder: Path) -> bulk.Parts:
        return bulk.Parts(folder / "out", {"format": "csv"}, [Block("files", ("a.png",))], resume=False)

    def run(self, folder: Path, **options: Any) -> bulk.Counts:
        parts = self.parts(folder)
        return cluster.run({}, parts, parts.to_do(), **options)

    def test_nobody_there_is_found_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            port = taken.getsockname()[1]
            for address in (f"ray://127.0.0.1:{port}", f"127.0.0.1:{port}"):
                with pytest.raises(BulkError, match=rf"nothing answers at {address} \(Connection refused\). Check"):
                    self.run(tmp_path / address.replace("/", ""), address=address)

    @pytest.mark.parametrize("address", ["Auto", "http://head:8265", "head:x", "ray://"])
    def test_what_is_no_address_is_said(self, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(BulkError, match=rf'"{address}" is no address of a cluster. Known: auto'):
            self.run(tmp_path, address=address)

    def test_no_cluster_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def init(*args: Any, **options: Any) -> None:
            raise ConnectionError("Could not find any running Ray instance.\nTrace")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(
            BulkError, match=r'"auto" cannot be joined: Could not .* instance. Start one with `ray start'
        ):
            self.run(tmp_path)

    def test_a_token_may_be_wanted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def init(*args: Any, **options: Any) -> None:
            raise ConnectionError("ray client connection timeout")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"ray://127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(
                BulkError, match=r"cannot be joined: .* timeout. A cluster that asks for a token wants it"
            ):
                self.run(tmp_path, address=address)

    def test_ray_is_an_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtra, match=r'ray is not installed. .* pip install "opsin\[ray\]"'):
            self.run(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"workers": (3, 2)}, "workers is 3:2; right is least:most, such as 2:64"),
            ({"workers": (0, 2)}, "workers is 0:2"),
            ({"gpus_per_worker": -1}, "a worker of -1 GPUs and None CPUs"),
            ({"cpus_per_worker": 0}, "a worker of 0 GPUs and 0 CPUs: give 0 or more GPUs, 1 or more CPUs"),
        ],
    )
    def test_sizes(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            self.run(tmp_path, **options)


class FakeRay:
    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes = [{"Alive": True, "Resources": node} for node in nodes]

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "pool"),
    [
        ([{"CPU": 8}], None, 0, (1, 1, 8, 0)),
        ([{}, {"CPU": 7}, {"CPU": 8}], None, 0, (1, 2, 7, 0)),
        ([{"CPU": 8}, {"CPU": 8}], (2, 5), 0, (2, 5, 3, 0)),
        ([{"CPU": 24}, {"CPU": 2}], (1, 1), 0, (1, 1, 24, 0)),
        ([{"CPU": 2}, {"CPU": 96, "GPU": 8}], None, 1, (1, 8, 12, 1)),
        ([{"CPU": 96, "GPU": 8}], None, 0.5, (1, 16, 6, 0.5)),
        ([], (2, 64), 1, (2, 64, 1, 1)),
    ],
)
def test_workers_share_the_cluster(nodes: Any, workers: Any, gpus: float, pool: tuple[float, ...]) -> None:
    assert cluster._pool(FakeRay(*nodes), "auto", workers, gpus, None) == pool


def test_the_manifest_of_kuberay() -> None:
    """Its command is one that the command line takes, and names what the cluster offers."""
    yaml = pytest.importorskip("yaml")
    claim, job = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())
    spec = job["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["opsin", "classify"]
    assert words[words.index("--workers") + 1] == f"{group['minReplicas']}:{group['maxReplicas']}"
    pods = [group["template"]["spec"], spec["headGroupSpec"]["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        assert container["image"] == pods[0]["containers"][0]["image"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared"}
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == [
            claim["metadata"]["name"]
        ]
        assert "HF_HOME" in [variable["name"] for variable in container["env"]]


@pytest.mark.slow
def test_a_recipe_under_ray_train(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="ray[train]")
    data = tmp_path / "data"
    for i, path in enumerate(sorted(images.glob("*.png"))):
        link = data / f"class {i % 2}" / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    settings = [f"--set={setting}" for setting in ("steps=3", "batch_size=16", "workers=0", "holdout=0.1")]
    command = [sys.executable, str(ROOT / "deploy" / "train.py"), "vit_tiny", str(data), "--out", str(tmp_path / "1")]
    subprocess.run(
        [*command, *settings, "--workers=2", "--address=local"], check=True, capture_output=True, timeout=200
    )
    lines = (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()
    assert lines
    assert list((tmp_path / "1" / "state").glob("step-*/rank-1.pt")), "there were two of them"
    assert load(tmp_path / "1").labels is not None
