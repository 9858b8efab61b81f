"""The OpenAPI schema against the server: schemathesis sends what fits it and what does not."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from allaprima.serve.app import create_app

from .conftest import Running
from .fakes import FakeStudio

SCHEMA = schemathesis.openapi.from_dict(create_app(FakeStudio()).openapi())  # type: ignore[arg-type]
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@SCHEMA.parametrize()
@hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_the_server_is_as_its_schema_says(case: Any, server: Running) -> None:
    # Clients of AUTOMATIC1111 write "7" and 0 for numbers and for False, which it takes as they are meant.
    lax = case.path.startswith("/sdapi/")
    checks = CHECKS if lax else [*CHECKS, negative_data_rejection]
    case.call_and_validate(base_url=server.url, checks=checks, timeout=20)


def test_it_is_served(server: Running) -> None:
    with server.client() as client:
        found = client.get("/openapi.json").json()
    assert found == create_app(FakeStudio()).openapi()  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_pages_with_assets_from_elsewhere(server: Running, path: str) -> None:
    with server.client() as client:
        assert client.get(path).status_code == 404
