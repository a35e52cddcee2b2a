"""Requests that no page sends, made from the server's own OpenAPI: each has an answer, and none is a failure."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from starlette.testclient import TestClient

from whence.explorer.app import make_app
from whence.explorer.security import Guard
from whence.explorer.serving import opened
from whence.explorer.waiting_line import FAILED

EXAMPLES = 6
"""Of each address, well formed and malformed each; `benchmarks.explorer.fuzz` sends a thousand."""
ADDRESSES = 11


@pytest.fixture(scope="module")
def guarded(tiny_index):
    app = make_app(opened([tiny_index]))
    yield Guard(app, hosts=("localhost",))
    app.state.line.close()


@pytest.fixture(scope="module")
def answer(guarded):
    """An answer that is there."""
    with TestClient(guarded, base_url="http://localhost") as client:
        told = client.post("/api/answers", json={"prompt": "5 and 3?", "completion": " yes, 12"}).text
    return json.loads(told.splitlines()[-1])["answer"]


@pytest.mark.parametrize("mode", [*GenerationMode])
def test_no_request_is_a_failure(guarded, answer, mode):
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", guarded, headers={"host": "localhost"})
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == ADDRESSES
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.path == "/api/session":
            continue  # it takes nothing that could be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def send(case):
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "answer" in case.body:
                case.body["answer"] = answer
            found = case.call(headers={"host": "localhost"})
            assert found.status_code < 500, found.text
            assert "Traceback" not in found.text and FAILED not in found.text
            if found.status_code >= 400:
                assert json.loads(found.text)["error"]

        send()
