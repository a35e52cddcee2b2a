"""Killed anywhere, does a command leave anything behind, and does it go on? Every verb that writes, by three signals.

    python -m benchmarks.reliability.kills [VERB ...] [--kills 14] [--seed 0] [--dir DIR] [-o FILE]    resumes from FILE

Each verb runs twice undisturbed, on tiny data: what it leaves is the reference, and must be the same twice. Then it is
killed, in an empty copy of its place, by SIGINT, SIGTERM and SIGKILL in turn:

    event     right before the n-th call that opens for writing, makes, renames or removes anything below that place;
              the n are drawn so that the whole run is covered evenly (`sys.addaudithook`, in the killed process)
    time      after a drawn share of the verb's time on a core; drawn anew where the verb had ended by then
    process   the same by `python -m whence`, whose imports take most of the time; others are forked from a process that
              has the imports done

After a kill it looks (a) at the exit code, 130 or 143, at the message, one line, and for a traceback; (b) at what is
left: only what `STAYS` lists for the verb, and nothing in TMPDIR, HOME, the caches and the working directory. The same
command, run again, must (c) end well with the same bytes as the reference, but for wall times (`_unvarying`), and (d)
leave nothing else. `--each` kills at every event in place of a draw.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.calls import MESSAGE
from benchmarks.reliability.disk import FILES, WRITERS, copies
from benchmarks.reliability.flips import write_rows
from benchmarks.reliability.inputs import VERBS, Inputs

from whence.checksums import digest, document_of

RESULTS = Path(__file__).parent / "results" / "kills.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
PROCESSES = 3
"""Kills of each verb that are of a process of its own, one by each signal."""
OPENINGS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.link", "os.symlink")
SECONDS = 300.0
"""Time of a run, on a core that others use too."""
LAG = 0.5
"""Seconds from a signal to the end of a run that ended well, from which the signal was passed over and not late."""
PLACES = ("tmp", "home", "cache", "cwd")
"""Directories that a process may write to unasked; all must stay empty."""

TEXT = {"prompt": "37 and 1?", "completion": " 1, 1"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("train", {}),
    "train --mix --in-run": ("train", {"mix": "online", "in_run": "held_out"}),
    "index": ("index", {"model": "final", "checkpoints": "all"}),
    "index --restart": ("index", {"model": "final", "out": "restarted", "restart": True}),
    "append": ("append", {}),
    "verify --repair": ("verify", {"index": "damaged", "repair": True}),
    "trace": ("trace", {**TEXT, "null": True, "exact": True, "index": "copy"}),
    "trace page": ("trace", {**TEXT, "null": True, "tokens": True, "index": "copy", "out": "trace.html"}),
    "select": ("select", {}),
    "recover": ("recover", {}),
    "ablate --truth": ("ablate", {"truth": True, "mixtures": "mixtures"}),
    "evaluate selection": ("evaluate selection", {"work": "w"}),
    "evaluate join": ("evaluate join", {"source": "copy", "path": "pool copy"}),
    "mix law": ("mix law", {}),
    "mix suggest": ("mix suggest", {"pool": "pool copy", "steps": 3}),
    "pool train": ("pool train", {}),
    "pool merge": ("pool merge", {}),
    "pool grams": ("pool grams", {}),
}
"""Commands by what they are called here: the verb, and values beside those of `disk.WRITERS`."""

STAYS: dict[str, tuple[str, str]] = {
    "train": (r"run(/.*)?", "checkpoints, from the newest of which the training goes on"),
    "index": (r"(ix|restarted)(/.*)?", "shards and parts that are finished, and the manifest that lists them"),
    "verify": (r"damaged(/.*)?", "the shards that are whole; a damaged one is listed as missing"),
    "append": (r"grown(/.*)?", "the index with the rows that have joined, `--undo` drops them"),
    "trace": (r"copy/levels(/.*)?", "measured levels, kept in the index for the next question"),
    "select": (r"(?!)", "nothing"),
    "recover": (r"w(/.*)?", "evidence and shadows in --work"),
    "ablate": (r"pool/(losses|grams|truth)(/.*)?", "losses and matrices in the pool, a true model's training"),
    "evaluate selection": (r"w(/.*)?", "finished cells and choices in --work"),
    "evaluate join": (r"(pool )?copy/(levels|losses|grams)(/.*)?", "levels in the index, losses in the pool"),
    "mix law": (r"(?!)", "nothing"),
    "mix suggest": (r"pool copy/(losses|grams)(/.*)?", "losses in the pool"),
    "pool train": (r"pool(/.*)?", "finished members, and the training of the one that was interrupted"),
    "pool merge": (r"\.merged\.(making|before)(/.*)?", "after SIGKILL: the next run removes them"),
    "pool grams": (r"pool/grams(/.*)?", "finished members' matrices"),
}
"""Paths that a killed verb may leave, by verb, and why; outputs that are whole may always be there."""
DRAFTS = re.compile(r"(.*/)?([^/]+\.tmp|training-[^/]+(/.*)?|\.merged\.(making|before)(/.*)?)")
"""What may stay after SIGKILL alone, which nobody can answer; the same command writes over it or removes it."""
TIMED = ("train_seconds", "select_seconds")
"""Columns of wall times in the table of `evaluate selection`."""
TIMES_OF_PAGE = rb"read in [\d,]+ s;|<dt>(?:reading|truth) seconds</dt><dd>[^<]*</dd>"
"""Wall times in the page of `ablate`."""


@dataclass
class Kill:
    """One kill, and what followed."""

    verb: str
    number: int
    signal: str
    how: str
    """`event 12 of 80 open ix/manifest.json`, or `0.4 s of 1.1`."""
    code: int = 0
    faults: list[str] = field(default_factory=list)
    """What was wrong, in words."""
    left: int = 0
    """Paths that were there after the kill, beyond the inputs."""


class Sandbox:
    """A verb's place, made anew for each run at the same path, since paths are stored in files."""

    def __init__(self, inputs: Inputs, name: str, root: Path):
        self.inputs, self.name, self.root, self.disk = inputs, name, root, root / "disk"
        self.verb, self.more = CASES[name]
        self.environment = os.environ | {"TMPDIR": str(root / "tmp"), "HOME": str(root / "home"),
                                         "XDG_CACHE_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1",
                                         "HF_HOME": str(root / "cache" / "hf")}  # fmt: skip

    def fresh(self) -> list[str]:
        """The words of the command, its inputs in place and its outputs not."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("disk", *PLACES):
            (self.root / name).mkdir(parents=True)
        copies(self.inputs, self.verb, self.disk)
        values = VERBS[self.verb](self.inputs, self.disk) | WRITERS.get(self.verb, {})
        if self.verb == "evaluate selection":
            shutil.rmtree(self.disk / "w")  # finished cells
        if self.verb == "pool grams":
            shutil.rmtree(self.disk / "pool" / "grams")
        for name, given in self.more.items():
            values[name] = self._value(given)
        if self.verb == "ablate":
            values["path"] = self.disk / "pool"
        is_file = {k: k in FILES and isinstance(v, str) and "." in v for k, v in values.items()}
        values = {k: self.disk / v if is_file[k] else v for k, v in values.items()}
        return [str(word) for word in self.inputs.words(self.verb, values)]

    def _value(self, given: Any) -> Any:
        if given in ("final", "held_out"):
            return getattr(self.inputs, given)
        if given == "mixtures":
            return write_rows(self.disk / "mixtures.jsonl", [{"s0": 1.0}, {"s0": 0.5, "s1": 0.5}])
        if given == "w":
            return self.disk / "w"
        if given in ("restarted", "damaged"):
            copy = Path(shutil.copytree(self.inputs.index, self.disk / given, ignore=shutil.ignore_patterns("levels")))
            if given == "damaged":
                shard = next(copy.rglob("shard-*"))
                shard.write_bytes(shard.read_bytes()[:-1] + b"?")
            return copy
        if given in ("copy", "pool copy"):
            source = self.inputs.index if given == "copy" else self.inputs.pool
            ignored = shutil.ignore_patterns("levels", "losses", "grams")
            return shutil.copytree(source, self.disk / given, ignore=ignored)
        return given

    def state(self) -> dict[str, str]:
        """Digests of all files by path, with what varies from run to run taken out; directories have none."""
        out = {}
        for path in sorted(self.disk.rglob("*")):
            out[str(path.relative_to(self.disk))] = "" if path.is_dir() else digest([_unvarying(path)])
        return out

    def strays(self) -> list[str]:
        """Files where no command has anything to do."""
        return [f"{place}/{path.relative_to(self.root / place)}" for place in PLACES
                for path in (self.root / place).rglob("*")]  # fmt: skip


def _unvarying(path: Path) -> bytes:
    """A file's bytes, without wall times."""
    data = path.read_bytes()
    if path.name == "costs.json":  # of an evaluation: wall times alone, by the names of cells
        return json.dumps(sorted(document_of(data)["seconds"])).encode()
    if path.name == "t.csv":
        rows = [line.split(b",") for line in data.splitlines()]
        timed = [n for n, name in enumerate(rows[0]) if name.decode() in TIMED]
        return b"\n".join(b",".join(cell for n, cell in enumerate(row) if n not in timed) for row in rows)
    return re.sub(TIMES_OF_PAGE, b"", data) if path.suffix == ".html" else data


@dataclass(frozen=True)
class Run:
    """How a process ended."""

    code: int
    stderr: str
    seconds: float
    """Of a core, as long as it was looked at."""
    lag: float
    """Seconds from the signal to its end."""
    events: list[str]


def run_forked(sandbox: Sandbox, words: list[str], *, at_event: int = -1, after: float = 1e9, number: int = 0) -> Run:
    """A command in a child of this process, which has all imports done; killed by itself before an event, or by us."""
    log, errors = sandbox.root / "events", sandbox.root / "stderr"
    child = os.fork()
    if not child:
        _child(sandbox, words, log, errors, at_event, number)
    return _waited(child, after, number, log, errors, True)


def _waited(child: int, after: float, number: int, log: Path, errors: Path, is_forked: bool) -> Run:
    """Wait for a process, and kill it once it has had so many seconds of a core; a forked one's begin with its log."""
    start, seconds, before, sent = time.perf_counter(), 0.0, 0.0, 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        now = time.perf_counter()
        if done:
            break
        with contextlib.suppress(OSError, ValueError):
            seconds = int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) / 1e9
        if is_forked and not log.exists():
            before = seconds
        if seconds - before > after and not sent:
            os.kill(child, number)
            sent = now
        if now - start > SECONDS:
            os.kill(child, signal.SIGKILL)
            raise SystemExit(f"a command did not end within {SECONDS:.0f} s: {errors.read_text()[-500:]}")
        time.sleep(0.001)
    events = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    text = errors.read_text("utf-8", "replace")
    log.unlink(missing_ok=True)
    errors.unlink(missing_ok=True)
    return Run(os.waitstatus_to_exitcode(status), text, seconds - before, now - sent if sent else 0.0, events)


def _child(sandbox: Sandbox, words: list[str], log: Path, errors: Path, at_event: int, number: int) -> None:
    """Be `whence` with these words, and never return."""
    import atexit

    out = os.open(os.devnull, os.O_RDWR)
    os.dup2(out, 0)
    os.dup2(out, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    prefix, count, events = str(sandbox.disk), 0, -1

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPENINGS and str(arguments[0]).startswith(prefix):
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            os.write(events, f"{event} {str(arguments[0]).removeprefix(prefix)}\n".encode("utf-8", "replace"))
            count += 1
            if count == at_event:
                os.kill(os.getpid(), number)

    os.environ |= sandbox.environment
    os.chdir(sandbox.root / "cwd")
    sys.argv = ["whence", *words]
    from whence.cli.app import main

    sys.addaudithook(look)
    events = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    code = 1
    try:
        main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


def run_process(sandbox: Sandbox, words: list[str], *, after: float = 1e9, number: int = 0) -> Run:
    """The same in a process of its own."""
    errors = sandbox.root / "stderr"
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "whence", *words], env=sandbox.environment, cwd=sandbox.root / "cwd",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream,
        )  # fmt: skip
    return _waited(process.pid, after, number, sandbox.root / "events", errors, False)


def message_faults(run: Run, number: int) -> list[str]:
    """(a): the exit code and what was said."""
    if number == signal.SIGKILL:
        return [] if run.code == -signal.SIGKILL else [f"exit code {run.code}"]
    faults = [] if run.code == 128 + number else [f"exit code {run.code}"]
    lines = run.stderr.splitlines()
    extra = [line for line in lines if line.strip() and not MESSAGE.match(line)]
    if extra:
        faults.append(f"stderr: {extra[0][:200]} ... {extra[-1][:200]}")
    messages = [line for line in lines if line.startswith("error ")]
    if len(messages) != 1 or not messages[0].startswith("error stopped."):
        faults.append(f"{len(messages)} messages: {' | '.join(messages)[:300]}")
    return faults


def left_faults(sandbox: Sandbox, left: Mapping[str, str], reference: Mapping[str, str], number: int) -> list[str]:
    """(b): what may not be there."""
    pattern, _ = STAYS[sandbox.verb]
    faults = [f"left {path}" for path in sandbox.strays()]
    for path, content in left.items():
        is_draft = DRAFTS.fullmatch(path) is not None
        if is_draft and number == signal.SIGKILL:
            continue
        is_whole = reference.get(path) == content and sandbox.verb != "pool merge"
        if is_draft or not (is_whole or re.fullmatch(pattern, path) or _is_whole_model(path, left, reference)):
            faults.append(f"left {path}")
    return faults


def _is_whole_model(path: str, left: Mapping[str, str], reference: Mapping[str, str]) -> bool:
    """Whether a path is of a merged model, or is the recipe beside it, that is there as a whole."""
    inside = {name: content for name, content in reference.items() if name.partition("/")[0] == path.partition("/")[0]}
    return bool(inside) and all(left.get(name) == content for name, content in inside.items())


def again_faults(sandbox: Sandbox, words: list[str], reference: Mapping[str, str]) -> list[str]:
    """(c) and (d): how the same command goes on."""
    run = run_forked(sandbox, words)
    if run.code:
        return [f"run again: exit code {run.code}: {run.stderr[-400:].strip()}"]
    faults, state = [f"run again: left {path}" for path in sandbox.strays()], sandbox.state()
    faults += [f"run again: left {path}" for path in state.keys() - reference.keys()]
    faults += [f"run again: no {path}" for path in reference.keys() - state.keys()]
    return faults + [f"run again: unequal {path}" for path, content in state.items()
                     if path in reference and reference[path] != content]  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    state: dict[str, str]
    inputs: dict[str, str]
    """What was there before it began."""
    events: list[str]
    seconds: float
    process_seconds: float
    import_seconds: float
    """Of `whence --help`: the imports of every command."""


def reference_of(sandbox: Sandbox) -> Reference:
    """What a verb leaves undisturbed: the same whether it is forked or a process of its own."""
    states, first = [], None
    for runner in (run_forked, run_process):
        words = sandbox.fresh()
        before = sandbox.state()
        run = runner(sandbox, words)
        assert run.code == 0, (sandbox.name, run)
        states.append(sandbox.state())
        first = run if runner is run_forked else first
        assert not sandbox.strays(), sandbox.strays()
        differing = {
            path for path in states[0].keys() | states[-1].keys() if states[0].get(path) != states[-1].get(path)
        }
        assert not differing, (sandbox.name, differing)
    assert first is not None
    importing = run_process(sandbox, ["--help"])
    return Reference(states[0], before, first.events, first.seconds, run.seconds, importing.seconds)


def kill(sandbox: Sandbox, reference: Reference, number: int, each: bool, kills: int, seed: int) -> Kill:
    """One kill, and the same command again."""
    sign = SIGNALS[number % 3]
    for attempt in range(9):  # until it is in time
        rng = random.Random(f"{seed} {sandbox.name} {number} {attempt}")
        words = sandbox.fresh()
        run, how = _killed(sandbox, words, reference, number, sign, rng, each=each, shares=kills - PROCESSES)
        is_over = run.code in (0, -sign) and run.lag < LAG and sandbox.state() == reference.state
        if not is_over or "event" in how or (sign == signal.SIGKILL and run.code):
            break
    result = Kill(sandbox.name, number, signal.Signals(sign).name, how, run.code)
    left = {path: content for path, content in sandbox.state().items() if reference.inputs.get(path) != content}
    result.left = len(left)
    result.faults += message_faults(run, sign)
    result.faults += left_faults(sandbox, left, reference.state, sign)
    gone = reference.inputs.keys() - sandbox.state().keys()
    if "restart" not in sandbox.name:  # which removes the index that was there
        result.faults += [f"lost {path}" for path in gone if path in reference.state]
    result.faults += again_faults(sandbox, words, reference.state)
    return result


def _killed(
    sandbox: Sandbox, words: list[str], reference: Reference, number: int, sign: int, rng: random.Random,
    *, each: bool, shares: int,
) -> tuple[Run, str]:  # fmt: skip
    """The run that is killed, and when it was."""
    if not each and number >= shares:
        after = rng.uniform(reference.import_seconds / 2, 0.95 * reference.process_seconds)
        run = run_process(sandbox, words, after=after, number=sign)
        return run, f"process, {after:.2f} s of {reference.process_seconds:.2f}"
    if not each and number % 4 == 3:
        after = rng.uniform(0.05, 0.95) * reference.seconds
        run = run_forked(sandbox, words, after=after, number=sign)
        return run, f"time, {after:.2f} s of {reference.seconds:.2f}"
    total = len(reference.events)
    at = number + 1 if each else 1 + int((number + rng.random()) / shares * total)
    run = run_forked(sandbox, words, at_event=at, number=sign)
    return run, f"event {at} of {total}, {reference.events[at - 1]}"


def imports() -> None:
    """Whatever commands import, so that a forked one need not."""
    import importlib
    import pkgutil

    import whence

    for module in pkgutil.walk_packages(whence.__path__, "whence."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import accelerate  # noqa: F401
    import bm25s  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.optimize  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts by verb."""
    out: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(item["verb"] for item in results):
        of_verb = [item for item in results if item["verb"] == name]
        kinds: dict[str, Callable[[str], bool]] = {
            "message": lambda fault: fault.startswith(("exit code", "stderr", "0 mess", "1 mess", "2 mess")),
            "left behind": lambda fault: fault.startswith(("left", "lost", "run again: left")),
            "resumed unequal": lambda fault: fault.startswith("run again") and "left" not in fault,
        }
        counts = {kind: sum(any(map(is_it, item["faults"])) for item in of_verb) for kind, is_it in kinds.items()}
        out[name] = {"kills": len(of_verb), **counts}
    return out


def main(arguments: argparse.Namespace) -> None:
    """Do the kills that FILE does not have yet."""
    out = Path(arguments.out or RESULTS)
    document = json.loads(out.read_text()) if out.exists() else {"seed": arguments.seed, "summary": {}, "kills": []}
    if document["seed"] != arguments.seed:
        raise SystemExit(f"{out} has another seed")
    root = Path(arguments.dir).absolute()
    inputs = Inputs(root / "inputs")
    before = inputs.digest()
    imports()
    done = {(item["verb"], item["number"]) for item in document["kills"]}
    for name in arguments.verbs or [*CASES]:
        sandbox = Sandbox(inputs, name, root / "sandbox")
        if not arguments.each and all((name, number) in done for number in range(arguments.kills)):
            continue
        reference = reference_of(sandbox)
        print(f"{name}: {len(reference.events)} events, {reference.seconds:.1f} s forked, "
              f"{reference.process_seconds:.1f} s as a process, {len(reference.state)} paths", flush=True)  # fmt: skip
        for number in range(len(reference.events) if arguments.each else arguments.kills):
            if (name, number) in done:
                continue
            result = kill(sandbox, reference, number, arguments.each, arguments.kills, arguments.seed)
            print("! " if result.faults else "  ", asdict(result), flush=True)
            document["kills"].append(asdict(result))
            document["summary"] = summary(document["kills"])
            out.write_text(json.dumps(document, indent=1) + "\n")
    shutil.rmtree(root / "sandbox", ignore_errors=True)
    document["inputs changed"] = inputs.digest() != before
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["summary"], indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*")
    parser.add_argument("--kills", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", action="store_true", help="Kill at every event, the signals in turn.")
    parser.add_argument("--dir", default="/tmp/whence-kills")
    parser.add_argument("-o", "--out")
    main(parser.parse_args())
