"""Does an index of more shards than there are file handles answer? A trace, `verify` and `select` at a limit of 256.

    python -m benchmarks.reliability.many_shards [--shards 5000] [--handles 256] [--name NAME] [-o FILE]

An index of 16 alpaca rows by base-6m is made, its one shard and its one part are copied 5,000 times, and the manifest
lists the copies. NAME is the commit's name in the results; each run adds its own to FILE.
"""

import argparse
import contextlib
import io
import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from whence.cli.app import main as whence_main
from whence.indexing.manifest import part_file, shard_file
from whence.indexing.store import Store

RESULTS = Path(__file__).parent / "results" / "many_shards.json"


def answer(*words: str) -> dict[str, Any]:
    """Exit code, seconds and last line of a command of `whence`."""
    out, errors, begin, code = io.StringIO(), io.StringIO(), time.perf_counter(), 0
    sys.argv = ["whence", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            whence_main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    lines = [line.strip() for line in (errors if code else out).getvalue().splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return {"code": code, "seconds": round(time.perf_counter() - begin, 1), "last line": last[:200]}


def many_shards(model: str, corpus: str, folder: Path, count: int) -> Path:
    """An index of as many shards."""
    rows = Path(corpus).read_text().splitlines()[:16]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    root = folder / "index"
    made = answer("index", model, str(folder / "rows.jsonl"), "-o", str(root), "--width", "4")
    assert made["code"] == 0, made
    store = Store.open(root)
    manifest, (part,), (shard,) = store.manifest, store.manifest.parts, store.manifest.shards
    parts, shards = [], []
    for number in range(count):
        parts.append(replace(part, file=part_file(number), first_row=number * part.rows))
        shards.append(replace(shard, file=shard_file(0, number), part=number))
        if number:
            shutil.copyfile(root / part.file, root / parts[-1].file)
            shutil.copyfile(root / shard.file, root / shards[-1].file)
    corpora = ({**manifest.corpora[0], "rows": count * part.rows},)
    store._save(replace(manifest, parts=tuple(parts), shards=tuple(shards), corpora=corpora))
    return root


def main() -> None:
    """Make the index, lower the limit, and use the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=5000)
    parser.add_argument("--handles", type=int, default=256)
    parser.add_argument("--name", default="now")
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--corpus", default="../shared/data/instruct/alpaca.jsonl")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = str(many_shards(options.model, options.corpus, Path(folder), options.shards))
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.handles, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        query = ("--prompt", "Name a primary colour.", "--completion", "Red.")
        chosen = str(Path(folder) / "chosen.jsonl")
        commands = {
            "trace": ("trace", root, *query, "--json"),
            "trace --exact": ("trace", root, *query, "--exact", "--top", "3", "--json"),
            "select": ("select", root, "--tasks", str(Path(folder) / "rows.jsonl"), "--count", "10", "-o", chosen),
            "verify": ("verify", root),
        }
        result = {name: answer(*words) for name, words in commands.items()}
    for one in result.values():
        one["last line"] = one["last line"].replace(folder, "FOLDER")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results[options.name] = {"shards": options.shards, "handles": options.handles, "commands": result}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[options.name], indent=1))


if __name__ == "__main__":
    main()
