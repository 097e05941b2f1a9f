"""What is in deploy/ and the Dockerfile agrees with the program: flags, files, ports, users, names of metrics.

None of it is built or started here.
"""

import asyncio
import importlib.util
import json
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

from opsin import checkpoints
from opsin.checkpoints import Checkpoint
from opsin.checkpoints.catalog import CATALOG
from opsin.cli.serve import serve as serve_command
from opsin.errors import ModelError

yaml = pytest.importorskip("yaml", reason="the manifests are YAML: pip install pyyaml")

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "opsin.json").read_text())
FUNCTIONS = {"sum", "by", "rate", "increase", "histogram_quantile", "max", "le", "model", "route", "stage", "status",
             "type", "version"}  # fmt: skip


def instructions() -> list[tuple[str, str]]:
    """(FROM, COPY, …; what follows), continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


@pytest.fixture
def server(noisy_checkpoint: Checkpoint, tmp_path: Path) -> Iterator[str]:
    """The URL of a server of a tiny model."""
    uvicorn = pytest.importorskip("uvicorn", reason="opsin[serve] is not installed")
    from opsin.serve.app import create_app
    from opsin.serve.settings import Settings

    checkpoints.write(tmp_path, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    app = create_app(Settings(models=(f"tiny={tmp_path}",), dtype="fp32"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started or app.state.fleet.problems:
            assert time.monotonic() < until, "the server did not come up"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def check_command(command: list[str]) -> click.Context:
    """A command of a container is `opsin serve`, and its flags are known."""
    assert command[:2] == ["opsin", "serve"]
    return serve_command.make_context("serve", command[2:])


def test_the_image_copies_what_exists_and_is_not_ignored() -> None:
    wanted = set()
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            wanted |= set(rest.split()[:-1])
    assert wanted == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src"}
    assert all((ROOT / path).exists() for path in wanted)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == wanted


def test_the_image_runs_as_nobody_in_particular_and_is_told_of_signals() -> None:
    last = instructions()
    last = last[max(i for i, (name, _) in enumerate(last) if name == "FROM") :]
    found = dict(last)
    assert int(found["USER"].split(":")[0]) > 0
    assert found["STOPSIGNAL"] == "SIGTERM"
    context = check_command(json.loads(found["CMD"]))  # the form without a shell
    assert context.params["host"] == "0.0.0.0"
    assert found["EXPOSE"] == str(context.params["port"])
    environment = dict(each.split("=", 1) for name, rest in last if name == "ENV" for each in shlex.split(rest))
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OPSIN_SERVE_MODEL"] == "$MODEL"
    check = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
    assert check[:2] == ["python", "-c"] and f":{context.params['port']}/readyz" in check[2]
    compile(check[2], "HEALTHCHECK", "exec")


def test_the_model_in_the_image_is_an_argument_of_both_stages() -> None:
    models = [rest.partition("=")[2] for name, rest in instructions() if name == "ARG" and rest.startswith("MODEL=")]
    assert models == ["opsin/vit-tiny"] * 2
    assert models[0] in CATALOG


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_manifests_are_yaml(path: Path) -> None:
    assert all(isinstance(part, dict) for part in yaml.safe_load_all(path.read_text()))


def test_compose_mounts_what_exists_and_sets_known_variables() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"opsin", "prometheus", "grafana"}
    assert (DEPLOY / services["opsin"]["build"]["context"] / "Dockerfile").exists()
    arguments = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    assert set(services["opsin"]["build"]["args"]) <= arguments
    variables = {f"OPSIN_SERVE_{option.opts[0][2:].upper().replace('-', '_')}" for option in serve_command.params}
    assert set(services["opsin"]["environment"]) <= variables
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service.get("volumes", []):
            if volume.startswith("."):
                assert (DEPLOY / volume.split(":")[0]).exists(), volume


def test_prometheus_reads_the_server_and_grafana_reads_prometheus() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["opsin:8000"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"]} == {source["uid"]}
    folder = yaml.safe_load((provisioning / "dashboards" / "opsin.yaml").read_text())["providers"][0]["options"]["path"]
    mounted = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/opsin.json:{folder}/opsin.json:ro" in mounted


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_every_number_on_the_board_is_one_of_the_server(server: str) -> None:
    import httpx

    with httpx.Client(base_url=server) as client:
        assert client.get("/health").status_code == 200  # a batch
        assert client.get("/nothing").status_code == 404
        text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("# HELP")]
    known = {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    known |= {line.split()[2] for line in lines if line.startswith("# TYPE")}  # those that have not been counted yet
    labels = set(re.findall(r'[{,](\w+)="', text))
    asked = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    assert len(asked) > 12
    for expression in asked:
        bare = re.sub(r"\[[^]]*\]|\{[^}]*\}", "", expression)
        names = set(re.findall(r"[a-z_]\w*", bare)) - FUNCTIONS
        assert names and names <= known, f"{expression}: {names - known}"
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(group.split(", ")) <= labels | {"type"}, expression


def test_kserve_probes_the_port_it_serves() -> None:
    manifest = yaml.safe_load((DEPLOY / "kserve.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = manifest["spec"]["predictor"]
    assert 1 <= predictor["minReplicas"] < predictor["maxReplicas"]
    assert predictor["enableServiceLinks"] is False
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"
    context = check_command(container["args"])
    assert context.params["port"] == container["ports"][0]["containerPort"]
    assert predictor["terminationGracePeriodSeconds"] > context.params["drain_seconds"] + 30  # --body-seconds
    paths = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: found["path"] for name, found in paths.items()} == {
        "startup": "/readyz", "readiness": "/readyz", "liveness": "/livez",
    }  # fmt: skip
    assert {found["port"] for found in paths.values()} == {context.params["port"]}
    assert manifest["metadata"]["annotations"]["prometheus.io/port"] == str(context.params["port"])
    assert container["resources"]["requests"] and container["resources"]["limits"]


def test_ray_serves_the_same_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Ray, which keeps what it is given."""
    fastapi = pytest.importorskip("fastapi", reason="opsin[serve] is not installed")
    given: dict[str, Any] = {}

    def deployment(**options: Any) -> Callable[[type], type]:
        given.update(options)
        return lambda cls: cls

    def ingress(builder: Callable[[], Any]) -> Callable[[type], type]:
        given["builder"] = builder

        def decorate(cls: type) -> type:
            cls.bind = classmethod(lambda cls: "bound")  # type: ignore[attr-defined]
            return cls

        return decorate

    ray = ModuleType("ray")
    ray.serve = ModuleType("ray.serve")  # type: ignore[attr-defined]
    ray.serve.deployment, ray.serve.ingress = deployment, ingress
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", ray.serve)
    monkeypatch.setenv("OPSIN_SERVE_MODEL", "opsin/vit-tiny cats=runs/nowhere")
    monkeypatch.setenv("OPSIN_SERVE_MAX_BODY", "3M")
    module = load_file(DEPLOY / "ray_serve.py")
    assert module.app == "bound"
    application = given["builder"]()
    assert isinstance(application, fastapi.FastAPI)
    assert application.state.settings.models == ("opsin/vit-tiny", "cats=runs/nowhere")
    assert application.state.settings.max_body_bytes == 3 * 2**20

    async def start() -> None:
        async with application.router.lifespan_context(application):
            raise AssertionError("it has started without a model")

    with pytest.raises(ModelError, match="^cats: .*nowhere"):
        asyncio.run(start())
    assert given["autoscaling_config"]["min_replicas"] < given["autoscaling_config"]["max_replicas"]


def test_ray_takes_these_options() -> None:
    ray_serve = pytest.importorskip("ray.serve", reason='pip install "ray[serve]"', exc_type=ImportError)
    assert isinstance(load_file(DEPLOY / "ray_serve.py").app, ray_serve.Application)


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
