"""Requests that no page sends, made from the server's own OpenAPI: each has an answer, and none is a failure."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from whence.explorer.app import make_app
from whence.explorer.security import Guard
from whence.explorer.serving import opened

EXAMPLES = 6
"""Of each address, well formed and malformed each; `benchmarks.explorer.fuzz` sends a thousand."""
ADDRESSES = 11


@pytest.fixture(scope="module")
def guarded(tiny_index):
    app = make_app(opened([tiny_index]))
    yield Guard(app, hosts=("localhost",))
    app.state.line.close()


@pytest.mark.parametrize("mode", [*GenerationMode])
def test_no_request_is_a_failure(guarded, mode):
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
            answer = case.call(headers={"host": "localhost"})
            assert answer.status_code < 500, answer.text
            assert "Traceback" not in answer.text
            if answer.status_code >= 400:
                assert json.loads(answer.text)["error"]

        send()
