"""Workers of Ray: the local bytes whatever happens to them, how much faster two are than one, and two hosts.

    python -m benchmarks.indexing.workers [same] [workers] [drivers] [straggler] [speed] [hosts] [--kills 10] [--seed 0]
        [--model ../shared/models/base-6m] [--corpus ../shared/data/instruct/alpaca.jsonl] [-o FILE]

    same       index, append, verify --repair, pool train and bank by two workers and by one process of one thread
    workers    `whence index --engine ray --workers 2`, of whose workers one is killed (SIGKILL) while it computes a
               shard, `--kills` times at drawn moments
    drivers    the command itself is killed so many times, and run again until it ends; what is left of its processes
    straggler  a worker is stopped (SIGSTOP) for good while it computes
    speed      an index of real rows by the small model: one process of one thread against two workers, three times in
               turn; the start of Ray and of the workers is part of it, and is told apart
    hosts      two network namespaces joined by a veth pair: a head with a worker, and a node with another. The index is
               built in an object store of the head's, and the link is down for 40 seconds in the middle (needs root)

"The same" is byte for byte. Times are of this machine, which has two cores.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.reliability.faulty_store import BUCKET

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from conftest import contents, corpus_rows, save_tiny_llama, write_jsonl

RESULTS = Path(__file__).parent / "results" / "workers.json"
TWO = ["--engine", "ray", "--workers", "2"]
ROWS_A_PART = 32
SMALL = f"""
import importlib, sys
importlib.import_module("whence.indexing.ingest").ROWS_PER_SHARD = {ROWS_A_PART}
from whence.cli.app import run
run()
"""
"""The command line, with parts of few rows: many shards to be killed at."""


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=[*STAGES])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1000, help="of the stage speed, and half of them of the kills")
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--corpus", default="../shared/data/instruct/alpaca.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", type=Path, default=RESULTS, dest="out")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.model = str(Path(options.model).resolve())
    for stage in options.stages:
        with tempfile.TemporaryDirectory() as folder:
            found = STAGES[stage](options, Path(folder)) | {"date": time.strftime("%Y-%m-%d")}
        document = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(document | {stage: found}, indent=1) + "\n")
        print(stage, json.dumps(found), flush=True)


def whence(*words: object, **more: Any) -> float:
    """Run a command; its seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", SMALL, *map(str, words)], check=True, stdout=subprocess.DEVNULL, **more)
    return time.perf_counter() - start


def begun(*words: object, **more: Any) -> subprocess.Popen:
    """Start a command."""
    return subprocess.Popen([sys.executable, "-c", SMALL, *map(str, words)], stdout=subprocess.DEVNULL, **more)


def real_rows(options: argparse.Namespace, folder: Path, count: int) -> Path:
    """Rows of the corpus, as a file."""
    lines = Path(options.corpus).read_text().splitlines()[:count]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def stage_same(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every job by workers, and here."""
    model, rows = save_tiny_llama(folder / "model"), write_jsonl(folder / "rows.jsonl", corpus_rows(200))
    more, held = write_jsonl(folder / "more.jsonl", corpus_rows(80, first=200)), folder / "held.jsonl"
    write_jsonl(held, corpus_rows(5, first=500))
    run, same = folder / "run", {}
    whence("train", model, rows, "-o", run, "--epochs", 1, "--batch-size", 8, "--max-tokens", 32)
    for kind, how in (("here", []), ("there", TWO)):
        home = folder / kind
        whence("index", model, rows, "-o", home / "index", *how)
        whence("append", home / "index", more, *how)
        budget = ["--tokens", 400, "--steps", 4, "--warmup-steps", 1, "--max-tokens", 32]
        whence("pool", "train", model, rows, "-o", home / "pool", *budget, *how)
        whence("bank", run, rows, "-o", home / "bank", "--queries", held, "--subsets", 4, "--keep-weights", *how)
    for kind in ("index", "pool", "bank"):
        here, there = (timeless(contents(folder / home / kind)) for home in ("here", "there"))
        differ = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
        same[kind] = {"files": len(here), "that differ": sorted(differ)}
    for shard in sorted((folder / "there" / "index").glob("checkpoint-*/*"))[:3]:
        shard.write_bytes(b"damaged")
    whence("verify", folder / "there" / "index", "--repair", *TWO)
    same["repaired"] = contents(folder / "there" / "index") == contents(folder / "here" / "index")
    return same


def timeless(files: dict[str, bytes]) -> dict[str, object]:
    """Files, of which a bank's members say how long they took."""
    return {
        name: {key: value for key, value in json.loads(data).items() if key not in ("seconds", "checksum")}
        if name.endswith("member.json")
        else data
        for name, data in files.items()
    }


def local_index(options: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, bytes], float]:
    """Rows, the files of a local index of them, and its seconds."""
    rows = real_rows(options, folder, options.rows // 2)
    seconds = whence("index", options.model, rows, "-o", folder / "here")
    return rows, contents(folder / "here"), seconds


def workers_of(mark: str) -> list[int]:
    """Workers that are at a job, of the command with a mark in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            at_work = (process / "cmdline").read_bytes().startswith(b"ray::Worker.do")
            if at_work and mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def marked(folder: Path) -> tuple[str, dict[str, str]]:
    """A mark, and an environment that has it."""
    mark = f"WHENCE_MARK={folder.name}"
    return mark, os.environ | {"WHENCE_MARK": folder.name}


def stage_workers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Workers killed at work."""
    rows, expected, alone = local_index(options, folder)
    mark, environment = marked(folder)
    dice, killed, builds, same, start = random.Random(options.seed), 0, 0, 0, time.perf_counter()
    while killed < options.kills:
        child = begun("index", options.model, rows, "-o", folder / f"there-{builds}", *TWO, env=environment)
        while child.poll() is None:
            if killed < options.kills and (busy := workers_of(mark)):
                time.sleep(dice.uniform(0, 2.0))
                with suppress(ProcessLookupError):
                    os.kill(dice.choice(busy), signal.SIGKILL)
                    killed += 1
                time.sleep(dice.uniform(2.0, 5.0))
            time.sleep(0.05)
        assert child.returncode == 0, f"build {builds} failed after {killed} kills"
        same += contents(folder / f"there-{builds}") == expected
        builds += 1
    return {"kills": killed, "builds": builds, "with the local bytes": same, "shards": shards_in(expected),
            "seconds": time.perf_counter() - start, "seconds of one undisturbed, here": alone}  # fmt: skip


def shards_in(files: dict[str, bytes]) -> int:
    """Number of shards."""
    return sum("shard" in name for name in files)


def stage_drivers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The command killed."""
    rows, expected, _ = local_index(options, folder)
    mark, environment = marked(folder)
    dice, killed, builds, same, left = random.Random(options.seed), 0, 0, 0, 0
    while killed < options.kills:
        place, ends = folder / f"there-{builds}", False
        while not ends:
            child = begun("index", options.model, rows, "-o", place, *TWO, env=environment)
            while child.poll() is None and not workers_of(mark):
                time.sleep(0.05)
            if killed < options.kills and child.poll() is None:
                time.sleep(dice.uniform(0, 4.0))
                if child.poll() is None:
                    child.kill()
                    killed += 1
                    child.wait()
                    limit = time.monotonic() + 60
                    while processes_of(mark) and time.monotonic() < limit:
                        time.sleep(0.2)
                    left += len(processes_of(mark))
                    continue
            assert child.wait() == 0, "a build failed"
            ends = True
        same += contents(place) == expected
        builds += 1
    return {"kills": killed, "builds": builds, "with the local bytes": same, "processes left": left}


def processes_of(mark: str) -> list[str]:
    """All processes of a command, without Ray's own agents, which look for it once in a while."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_agent = b"Agent" in (process / "cmdline").read_bytes()
            if not is_agent and mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found


def stage_straggler(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A worker stopped for good."""
    rows, expected, alone = local_index(options, folder)
    mark, environment = marked(folder)
    start = time.perf_counter()
    child = begun("index", options.model, rows, "-o", folder / "there", *TWO, env=environment, stderr=subprocess.PIPE)
    while not (busy := workers_of(mark)):
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(busy[0], signal.SIGSTOP)
    _, said = child.communicate()
    assert child.returncode == 0, said
    return {"with the local bytes": contents(folder / "there") == expected, "seconds": time.perf_counter() - start,
            "seconds of one undisturbed, here": alone, "said": b"the first result counts" in said}  # fmt: skip


def stage_speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Two workers against one process."""
    rows = real_rows(options, folder, options.rows)
    seconds: dict[str, list[float]] = {"one process": [], "two workers": []}
    starting = []
    for number in range(3):
        seconds["one process"].append(whence("index", options.model, rows, "-o", folder / f"here-{number}"))
        start, place = time.perf_counter(), folder / f"there-{number}"
        mark, environment = marked(folder)
        child = begun("index", options.model, rows, "-o", place, *TWO, env=environment)
        while len(workers_of(mark)) < 2 and child.poll() is None:
            time.sleep(0.02)
        starting.append(time.perf_counter() - start)
        assert child.wait() == 0
        seconds["two workers"].append(time.perf_counter() - start)
        print(number, seconds, starting, flush=True)
    few = real_rows(options, folder, 1)
    idle = whence("index", options.model, few, "-o", folder / "few")  # imports, loading, checking
    whole = [one / two for one, two in zip(seconds["one process"], seconds["two workers"], strict=True)]
    pairs = zip(seconds["one process"], seconds["two workers"], starting, strict=True)
    steady = [(one - idle) / (two - begin) for one, two, begin in pairs]
    return {"rows": options.rows, "seconds": seconds, "seconds until both workers are at work": starting,
            "seconds of an index of one row": idle, "throughput, start and all": statistics.median(whole),
            "throughput, at work": statistics.median(steady), "load": os.getloadavg()[0]}  # fmt: skip


def workers_at_work(namespace: str) -> int | None:
    """A worker in a network namespace that is at a job."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
    for process in map(int, listed):
        with suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::Worker.do"):
                return process
    return None


HEAD, NODE = "10.77.0.1", "10.77.0.2"


def stage_hosts(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Two namespaces as two hosts, and a link that breaks."""
    rows, expected, alone = local_index(options, folder)
    inside = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus", "1", "--disable-usage-stats"]
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": "whence", "AWS_SECRET_ACCESS_KEY": "whence", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{HEAD}:9000", "WHENCE_CACHE": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
    }  # fmt: skip
    servers: list[subprocess.Popen] = []
    try:
        for words in (["netns", "add", "whence-a"], ["netns", "add", "whence-b"],
                      ["link", "add", "wa", "netns", "whence-a", "type", "veth", "peer", "name", "wb", "netns",
                       "whence-b"],
                      ["-n", "whence-a", "addr", "add", f"{HEAD}/24", "dev", "wa"],
                      ["-n", "whence-b", "addr", "add", f"{NODE}/24", "dev", "wb"],
                      *(["-n", f"whence-{end}", "link", "set", device, "up"]
                        for end in "ab" for device in (f"w{end}", "lo"))):  # fmt: skip
            subprocess.run(["ip", *words], check=True)
        store = "from moto.server import main; main(['-H', '0.0.0.0', '-p', '9000'])"
        servers.append(subprocess.Popen(["ip", "netns", "exec", "whence-a", sys.executable, "-c", store],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))  # fmt: skip
        time.sleep(5)
        make = f"import boto3; boto3.client('s3').create_bucket(Bucket={BUCKET!r})"
        subprocess.run(["ip", "netns", "exec", "whence-a", sys.executable, "-c", make], check=True, env=environment)
        for end, more in (("a", ["--head", "--node-ip-address", HEAD, "--port", "6379", "--include-dashboard", "false",
                                 "--temp-dir", str(folder / "ra")]),
                          ("b", ["--address", f"{HEAD}:6379", "--node-ip-address", NODE])):  # fmt: skip
            servers.append(subprocess.Popen(["ip", "netns", "exec", f"whence-{end}", *inside, *more, "--block"],
                                            env=environment, stdout=subprocess.DEVNULL))  # fmt: skip
            time.sleep(15)
        start, place = time.perf_counter(), f"s3://{BUCKET}/hosts"
        driver = [
            "ip",
            "netns",
            "exec",
            "whence-a",
            sys.executable,
            "-c",
            SMALL,
            "index",
            options.model,
            str(rows),
            "-o",
            place,
        ]
        child = subprocess.Popen([*driver, *TWO, "--address", f"{HEAD}:6379"], env=environment, stderr=subprocess.PIPE)
        while child.poll() is None and workers_at_work("whence-b") is None:
            time.sleep(0.1)
        time.sleep(5)
        assert child.poll() is None, "it was done before the link was cut"
        subprocess.run(["ip", "-n", "whence-b", "link", "set", "wb", "down"], check=True)
        cut = time.perf_counter() - start
        time.sleep(40)
        subprocess.run(["ip", "-n", "whence-b", "link", "set", "wb", "up"], check=True)
        _, said = child.communicate(timeout=600)
        seconds = time.perf_counter() - start
        look = f"""
import json, os, sys
from benchmarks.reliability.faulty_store import stored
from pathlib import Path
for name, data in stored("hosts").items():
    file = Path({str(folder / "fetched")!r}) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
"""
        subprocess.run(["ip", "netns", "exec", "whence-a", sys.executable, "-c", look], check=True, env=environment)
        return {"exit code": child.returncode, "with the local bytes": contents(folder / "fetched") == expected,
                "seconds": seconds, "cut off after": cut, "cut off for": 40, "seconds of one undisturbed, here": alone,
                "said": said.decode()[-2000:]}  # fmt: skip
    finally:
        for server in reversed(servers):
            server.terminate()
        time.sleep(3)
        for name in ("whence-a", "whence-b"):
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for process in listed:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


STAGES = {
    "same": stage_same,
    "workers": stage_workers,
    "drivers": stage_drivers,
    "straggler": stage_straggler,
    "speed": stage_speed,
    "hosts": stage_hosts,
}

if __name__ == "__main__":
    main()
