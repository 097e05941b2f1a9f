"""The hub, end to end: every test is a fresh Python process with its own cache against a hub on loopback.

huggingface_hub reads its environment when it is imported, so only a new process proves what HF_ENDPOINT and the
others do.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from hub_server import HubServer

CONFIG = json.dumps({"model_type": "vit"}).encode()
PREPROCESSOR = json.dumps({"size": 224}).encode()
WEIGHTS = save({"a": torch.arange(7.0)})
REPO = {"config.json": CONFIG, "preprocessor_config.json": PREPROCESSOR, "model.safetensors": WEIGHTS}
CHUNK = 10 * 2**20  # huggingface_hub writes in pieces of this size; a cut loses what has arrived of the last one

# hub.py needs neither torch nor the readers beside it: without them a process starts in a fraction of the time
WITHOUT_READERS = """
import sys, types, opsin
package = sys.modules["opsin.checkpoints"] = types.ModuleType("opsin.checkpoints")
package.__path__ = [opsin.__path__[0] + "/checkpoints"]
"""
PROLOGUE = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
from opsin.checkpoints import hub
from opsin.errors import OpsinError
def report(function, *args, **kwargs):
    try:
        print(json.dumps({"value": function(*args, **kwargs)}, default=str))
    except OpsinError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@dataclass
class Answer:
    value: Any = None
    error: str | None = None
    message: str = ""
    stderr: str = ""

    @property
    def files(self) -> dict[str, bytes]:
        """Content of the folder that `download` returned."""
        assert self.error is None, self.message
        return {p.relative_to(self.value).as_posix(): p.read_bytes() for p in Path(self.value).rglob("*")}


@dataclass
class Machine:
    """A user's machine: a cache folder and environment variables. Each call is one process."""

    home: Path
    env: dict[str, str]

    def run(self, code: str, env: dict[str, str] | None = None, *, readers: bool = False) -> Answer:
        code = PROLOGUE + code if readers else WITHOUT_READERS + PROLOGUE + code
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.env | (env or {}), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return Answer(**json.loads(done.stdout.splitlines()[-1]), stderr=done.stderr)

    def download(self, repo_id: str, revision: str | None = None, **env: str) -> Answer:
        return self.run(f"report(hub.download, {repo_id!r}, revision={revision!r})", env)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def machine(hub: HubServer, tmp_path: Path) -> Machine:
    # DO_NOT_TRACK: without it, huggingface_hub 2 asks the hub once a day for a list of coding agents to report
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    clean = {key: value for key, value in os.environ.items() if not key.upper().startswith(foreign)}
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "DO_NOT_TRACK": "1"}
    return Machine(tmp_path, clean | own)


def test_only_what_a_reader_needs_is_fetched(hub: HubServer, machine: Machine) -> None:
    others = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "onnx/model.onnx", "vocab.txt"]
    hub.add("me/cats", REPO | dict.fromkeys(others, b"large and useless here"))
    answer = machine.download("me/cats")
    assert answer.files == REPO
    assert answer.stderr == ""  # no bars where there is no terminal
    fetched = {request.path.rsplit("/", 1)[-1] for request in hub.requests}
    assert fetched == {*REPO}


BIN = b"bytes of a .bin"
LAYOUTS: dict[str, dict[str, bytes]] = {
    "safetensors": {"model.safetensors": WEIGHTS},
    "sharded safetensors": {
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        ).encode(),
        "model-00001-of-00002.safetensors": WEIGHTS,
        "model-00002-of-00002.safetensors": save({"b": torch.ones(3)}),
    },
    "bin": {"pytorch_model.bin": BIN},
    "sharded bin": {
        "pytorch_model.bin.index.json": json.dumps(
            {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin", "c": "pytorch_model-1.bin"}}
        ).encode(),
        "pytorch_model-1.bin": BIN,
        "pytorch_model-2.bin": BIN + b"2",
    },
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_best_weights_of_each_layout(kind: str, hub: HubServer, machine: Machine) -> None:
    """A repo that holds this layout and every worse one gives this one alone; no preprocessing file is no error."""
    worse = list(LAYOUTS)[list(LAYOUTS).index(kind) :]
    hub.add("me/cats", {"config.json": CONFIG} | {k: v for layout in worse for k, v in LAYOUTS[layout].items()})
    assert machine.download("me/cats").files == {"config.json": CONFIG} | LAYOUTS[kind]
    assert machine.download("me/cats", HF_HUB_OFFLINE="1").files == {"config.json": CONFIG} | LAYOUTS[kind]


def test_cache_answers_first(hub: HubServer, machine: Machine) -> None:
    """A branch, by name or not, a tag, a commit: what the cache holds takes not one request."""
    commit = hub.add("me/cats", REPO)
    hub.add("me/cats", REPO | {"config.json": b'{"model_type": "deit"}'}, revision="v1")
    path, tagged = machine.download("me/cats").value, machine.download("me/cats", "v1").value
    hub.requests.clear()
    assert machine.download("me/cats").value == path
    assert machine.download("me/cats", "main").value == path
    assert machine.download("me/cats", commit).value == path
    assert machine.download("me/cats", "v1").value == tagged != path
    assert hub.requests == []


def test_without_weights(hub: HubServer, machine: Machine) -> None:
    """For a processor alone; the model, when it is asked for, is not taken for whole."""
    hub.add("me/cats", REPO)
    light = machine.run("report(hub.download, 'me/cats', weights=False)")
    assert sorted(light.files) == ["config.json", "preprocessor_config.json"]
    assert machine.run("report(hub.is_cached, 'me/cats')").value is False
    assert machine.download("me/cats").files == REPO


def test_interrupted_snapshot_is_completed(hub: HubServer, machine: Machine) -> None:
    """A cache that transformers or a killed process left without weights is not taken for whole."""
    hub.add("me/cats", REPO)
    Path(machine.download("me/cats").value, "model.safetensors").unlink()
    assert machine.download("me/cats", HF_HUB_OFFLINE="1").error == "HubError"
    assert machine.download("me/cats").files == REPO


def test_branch_moves(hub: HubServer, machine: Machine) -> None:
    """The cache stays where it is until somebody asks: for the commit, or for where the branch is now."""
    hub.add("me/cats", REPO)
    older = machine.download("me/cats").value
    newer = REPO | {"model.safetensors": save({"a": torch.zeros(7)})}
    commit = hub.add("me/cats", newer)
    assert machine.download("me/cats").value == older
    assert machine.download("me/cats", commit).files == newer
    assert machine.download("me/cats").value == older
    refresh = "from huggingface_hub import hf_hub_download\nreport(hf_hub_download, 'me/cats', 'config.json')"
    machine.run(refresh)  # what `hf download me/cats config.json` does
    assert machine.download("me/cats").files == newer
    newest = REPO | {"model.safetensors": save({"a": torch.ones(7)})}
    hub.add("me/cats", newest)
    machine.run(refresh)
    answer = machine.download("me/cats")  # fetches the weights that the new commit has
    assert answer.files == newest
    hub.stop()
    assert machine.download("me/cats").value == answer.value


def test_revisions(hub: HubServer, machine: Machine) -> None:
    commit = hub.add("me/cats", REPO)
    older = REPO | {"config.json": b'{"model_type": "deit"}'}
    hub.add("me/cats", older, revision="v1")
    assert machine.download("me/cats", "v1").files == older
    assert machine.download("me/cats", commit).files == REPO
    answer = machine.download("me/cats", "v2")
    assert answer.error == "UnknownModel"
    assert answer.message == 'me/cats has no revision "v2". It has main, v1.'


def test_hub_gone_cache_answers(hub: HubServer, machine: Machine) -> None:
    hub.add("me/cats", REPO)
    online = machine.download("me/cats")
    hub.stop()
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        answer = machine.download("me/cats", **env)
        assert answer.value == online.value
        assert answer.stderr == ""  # the cache is enough, nothing to warn of


def test_unreachable_and_not_cached(hub: HubServer, machine: Machine) -> None:
    hub.stop()
    answer = machine.download("me/cats")
    assert answer.error == "HubError"
    assert answer.message.startswith(f"{hub.endpoint} could not be reached for me/cats (Connect")
    for remedy in ("HF_ENDPOINT=https://hf-mirror.com", "local copy", str(machine.home / "hf")):
        assert remedy in answer.message
    offline = machine.download("me/cats", HF_HUB_OFFLINE="1")
    assert offline.error == "HubError"
    assert "HF_HUB_OFFLINE forbids" in offline.message


@pytest.fixture(scope="module")
def large() -> bytes:
    """Three chunks and a rest; noise, so that a piece in the wrong place changes the hash."""
    return np.random.default_rng(0).bytes(3 * CHUNK + 12_345)


def test_cut_transfer_goes_on(hub: HubServer, machine: Machine, large: bytes) -> None:
    """In the same process, as often as it is cut."""
    hub.add("me/cats", REPO | {"model.safetensors": large})
    hub.cut("model.safetensors", 2 * CHUNK + 777, CHUNK // 2)
    assert machine.download("me/cats").files["model.safetensors"] == large
    ranges = [request.range for request in hub.bodies("model.safetensors")]
    assert ranges == [None, f"bytes={2 * CHUNK}-", f"bytes={2 * CHUNK}-"]


def test_cut_transfer_goes_on_in_a_later_process(hub: HubServer, machine: Machine, large: bytes) -> None:
    hub.add("me/cats", REPO | {"model.safetensors": large})
    hub.cut("model.safetensors", 2 * CHUNK + 777, then_status=503)
    answer = machine.download("me/cats")
    assert answer.error == "HubError"
    assert "a cut transfer goes on where it stopped" in answer.message
    hub.broken_status = None
    hub.requests.clear()
    assert machine.download("me/cats").files["model.safetensors"] == large
    (transfer,) = hub.bodies("model.safetensors")
    assert transfer.range == f"bytes={2 * CHUNK}-"
    assert transfer.num_bytes == CHUNK + 12_345


def test_damaged_transfer_is_thrown_away(hub: HubServer, machine: Machine) -> None:
    hub.add("me/cats", REPO)
    blobs = Path(machine.download("me/cats").value).parents[1] / "blobs"
    (whole,) = (blob for blob in blobs.iterdir() if blob.read_bytes() == WEIGHTS)
    whole.rename(f"{whole}.incomplete")
    Path(f"{whole}.incomplete").write_bytes(b"not how it begins")
    answer = machine.download("me/cats")
    assert answer.error == "HubError"
    assert answer.message.startswith("model.safetensors of me/cats arrived damaged: sha256")
    assert machine.download("me/cats").files == REPO


def test_unknown_model(machine: Machine) -> None:
    answer = machine.download("google/vit-base-patch16-242")
    assert answer.error == "UnknownModel"
    assert answer.message.startswith('no model "google/vit-base-patch16-242" on http://127.0.0.1')
    assert 'Did you mean "google/vit-base-patch16-224"' in answer.message
    for nonsense in ("a/b/c", "../etc", "-"):
        answer = machine.download(nonsense)
        assert answer.error == "UnknownModel"
        assert "not a hub id (owner/name)" in answer.message


def test_gated_model(hub: HubServer, machine: Machine) -> None:
    hub.add("me/secret", REPO, gated=True)
    hub.tokens.add("hf_right")
    answer = machine.download("me/secret")
    assert answer.error == "HubError"
    assert f"accept its terms at {hub.endpoint}/me/secret. Then create a token and set HF_TOKEN" in answer.message
    answer = machine.download("me/secret", HF_TOKEN="hf_wrong")
    assert answer.error == "HubError"
    assert "This HF_TOKEN has no access yet" in answer.message
    assert machine.download("me/secret", HF_TOKEN="hf_right").files == REPO
    elsewhere = [request.token for request in hub.requests if request.host.startswith("localhost")]
    assert elsewhere == [None]  # the weights' host is another one and does not learn the token


def test_repo_without_readable_weights(hub: HubServer, machine: Machine) -> None:
    hub.add("me/keras", {"config.json": CONFIG, "tf_model.h5": b"tf", "saved_model.pb": b"tf"})
    answer = machine.download("me/keras")
    assert answer.error == "HubError"
    assert answer.message.startswith(
        "me/keras has no weights that opsin reads. It holds config.json, tf_model.h5, saved_model.pb. "
        "Right would be one of model.safetensors, "
    )
    hub.add("me/lora", {"adapter_model.safetensors": WEIGHTS})
    answer = machine.download("me/lora")
    assert answer.error == "HubError"
    assert "me/lora has no config.json, so its shape is unknown. It holds adapter_model.safetensors." in answer.message


def test_index_that_points_elsewhere(hub: HubServer, machine: Machine) -> None:
    for shard in ("../../../../evil.safetensors", "/etc/passwd", "run.py"):
        index = json.dumps({"weight_map": {"a": shard}}).encode()
        hub.add("me/evil", {"config.json": CONFIG, "model.safetensors.index.json": index, "run.py": b"evil"})
        answer = machine.download("me/evil")
        assert answer.error == "CheckpointError"
        assert f'model.safetensors.index.json names "{shard}", which is not a weight file beside it' in answer.message
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    hub.add("me/half", {"config.json": CONFIG, "model.safetensors.index.json": index})
    assert "the upload is incomplete" in machine.download("me/half").message


def test_disk_full(hub: HubServer, machine: Machine) -> None:
    hub.add("me/cats", REPO)
    answer = machine.run(
        "import shutil, types\n"
        "shutil.disk_usage = lambda path: types.SimpleNamespace(free=3)\n"
        "report(hub.download, 'me/cats')"
    )
    assert answer.error == "HubError"
    assert answer.message.startswith(f"no room for me/cats in {machine.home / 'hf' / 'hub'}: 0.0 MB to fetch, 0.0 MB")
    assert hub.bodies("model.safetensors") == []


def test_is_cached(hub: HubServer, machine: Machine) -> None:
    hub.add("me/cats", REPO)
    code = "report(lambda: [hub.is_cached('me/cats'), hub.is_cached('not/a/name'), 'torch' in sys.modules])"
    assert machine.run(code).value == [False, False, False]
    assert hub.requests == []
    machine.download("me/cats")
    assert machine.run(code).value == [True, False, False]


def test_one_set_of_models_and_files() -> None:
    """What is fetched and found is what the readers read; hub.py names it again, to stay free of torch."""
    from opsin.checkpoints import files, hf
    from opsin.checkpoints import hub as hub_module

    assert tuple(hf.MODEL_TYPES) == hub_module.ARCHITECTURES
    assert hub_module.WEIGHTS == files.FOLDER_FILES


def test_search(hub: HubServer, machine: Machine) -> None:
    def add(name: str, downloads: int, *tags: str, task: str = "image-classification", **info: Any) -> None:
        hub.add(name, REPO, downloads=downloads, likes=downloads // 10, tags=list(tags), pipeline_tag=task, **info)

    add("a/flowers-vit", 50, "transformers", "safetensors", "vit", "license:apache-2.0")
    add("b/flowers-deit", 70, "transformers", "pytorch", "deit")
    add("c/Flowers-reg", 60, "transformers", "safetensors", "dinov2_with_registers", "license:mit")
    add("d/flowers-swin", 999, "transformers", "safetensors", "swin")
    add("e/flowers-keras", 999, "transformers", "tf", "vit")
    add("f/flowers-lora", 999, "transformers", "safetensors", "vit", "peft")
    add("g/flowers-detector", 999, "transformers", "safetensors", "vit", task="object-detection")
    add("h/flowers-gated", 999, "transformers", "safetensors", "vit", gated=True)
    add("i/cats", 999, "transformers", "safetensors", "vit")
    add("j/flowers-perceiver", 40, "transformers", "safetensors", "perceiver")
    add("k/flowers-text", 999, "transformers", "safetensors", "perceiver", task="text-classification")
    code = "import dataclasses; report(lambda: [dataclasses.astuple(m) for m in hub.search({})])"
    assert machine.run(code.format("'flowers'")).value == [
        ["b/flowers-deit", "deit", 70, 7, None],
        ["c/Flowers-reg", "dinov2_with_registers", 60, 6, "mit"],
        ["a/flowers-vit", "vit", 50, 5, "apache-2.0"],
        ["j/flowers-perceiver", "perceiver", 40, 4, None],
    ]
    assert [name for name, *_ in machine.run(code.format("'flowers', limit=1")).value] == ["b/flowers-deit"]
    hub.stop()
    answer = machine.run(code.format("'flowers'"))
    assert answer.error == "HubError"
    assert "cannot be searched (Connect" in answer.message


class Bomb:
    """What a hostile pytorch_model.bin would hold."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


def test_hostile_pickle_is_not_executed(hub: HubServer, machine: Machine) -> None:
    target = machine.home / "executed"
    config = {"model_type": "vit", "image_size": 4, "patch_size": 2, "hidden_size": 6, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 7, "architectures": ["ViTModel"]}
    plain = pickle.dumps({"vit.embeddings.cls_token": Bomb(target)})
    torch.save({"vit.embeddings.cls_token": Bomb(target)}, machine.home / "zip.bin")
    for content in ((machine.home / "zip.bin").read_bytes(), plain):
        hub.add("me/evil", {"config.json": json.dumps(config).encode(), "pytorch_model.bin": content})
        answer = machine.run("from opsin import checkpoints\nreport(checkpoints.read, 'me/evil')", readers=True)
        assert answer.error == "UnsafeCheckpoint", answer.message
        assert not target.exists()
    pickle.loads(plain)
    assert target.exists()  # the bomb is live


def test_transformers_model_gives_its_logits(hub: HubServer, machine: Machine) -> None:
    """save_pretrained → hub → read → logits, equal to transformers'."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    config.id2label = {i: f"class {i}" for i in range(5)}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    folder = machine.home / "saved"
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    hub.add("me/flowers", folder)
    pixels = torch.randn(2, 3, 32, 32)
    torch.save(pixels, machine.home / "pixels.pt")
    answer = machine.run(
        "import torch\n"
        "from opsin import checkpoints\n"
        "checkpoint = checkpoints.read('me/flowers')\n"
        f"pixels = torch.load({str(machine.home / 'pixels.pt')!r})\n"
        "with torch.no_grad(): logits = checkpoint.model.eval()(pixels)\n"
        f"torch.save(logits, {str(machine.home / 'logits.pt')!r})\n"
        "report(lambda: [checkpoint.source.name, checkpoint.source.revision, list(checkpoint.labels.names)])\n",
        readers=True,
    )
    assert answer.value[0] == "me/flowers"
    assert answer.value[2] == [f"class {i}" for i in range(5)]
    with torch.no_grad():
        expected = model(pixels).logits
    torch.testing.assert_close(torch.load(machine.home / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
