"""Requests that no page sends, made by schemathesis from the explorer's own OpenAPI: none may be a failure.

    python -m benchmarks.explorer.fuzz INDEX [--requests 1000]

Well formed and malformed ones to every address, the first with an answer that is there. A failure is a status above
499, an event that says so, or a refusal that has a traceback, or no line that says why. Written to
benchmarks/explorer/results/fuzz.json: requests by address and status, and the failures (bar: none).
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from starlette.testclient import TestClient

from whence.explorer.app import make_app
from whence.explorer.security import Guard
from whence.explorer.serving import opened
from whence.explorer.waiting_line import FAILED

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
HOST = {"host": "localhost"}
PATIENCE = 300
"""Seconds for one request: some make a pass over the corpus."""
TAKES_NOTHING = ("/api/session",)
"""Addresses that take nothing that could be wrong."""


def main() -> None:
    """Send, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    counts: Counter[tuple[str, int]] = Counter()
    failures: list[dict[str, Any]] = []

    def take(case: schemathesis.Case, response: Any) -> None:
        counts[case.operation.path, response.status_code] += 1
        if what := failure(response):
            failures.append({"address": case.operation.path, "failure": what, "body": repr(case.body)[:2000]})

    with served(options.index) as guarded:
        answer = answer_of(guarded)
        examples = options.requests // (2 * len(operations(guarded))) + 1
        while counts.total() < options.requests:
            for mode in GenerationMode:
                send(guarded, answer, mode, examples, take, seed=counts.total())
            answer = answer_of(guarded)  # the server may have forgotten the first
    document = {
        "date": time.strftime("%Y-%m-%d"), "requests": counts.total(), "failures": failures,
        "statuses": {f"{path} {status}": count for (path, status), count in sorted(counts.items())},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit(bool(failures))


@contextmanager
def served(index: str | Path) -> Iterator[Guard]:
    """The explorer of an index as an application, which is not listening."""
    app = make_app(opened([index]))
    try:
        yield Guard(app, hosts=("localhost",))
    finally:
        app.state.line.close()


def answer_of(guarded: Guard) -> str:
    """An answer that is there."""
    with TestClient(guarded, base_url="http://localhost") as client:
        text = client.post("/api/answers", json={"prompt": "5 and 3?", "completion": " yes, 12"}).text
    return json.loads(text.splitlines()[-1])["answer"]


def operations(guarded: Guard) -> list[Any]:
    """All that the server offers."""
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", guarded, headers=HOST)
    return [found.ok() for found in schema.get_all_operations()]


def send(
    guarded: Guard,
    answer: str,
    mode: GenerationMode,
    examples: int,
    take: Callable[[schemathesis.Case, Any], None],
    seed: int = 0,
) -> None:
    """Send so many requests of a kind to every address, and hand each with its response to `take`."""
    for operation in operations(guarded):
        if mode is GenerationMode.NEGATIVE and operation.path in TAKES_NOTHING:
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=examples, deadline=None, derandomize=not seed, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def send_one(case: schemathesis.Case) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "answer" in case.body:
                case.body["answer"] = answer
            take(case, case.call(headers=HOST, timeout=PATIENCE))

        send_one()


def failure(response: Any) -> str | None:
    """What is wrong with a response, if anything."""
    if response.status_code >= 500:
        return f"status {response.status_code}: {response.text[:500]}"
    if FAILED in response.text:
        return response.text[-2000:]
    if response.status_code < 400:
        return None  # it may be rows of the corpus, which may speak of tracebacks
    if "Traceback" in response.text:
        return response.text[-2000:]
    try:
        return None if json.loads(response.text)["error"] else "an empty reason"
    except (ValueError, KeyError, TypeError):
        return f"a refusal without a reason: {response.text[:500]}"


if __name__ == "__main__":
    main()
