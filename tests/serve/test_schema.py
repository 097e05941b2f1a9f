"""The OpenAPI document: all operations are in it, and nothing that it allows or forbids makes one of them fail."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

EXAMPLES = 15  # of an operation: as the document has it, and as many of what it forbids
LIMITS = {"max_body_bytes": 200_000, "max_pixels": 100_000, "max_items": 7}
KNOWN = {"model": "org/tiny", "version": "1"}  # parts of paths
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
OPERATIONS = {
    "operations": ("GET /livez", "GET /readyz", "GET /health", "GET /metrics"),
    "Hugging Face": ("POST /", "POST /models/{model}"),
    "opsin": ("POST /classify", "POST /embed", "POST /explain"),
    "Open Inference Protocol v2": (
        "GET /v2", "GET /v2/health/live", "GET /v2/health/ready", "GET /v2/models/{model}",
        "GET /v2/models/{model}/ready", "GET /v2/models/{model}/versions/{version}",
        "GET /v2/models/{model}/versions/{version}/ready",
        "POST /v2/models/{model}/infer", "POST /v2/models/{model}/versions/{version}/infer",
    ),
    "OpenAI": ("POST /v1/embeddings", "GET /v1/models", "GET /v1/models/{model}"),
}  # fmt: skip


@pytest.fixture
def document(serve: Callable[..., str]) -> Any:
    return schemathesis.openapi.from_url(f"{serve(**LIMITS)}/openapi.json", config=SchemathesisConfig(seed=8))


def operations(document: Any) -> Iterator[Any]:
    return (found.ok() for found in document.get_all_operations())


def test_the_document_has_every_operation_and_no_other(document: Any) -> None:
    found: dict[str, list[str]] = {}
    for operation in operations(document):
        (tag,) = operation.tags
        found.setdefault(tag, []).append(operation.label)
    assert {tag: sorted(labels) for tag, labels in found.items()} == {
        tag: sorted(labels) for tag, labels in OPERATIONS.items()
    }


@pytest.mark.parametrize("label", [label for labels in OPERATIONS.values() for label in labels])
def test_no_request_makes_an_operation_fail(document: Any, label: str) -> None:
    (operation,) = (each for each in operations(document) if each.label == label)
    # of a GET nothing can be sent that the document forbids
    modes = list(GenerationMode) if operation.method == "post" else [GenerationMode.POSITIVE]
    for mode in modes:
        requests = [operation.as_strategy(generation_mode=mode)]  # of models and versions that are not there
        if known := {name: KNOWN[name] for name in KNOWN if f"{{{name}}}" in operation.path}:
            requests.append(operation.as_strategy(generation_mode=mode, path_parameters=known))

        @settings(max_examples=EXAMPLES * len(requests), derandomize=True, deadline=None, database=None)
        @given(st.one_of(requests))
        def ask(case: Any) -> None:
            case.validate_response(case.call(), checks=CHECKS)

        ask()
