"""Requests that no page sends, made from the server's own OpenAPI: each has an answer, and none is a failure."""

import pytest
from benchmarks.explorer.fuzz import answer_of, failure, operations, send, served
from schemathesis.generation import GenerationMode

from whence.explorer.waiting_line import FAILED

EXAMPLES = 6
"""Of each address, well formed and malformed each; `benchmarks.explorer.fuzz` sends a thousand."""
ADDRESSES = 11


@pytest.fixture(scope="module")
def guarded(tiny_index):
    with served(tiny_index) as guarded:
        yield guarded


@pytest.fixture(scope="module")
def answer(guarded):
    """An answer that is there."""
    return answer_of(guarded)


@pytest.mark.parametrize("mode", [*GenerationMode])
def test_no_request_is_a_failure(guarded, answer, mode):
    addresses = set()

    def take(case, response):
        addresses.add(case.operation.path)
        assert failure(response) is None, f"{case.operation.path} {case.body!r}"

    assert len(operations(guarded)) == ADDRESSES
    send(guarded, answer, mode, EXAMPLES, take)
    assert len(addresses) >= ADDRESSES - (mode is GenerationMode.NEGATIVE)


def test_a_failure_is_told():
    class Response:
        def __init__(self, status_code, text):
            self.status_code, self.text = status_code, text

    assert failure(Response(200, "{}")) is None
    assert failure(Response(422, '{"error": "so"}')) is None
    assert failure(Response(200, "a row about a Traceback")) is None
    refusals = ["Not found", '{"error": ""}', "[]", '{"error": "Traceback"}']
    for status, text in [(500, "{}"), (200, FAILED), *((404, text) for text in refusals)]:
        assert failure(Response(status, text))
