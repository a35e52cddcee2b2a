"""A full disk and a missing permission under every command: one line that names the path, and then it works.

    python -m benchmarks.reliability.disk [--dir DIR] [-o FILE]        as root, on Linux: it mounts a tmpfs

**Full.** Each command that writes does so into a tmpfs that holds all but the last bytes of what it needs: 0, 25, 50,
75 and 95% of them. It must end with one line that names a path there and what mends it. Then the tmpfs is made larger,
and the same command must end well. Last, the directory is removed while the command runs, at the same places: one
line, or the work done all the same.

**Permission.** In a child without the capabilities by which root passes permissions, each input, or each of its files
for a directory, is made unreadable, and the output's directory unwritable: one line that names it and says so.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reliability.calls import Ending, whence
from benchmarks.reliability.inputs import VERBS, Inputs

RESULTS = Path(__file__).parent / "results" / "disk.json"
SHARES = (0.0, 0.25, 0.5, 0.75, 0.95)
PAGE = 4096
NO_WORDS = ("denied", "permi", "not permitted", "may not")
"""One of these is in a message of a missing permission."""

WRITERS: dict[str, dict[str, Any]] = {
    "train": {"max_steps": 4, "checkpoints": 2, "batch_size": 4, "lr": "1e-2"},
    "index": {}, "append": {}, "trace": {"out": "trace.jsonl"},
    "select": {"out": "chosen.parquet", "report": "page.html"},
    "recover": {"method": "calibrated", "epochs": 1, "lr": "1e-3", "optimizer": "adamw", "batch_size": 4,
                "mixture": "runs", "out": "rows.csv", "count": 10},
    "ablate": {"out": "table.csv", "report": "page.html", "method": "regmean"}, "evaluate selection": {"out": "t.csv"},
    "evaluate join": {"out": "points.csv"}, "mix law": {"out": "mix.csv", "report": "page.html"},
    "mix suggest": {"out": "mix.csv"}, "pool train": {}, "pool merge": {"yaml": "recipe.yaml"}, "pool grams": {},
    "demo": {},
}  # fmt: skip
"""Commands that write, with values beside the cheap ones; names of files are of the disk."""
FILES = {"out", "report", "yaml"}
INPUTS = {
    "model",
    "corpus",
    "index",
    "tasks",
    "source",
    "base",
    "final",
    "parent",
    "path",
    "pool",
    "table",
    "evaluated",
    "graded",
}
"""Parameters that name what is read."""


def words_on(inputs: Inputs, verb: str, disk: Path) -> list[Any]:
    """The words of a command whose outputs are on a disk."""
    values = VERBS[verb](inputs, disk) | WRITERS.get(verb, {})
    values = {k: disk / v if k in FILES and isinstance(v, str) and "." in v else v for k, v in values.items()}
    if verb == "demo":
        values = {"out": disk / "demo"}
    if verb == "ablate":
        values["path"] = disk / "pool"
    if verb == "pool grams":
        shutil.rmtree(disk / "pool" / "grams")
    return inputs.words(verb, values)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(PAGE, size)}", "whence-disk", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def room_of(path: Path) -> int:
    """Bytes that a tmpfs needs for what is in a directory."""
    return sum(-(-file.lstat().st_size // PAGE) * PAGE for file in path.rglob("*") if file.is_file())


def copies(inputs: Inputs, verb: str, disk: Path) -> None:
    """What a command changes must lie on the disk before it begins; `words_on` copies the rest."""
    if verb == "ablate":
        shutil.copytree(inputs.pool, disk / "pool", ignore=shutil.ignore_patterns("losses", "grams"))


def full(inputs: Inputs, verb: str, scratch: Path) -> dict[str, Any]:
    """A command on disks that are too small, each then made large enough."""
    with small_disk(scratch / "disk", 1 << 28) as disk:
        copies(inputs, verb, disk)
        words = words_on(inputs, verb, disk)
        before = room_of(disk)
        whole, most = while_measured(disk, lambda: whence(*words, seconds=300))
    cases = []
    for share in SHARES:
        with small_disk(scratch / "disk", 1 << 28) as disk:
            copies(inputs, verb, disk)
            words = words_on(inputs, verb, disk)
            size = before + int(share * (most - before)) // PAGE * PAGE
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(PAGE))  # a tmpfs has one page at least
            subprocess.run(["mount", "-o", f"remount,size={PAGE + size}", disk], check=True)
            ending = whence(*words, seconds=300)
            subprocess.run(["mount", "-o", f"remount,size={1 << 28}", disk], check=True)
            ballast.unlink(missing_ok=True)
            after = whence(*words, seconds=300)
        names = str(disk) in ending.text and len(ending.text) > len(str(disk)) + 20
        cases.append({"share": share, **vars(ending), "names the path": names, "after": after.outcome,
                      "after text": after.text if after.outcome != "ok" else ""})  # fmt: skip
    return {"verb": verb, "needs": most - before, "whole": whole.outcome, "whole text": whole.text, "full": cases}


def while_measured(disk: Path, call: Any) -> tuple[Ending, int]:
    """A call's ending, and the most bytes that its disk held meanwhile."""
    most, stop = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not stop.is_set():
            state = os.statvfs(disk)
            most = max(most, (state.f_blocks - state.f_bfree) * state.f_bsize)
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        return call(), most
    finally:
        stop.set()
        thread.join()


def removed(inputs: Inputs, verb: str, scratch: Path, seconds: float) -> dict[str, Any]:
    """A command whose output directory is removed while it runs."""
    cases = []
    for share in (0.3, 0.6, 0.9):
        disk = scratch / "gone"
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir(parents=True)
        copies(inputs, verb, disk)
        words = words_on(inputs, verb, disk)

        def remove(disk: Path = disk) -> None:
            for path in disk.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

        timer = threading.Timer(share * seconds, remove)
        timer.start()
        ending = whence(*words, seconds=300)
        timer.cancel()
        timer.join()
        cases.append({"share": share, **vars(ending)})
    return {"verb": verb, "removed": cases}


def without_privilege(call: Any) -> Ending:
    """A call in a child that permissions bind, though it is root."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as stream:
            data = stream.read()
        os.waitpid(child, 0)
        return Ending(**json.loads(data))
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    none = (ctypes.c_uint32 * 6)()
    assert libc.capset(header, none) == 0
    with os.fdopen(writing, "w") as stream:
        json.dump(vars(call()), stream)
    os._exit(0)


def permissions(inputs: Inputs, verb: str, scratch: Path) -> list[dict[str, Any]]:
    """A command that may not read one of its inputs, and one that may not write."""
    cases = []
    for name in [*sorted(INPUTS), *sorted(FILES), "work"]:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        copies(inputs, verb, scratch)
        values = VERBS[verb](inputs, scratch) | WRITERS.get(verb, {})
        values = {k: scratch / v if k in FILES and isinstance(v, str) and "." in v else v for k, v in values.items()}
        if name not in values or not isinstance(values[name], Path):
            continue
        path = values[name]
        if name in INPUTS:
            copy = scratch / f"input-{path.name}"
            shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
            values[name] = copy
            files = {p.parent if p.parent.name == "losses" else p: p for p in copy.rglob("*") if p.is_file()}
            locked = [copy, *sorted(files.values())] if copy.is_dir() else [copy]
        else:
            locked = [scratch / "locked"]
            locked[0].mkdir()
            values[name] = locked[0] / path.name
        words = inputs.words(verb, values)
        for target in locked:
            mode = target.stat().st_mode
            target.chmod(0o555 if target.name == "locked" else 0)
            ending = without_privilege(lambda words=words: whence(*words, seconds=300))
            target.chmod(mode)
            is_told = ending.outcome == "ok" or any(word in ending.text.lower() for word in NO_WORDS)
            cases.append(
                {"verb": verb, "what": f"{name} {target.relative_to(scratch)}", **vars(ending), "told": is_told}
            )
            for made in ("ix", "run", "pool", "w", "merged"):
                if name in INPUTS and made != Path(str(words[1])).name:
                    shutil.rmtree(scratch / made, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return cases


def main(arguments: argparse.Namespace) -> None:
    """All commands, or those that are named."""
    inputs = Inputs(Path(arguments.dir).absolute())
    scratch = Path(tempfile.mkdtemp(prefix="whence-disk-"))
    document: dict[str, Any] = {"full": [], "removed": [], "permission": []}
    for verb in arguments.verbs or [*VERBS]:
        if verb in WRITERS and not (verb == "demo" and not arguments.demo):
            start = time.perf_counter()
            whence(*words_on(inputs, "info", scratch), seconds=60)
            document["full"].append(case := full(inputs, verb, scratch))
            for item in case["full"]:
                is_good = item["outcome"] == "refused" and item["names the path"] and item["after"] == "ok"
                print("  " if is_good or item["outcome"] == "ok" else "! ", verb, "full", item, flush=True)
            seconds = (time.perf_counter() - start) / 10
            document["removed"].append(case := removed(inputs, verb, scratch, seconds))
            for item in case["removed"]:
                print(
                    "! " if item["outcome"] in ("traceback", "hang") or item["lines"] else "  ",
                    verb,
                    "removed",
                    item,
                    flush=True,
                )
        if verb != "demo":
            document["permission"] += (cases := permissions(inputs, verb, scratch / "locks"))
            for item in cases:
                is_good = item["outcome"] == "ok" or (item["outcome"] == "refused" and item["told"])
                print("  " if is_good else "! ", item, flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*")
    parser.add_argument("--dir", default="/tmp/whence-fuzz")
    parser.add_argument("--demo", action="store_true", help="The demo too, which trains for a minute each time.")
    parser.add_argument("-o", "--out")
    main(parser.parse_args())
