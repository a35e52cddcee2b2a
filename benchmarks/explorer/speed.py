"""How fast the explorer is: the first answer, a drag, many viewers, a long day.

    python -m benchmarks.explorer.speed INDEX [--queries 1000] [--viewers 20] [--prompts FILE] [--name NAME]

Serves INDEX in a process of its own, as `whence explore` does, and asks over HTTP:

    answer      from the question to the first ranking: the model's answer of 24 tokens, its tokens' scores, the ranking
    rank        a ranking of another stretch of the same answer, as a drag asks it: median, 95th percentile
    viewers     so many at once, each with questions and drags of its own: errors, and the same times
    memory      resident memory of the server after 100 queries, and after all of them

Written to benchmarks/explorer/results/speed.json. Bars: 1.5 s, .1 s (95th percentile), no error, memory flat.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.indexing.speed import machine

RESULTS = Path(__file__).parent / "results" / "speed.json"
NEW_TOKENS = 24
DRAGS = 20


def main() -> None:
    """Serve, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--name", default="index")
    options = parser.parse_args()
    command = [sys.executable, "-m", "whence", "explore", options.index, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            start = time.perf_counter()
            assert server.stdout is not None
            address = re.match(r"The page is at (\S+)", server.stdout.readline())
            assert address is not None
            opening = time.perf_counter() - start
            found = {"opening": round(opening, 1)} | measured(address[1], server.pid, options)
        finally:
            server.terminate()
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document[options.name] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **found}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measured(address: str, process: int, options: argparse.Namespace) -> dict[str, Any]:
    """All parts."""
    session = call(address, "session", None)
    rows, prompts = session["indexes"][0]["rows"], session["indexes"][0]["examples"]
    ask(address, prompts[0])  # the first of all opens files
    answers, drags = [], []
    for number in range(20):
        visit(address, f"{prompts[number % len(prompts)]} {number}", answers, drags, random.Random(number))
    found: dict[str, Any] = {"rows": rows, "load": os.getloadavg()[0], "answer": told(answers), "rank": told(drags)}
    own_answers, own_drags, errors = [], [], []

    def view(number: int) -> None:
        try:
            for turn in range(3):
                prompt = f"{prompts[number % len(prompts)]} {number} {turn}"
                visit(address, prompt, own_answers, own_drags, random.Random(number))
        except Exception as error:
            errors.append(str(error))

    threads = [threading.Thread(target=view, args=(number,)) for number in range(options.viewers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["viewers"] = {
        "viewers": options.viewers,
        "errors": errors,
        "answer": told(own_answers),
        "rank": told(own_drags),
    }
    memory = []
    for number in range(options.queries):
        ask(address, f"{prompts[number % len(prompts)]} again {number}", new_tokens=8)
        if number % 100 == 99:
            memory.append(resident(process))
    found["memory, MB"] = memory
    return found


def visit(address: str, prompt: str, answers: list[float], drags: list[float], draw: random.Random) -> None:
    """One question, and drags over its answer."""
    start = time.perf_counter()
    answer, count = ask(address, prompt)
    call(address, "rankings", {"answer": answer})
    answers.append(time.perf_counter() - start)
    for _ in range(DRAGS):
        first = draw.randrange(count)
        start = time.perf_counter()
        call(address, "rankings", {"answer": answer, "tokens": [[first, draw.randrange(first, count) + 1]], "top": 10})
        drags.append(time.perf_counter() - start)


def ask(address: str, prompt: str, new_tokens: int = NEW_TOKENS) -> tuple[str, int]:
    """A question's answer, and its number of tokens; a model that ends at once is given words."""
    asked = {"prompt": prompt, "max_new_tokens": new_tokens}
    events = call(address, "answers", asked)
    if events[-1]["type"] == "error" and "ended at once" in events[-1]["error"]:
        events = call(address, "answers", asked | {"completion": " a few words"})
    assert events[-1]["type"] == "ready", events[-1]
    return events[-1]["answer"], len(next(e for e in events if e["type"] == "answer")["answer"]["tokens"])


def call(address: str, path: str, body: dict[str, Any] | None) -> Any:
    """What an address answers: an object, or all events of a stream."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}api/{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        text = answer.read().decode()
        return (
            [json.loads(line) for line in text.splitlines()]
            if "ndjson" in answer.headers["content-type"]
            else (json.loads(text))
        )


def told(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile in seconds."""
    p95 = statistics.quantiles(seconds, n=20)[-1]
    return {"count": len(seconds), "median": round(statistics.median(seconds), 4), "p95": round(p95, 4)}


def resident(process: int) -> float:
    """Resident memory of a process in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    main()
