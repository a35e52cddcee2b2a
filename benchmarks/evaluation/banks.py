"""Methods held against real retrainings: two banks, and how well each method's scores predict them.

    python -m benchmarks.evaluation.banks STAGE... [--bank base-6m|docstrings|demo] [--data ../shared/data]
        [--model ../shared/models/base-6m] [--work /tmp/banks] [--subsets 60] [--rows 1000] [--queries 30]

Stages, in order (`all` runs them all but `second`); each goes on where it was stopped, and skips what is in WORK:

    run      the training: `whence train --replayable`; and once more with `--in-run`, which changes no weight
    bank     `whence bank`: it on random halves of its rows, rows leaving by adding nothing. Losses of a bank of the
             page's size are in benchmarks/evaluation/results/BANK_losses.json: where two halves trained here end as
             they did there, the others are taken from that file, and the bank takes minutes in place of hours
    index    the default index at the end of the training, and one as Adam would use gradients
    replay   scores of every row for every query through the whole training, with the Hessian's products and without;
             QUERIES_AT_ONCE queries a time, each part kept, of a bank of the page's size beside the results too
    mean     the same of the queries' mean loss, one way back each: all that `removal` needs, which ranks rows by the
             mean over queries; it reads these where not all queries were replayed
    second   both by second derivatives in place of differences of gradients, at twice the price
    curvature  `whence curvature` of that index
    lds      every method side by side (linear datamodeling score, intervals over subsets and queries); into
             benchmarks/evaluation/results/banks.json, as all tables
    removal  the training without the 1% of rows that a method ranks highest for all queries, three seeds (`--share`,
             `--seeds`), beside as many random rows; losses of a bank of the page's size are kept as the bank's are, in
             BANK_removed.json
    patch    a step on each of a query's ten highest rows alone, from the run's last weights, beside random rows

Banks:

    base-6m  base-6m fine-tuned on 1,000 rows of alpaca, of at most 64 tokens, and 1,000 of gsm8k, of at most 128; 30
             queries, half of each. 3 epochs of AdamW, batches of 32, 3e-4, warm-up and linear decay
    docstrings  the demo's model from scratch on 1,000 docstrings of Python's standard library: 6 epochs of AdamW,
             batches of 32, 5e-4, warm-up and linear decay; 30 queries: docstrings that it was not trained on
    demo     the same rows, queries and model by the demo's own recipe (24 epochs, 2e-3, cosine), which learns them by
             heart: a training that no derivative tells

A smaller bank (`--subsets`, `--rows`, `--queries`) leaves its results in WORK instead.

Costs are wall seconds of whatever was run, over those of one training of the bank; `stages` says the machine's load.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from benchmarks.evaluation.magic import of_first_queries
from transformers import AutoTokenizer

from whence.cli.demonstration import RECIPE, as_conversation, docstring_rows, make_parent
from whence.corpus.tokens import encode
from whence.evaluation.bank_scores import evaluate_lds
from whence.evaluation.bank_store import Bank, Member, open_bank, write_member
from whence.evaluation.left_out import random_plans
from whence.evaluation.removal import evaluate_removal
from whence.evaluation.tail_patch import evaluate_tail_patch
from whence.gradients.exact import sequences_of
from whence.training.replay import Replayed, replay
from whence.training.replayed_run import open_replayable

MAX_TOKENS = {"alpaca": 64, "gsm8k_train": 128}
"""Longest rows: a half and a sixth of those that there are."""
SIZE = (60, 1000, 30)
"""Subsets, rows of each source, queries."""
SEEDS = 3
COMPARED = 2
"""Halves that are trained before kept losses are believed."""
SAME_LOSS = 1e-4
"""Nats a token between two losses that are the same but for rounding; subsets differ by .18."""
QUERIES_AT_ONCE = 10
RECIPES = {
    "base-6m": {"epochs": 3, "batch_size": 32, "lr": 3e-4, "max_tokens": 128, "checkpoints": 1},
    "docstrings": {"epochs": 6, "batch_size": 32, "lr": 5e-4, "checkpoints": 1},
    "demo": RECIPE,
}
METHODS = (
    "cosine", "dot", "exact-cosine", "exact-dot", "less@adam", "bm25", "rds+", "loss", "random", "datainf", "trak",
    "trackstar", "source",
)  # fmt: skip
CURVED = {
    "EK-FAC + CG": "ekfac:refine=2,sample=128,",
    "EK-FAC": "ekfac:",
    "K-FAC": "ekfac:kind=kfac,",
    "EK-FAC, by the index": "ekfac:sketched=true,",
}
"""Methods that read what the stage `curvature` measured, by their names in the tables."""
REMOVED = (
    "bm25", "EK-FAC", "cosine", "trak", "less@adam", "exact-cosine", "loss", "EK-FAC + CG", "K-FAC", "source",
    "trackstar", "datainf",
)  # fmt: skip
"""Methods whose top rows are left out or trained on, beside those that go through the training."""
WAYS: dict[str, dict[str, bool]] = {"replay": {}, "replay without Hessians": {"hessian": False}}
"""Settings of `replay`, by the name of the method."""
SECOND: dict[str, dict[str, bool]] = {"replay by second derivatives": {"differences": False}}
"""That of the stage `second`, which takes twice as long, and of the banks' tables of 2026-11-30."""
RESULTS = Path(__file__).parent / "results" / "banks.json"


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--bank", choices=[*RECIPES], default="base-6m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/banks"))
    parser.add_argument("--subsets", type=int, default=SIZE[0])
    parser.add_argument("--rows", type=int, default=SIZE[1], help="of each source")
    parser.add_argument("--queries", type=int, default=SIZE[2])
    parser.add_argument("--first", type=int, help="lds: of so many of the queries alone, such as those replayed so far")
    parser.add_argument("--share", type=float, default=0.01, help="of the rows, left out at once")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each line of the removal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work = (options.work / options.bank).resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in [name for name in STAGES if name != "second"] if "all" in options.stages else options.stages:
        STAGES[stage](options)


def results(options: argparse.Namespace) -> Path:
    """The committed file, for banks of the size that the page has."""
    return RESULTS if (options.subsets, options.rows, options.queries) == SIZE else options.work / RESULTS.name


def keep(options: argparse.Namespace, name: str, found: object) -> None:
    """Put a stage's results into the file."""
    file = results(options)
    document = json.loads(file.read_text()) if file.exists() else {}
    document.setdefault(options.bank, {})[name] = found
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")


def command(options: argparse.Namespace, name: str, *words: object) -> None:
    """Run a command as a user would; its seconds, and the load before it, are kept under a name."""
    load, start = os.getloadavg()[0], time.perf_counter()
    subprocess.run([sys.executable, "-m", "whence", *map(str, words)], check=True)
    file = results(options)
    document = json.loads(file.read_text()) if file.exists() else {}
    stages = document.get(options.bank, {}).get("stages", {})
    if name not in stages:  # what goes on after a stop took longer
        took = {"seconds": round(time.perf_counter() - start, 1), "load": load, "threads": torch.get_num_threads()}
        keep(options, "stages", stages | {name: took})


# -- rows


def write(file: Path, rows: list[dict]) -> None:
    """Rows as .jsonl."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def instructions(options: argparse.Namespace) -> tuple[list[dict], list[dict], str]:
    """Rows, queries and the parent of the bank `base-6m`."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows, queries = [], []
    for name, longest in MAX_TOKENS.items():
        listed = [json.loads(line) for line in (options.data / "instruct" / f"{name}.jsonl").open()]
        random.Random(options.seed).shuffle(listed)
        short = [row for row in listed if len(encode(row, tokenizer).ids) <= longest]
        rows += short[: options.rows]
        queries += short[options.rows : options.rows + options.queries // 2]
    return rows, queries, str(Path(options.model).resolve())


def docstrings(options: argparse.Namespace) -> tuple[list[dict], list[dict], str]:
    """Rows, queries and the parent of the banks `docstrings` and `demo`."""
    rows = docstring_rows(options.rows + options.queries, options.seed)
    parent = options.work / "parent"
    if not parent.exists():
        make_parent(parent, rows, options.seed)
    conversations = [as_conversation(row) for row in rows]
    return conversations[: options.rows], conversations[options.rows :], str(parent)


def stage_run(options: argparse.Namespace) -> None:
    """The training that is asked about."""
    rows, queries, parent = (instructions if options.bank == "base-6m" else docstrings)(options)
    write(options.work / "rows.jsonl", rows)
    write(options.work / "queries.jsonl", queries)
    flags = [word for name, value in RECIPES[options.bank].items() for word in (f"--{name.replace('_', '-')}", value)]
    corpus = options.work / "rows.jsonl"
    for name, more in (("run", ["--replayable"]), ("in-run", ["--in-run", options.work / "queries.jsonl"])):
        command(
            options, name, "train", parent, corpus, "-o", options.work / name, *flags, "--seed", options.seed, *more
        )


def stage_bank(options: argparse.Namespace) -> None:
    """Random halves."""
    work, kept = options.work, results(options).with_name(f"{options.bank}_losses.json")
    words = ("bank", work / "run", work / "rows.jsonl", "--queries", work / "queries.jsonl", "--fraction", 0.5,
             "-o", work / "bank")  # fmt: skip
    if kept.exists():
        command(options, "two halves", *words, "--subsets", COMPARED)
        add_members(work / "bank", json.loads(kept.read_text()), options.subsets)
    command(options, "bank", *words, "--subsets", options.subsets)
    keep_losses(work / "bank", kept)


def keep_losses(directory: Path, kept: Path) -> None:
    """Write the losses of a bank's members beside the results, if there are more than were kept."""
    bank = open_bank(str(directory))
    members = {
        member.name: {"losses": member.losses, "steps": member.steps, "seconds": round(member.seconds, 1)}
        for member in (bank.parent, bank.full, *bank.of_kind("random"))
    }
    if kept.exists() and len(json.loads(kept.read_text())["members"]) >= len(members):
        return
    queries = ", ".join(json.dumps(query) for query in bank.query_ids)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(member)}" for name, member in members.items())
    kept.write_text(f'{{"date": "{today()}", "queries": [{queries}], "members": {{\n{lines}\n}}}}\n')


def add_members(directory: Path, kept: dict[str, Any], subsets: int) -> None:
    """Put kept members into a bank that has some of its own, if those ended as the kept ones of their names."""
    bank, members = open_bank(str(directory)), kept["members"]
    if list(bank.query_ids) != kept["queries"]:
        print("the kept losses are of other queries: all members are trained", flush=True)
        return
    there, apart = distance(bank, members)
    if apart > SAME_LOSS:
        print(f"trainings end otherwise here (losses are up to {apart:.1e} nats apart): all are made", flush=True)
        return
    for plan in random_plans(len(bank.rows), subsets, bank.description.subsets, bank.full.seed):
        if plan.name in members and plan.name not in there:
            member = members[plan.name]
            write_member(
                bank.place,
                Member(
                    name=plan.name,
                    kind=plan.kind,
                    label=plan.label,
                    left_out=plan.left_out,
                    seed=plan.seed,
                    losses=tuple(member["losses"]),
                    steps=member["steps"],
                    seconds=member["seconds"],
                ),
            )
    print(
        f"losses of {len(there)} members are up to {apart:.1e} nats from the kept ones, which are the rest", flush=True
    )


def stage_index(options: argparse.Namespace) -> None:
    """The default index, and Adam's view."""
    work = options.work
    for name, more in (("index", []), ("adam", ["--view", "adam"])):
        command(options, name, "index", work / "run", work / "rows.jsonl", "-o", work / name, *more)


def stage_curvature(options: argparse.Namespace) -> None:
    """EK-FAC's."""
    command(options, "curvature", "curvature", options.work / "index", "-o", options.work / "curvature")


def curved(options: argparse.Namespace) -> dict[str, str]:
    """What `whence` calls the methods of `CURVED`, by their names in the tables."""
    return {name: f"{text}curvature={options.work / 'curvature'}" for name, text in CURVED.items()}


def removed(options: argparse.Namespace) -> list[str]:
    """Methods of `REMOVED`, as `whence` calls them."""
    return [curved(options).get(name, name) for name in REMOVED]


def named(options: argparse.Namespace, rows: list[dict]) -> list[dict]:
    """Lines of a table with the names of `CURVED`."""
    known = {text: name for name, text in curved(options).items()}
    return [row | {"method": known.get(row["method"], row["method"])} for row in rows]


def stage_second(options: argparse.Namespace) -> None:
    """Replays by second derivatives, of the queries' mean loss and of every query."""
    stage_mean(options, SECOND)
    stage_replay(options, SECOND)


def stage_replay(options: argparse.Namespace, ways: dict[str, dict[str, bool]] = WAYS) -> None:
    """Scores of every row for every query, a few queries at a time."""
    opened, bank = open_replayable(options.work / "run"), open_bank(str(options.work / "bank"))
    queries = [encode(row, opened.model.tokenizer) for row in bank.queries]
    for name, settings in ways.items():
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            file = options.work / f"{name}-{first:03d}.parquet"
            kept = RESULTS.with_name(f"{options.bank}_{file.name}".replace(" ", "_"))
            if not file.exists() and results(options) == RESULTS and kept.exists():
                shutil.copy(kept, file)  # of the training that the bank's losses are of
            if file.exists():
                continue
            some = queries[first : first + QUERIES_AT_ONCE]
            found = replay(opened.losses, opened.log, [[sequences_of(query)] for query in some], **settings,
                           is_resumable=True)  # fmt: skip
            seconds = found.seconds
            columns = {"query": [], "id": [], "score": []}
            for number, scores in enumerate(found.scores):
                columns["query"] += [bank.query_ids[first + number]] * len(opened.ids)
                columns["id"] += opened.ids
                columns["score"] += scores.tolist()
            table = pyarrow.table(columns).replace_schema_metadata(described(found, settings))
            pyarrow.parquet.write_table(table, file)
            if results(options) == RESULTS:
                shutil.copy(file, kept)
            drift = max((share for _, share in found.drifts), default=0.0)
            print(f"{name}, queries from {first}: {seconds:.0f} s, drift {drift:.1e}", flush=True)


def described(found: Replayed, settings: dict[str, bool]) -> dict[str, str]:
    """How scores were made, kept with them."""
    return {"seconds": str(found.seconds), "settings": json.dumps(settings), "error": str(found.error)}


def stage_mean(options: argparse.Namespace, ways: dict[str, dict[str, bool]] = WAYS) -> None:
    """Scores of every row for the queries' mean loss, and what one task costs."""
    opened, bank = open_replayable(options.work / "run"), open_bank(str(options.work / "bank"))
    queries = [encode(row, opened.model.tokenizer) for row in bank.queries]
    for name, settings in ways.items():
        file = options.work / f"mean-{name}.parquet"
        kept = RESULTS.with_name(f"{options.bank}_{file.name}".replace(" ", "_"))
        if not file.exists() and results(options) == RESULTS and kept.exists():
            shutil.copy(kept, file)
        if file.exists():
            continue
        found = replay(opened.losses, opened.log, [[sequences_of(query) for query in queries]], **settings,
                       is_resumable=True)  # fmt: skip
        seconds, (scores,) = found.seconds, found.scores.tolist()
        each = len(bank.query_ids)
        columns = {
            "query": [query for query in bank.query_ids for _ in opened.ids],
            "id": [*opened.ids] * each,
            "score": scores * each,
        }
        table = pyarrow.table(columns).replace_schema_metadata(described(found, settings))
        pyarrow.parquet.write_table(table, file)
        if results(options) == RESULTS:
            shutil.copy(file, kept)
        print(f"{name}, mean of {each} queries: {seconds:.0f} s", flush=True)


def gathered(options: argparse.Namespace, name: str) -> tuple[str, float]:
    """All of a replay's parts as one file of scores, and the seconds that they took."""
    tables = [pyarrow.parquet.read_table(file) for file in sorted(options.work.glob(f"{name}-*.parquet"))]
    seconds = sum(float(table.schema.metadata[b"seconds"]) for table in tables)
    out = options.work / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.concat_tables([table.replace_schema_metadata(None) for table in tables]), out)
    return str(out), seconds


def scored(options: argparse.Namespace, means: bool = False) -> dict[str, Any]:
    """What every table reads beside the bank: two indexes, and the scores of methods that go through the training.

    Of methods without scores of every query those of the mean loss count, if `means`.
    """
    work, files, costs = options.work, {}, {}
    for name in (*WAYS, *SECOND):
        if len([*work.glob(f"{name}-*.parquet")]) * QUERIES_AT_ONCE >= (options.first or options.queries):
            files[name], costs[name] = gathered(options, name)
        elif means and (file := work / f"mean-{name}.parquet").exists():
            files[name] = str(file)
            costs[name] = float(pyarrow.parquet.read_schema(file).metadata[b"seconds"])
    files["in-run"] = str(work / "in-run" / "in_run_scores.parquet")
    indexes = {"": str(work / "index"), "adam": str(work / "adam")}
    return {"index": indexes, "scores": files, "costs": costs, "seed": options.seed}


def stage_lds(options: argparse.Namespace) -> None:
    """The table."""
    work, bank = options.work, open_bank(str(options.work / "bank"))
    bank = bank if options.first is None else of_first_queries(bank, options.first)
    found = evaluate_lds(bank, [*METHODS, *curved(options).values()], **scored(options), progress=True)
    first, *others = (marks.method for marks in found.table.marks)
    differences = {name: found.table.difference(first, name)._asdict() for name in others}
    training = bank.training_seconds
    mean = work / "mean-replay.parquet"
    task = float(pyarrow.parquet.read_schema(mean).metadata[b"seconds"]) / training if mean.exists() else None
    rows = named(options, found.rows())
    name = "lds" if options.first is None else f"lds of the first {options.first} queries"
    keep(options, name, {"rows": rows, "settings": dict(found.settings), "training seconds": training,
                          "best": first, "less each other": differences, "replay of the mean, in trainings": task,
                          "date": today()})  # fmt: skip
    for marks in found.table.marks:
        print(marks.method, round(marks.spearman.value, 3), marks.spearman.interval, round(marks.of_mean.value, 3))


def stage_removal(options: argparse.Namespace) -> None:
    """Trainings without the top rows."""
    directory, kept = options.work / "bank", results(options).with_name(f"{options.bank}_removed.json")
    losses = json.loads(results(options).with_name(f"{options.bank}_losses.json").read_text())["members"]
    is_alike = distance(open_bank(str(directory)), losses)[1] <= SAME_LOSS
    if kept.exists() and is_alike:
        add_removed(directory, json.loads(kept.read_text()))
    found = evaluate_removal(str(directory), removed(options), share=options.share, seeds=options.seeds,
                             **scored(options, means=True), progress=True)  # fmt: skip
    if is_alike or not kept.exists():
        keep_removed(directory, kept)
    name = "removal" if options.seeds == SEEDS else f"removal, {options.seeds} of {SEEDS} seeds"
    keep(options, name, {"rows": named(options, found.rows()), "settings": dict(found.settings), "date": today()})
    for row in found.rows():
        print(row["method"], row["effect"], row["over_random"], row["over_random_low"], row["over_random_high"])


def distance(bank: Bank, kept: dict[str, Any]) -> tuple[set[str], float]:
    """Names of a bank's members whose losses are kept too, and how far these are apart at most, in nats a token."""
    own = [member for member in (bank.parent, bank.full, *bank.of_kind("random")) if member.name in kept]
    pairs = [pair for member in own for pair in zip(member.losses, kept[member.name]["losses"], strict=True)]
    return {member.name for member in own}, max(abs(here - there) for here, there in pairs)


def keep_removed(directory: Path, kept: Path) -> None:
    """Write the trainings of the removal beside the results: those without listed rows, and of all with other seeds."""
    members = open_bank(str(directory)).members
    lines = json.loads(kept.read_text()) if kept.exists() else []
    known = {line["name"] for line in lines} | {"full", "parent"}
    lines += [asdict(member) for member in members if member.name not in known and member.kind != "random"]
    kept.write_text("[\n" + ",\n".join(f" {json.dumps(line)}" for line in lines) + "\n]\n")


def add_removed(directory: Path, lines: list[dict]) -> None:
    """Put kept trainings into a bank that lacks them."""
    bank = open_bank(str(directory))
    for line in lines:
        if line["name"] not in {member.name for member in bank.members}:
            values: dict[str, Any] = line | {name: tuple(line[name]) for name in ("left_out", "losses")}
            write_member(bank.place, Member(**values))


def stage_patch(options: argparse.Namespace) -> None:
    """Steps on the top rows."""
    work = options.work
    more = scored(options)
    found = evaluate_tail_patch(work / "run", str(work / "queries.jsonl"), str(more["index"].pop("")), removed(options),
                                **more, progress=True)  # fmt: skip
    rows = named(options, found.rows())
    keep(options, "tail patch", {"rows": rows, "settings": dict(found.settings), "date": today()})
    for row in found.rows():
        print(row["method"], row["change"], row["over_random"], row["over_random_low"], row["over_random_high"])


def today() -> str:
    """The date of a result."""
    return time.strftime("%Y-%m-%d")


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": stage_run,
    "bank": stage_bank,
    "index": stage_index,
    "curvature": stage_curvature,
    "replay": stage_replay,
    "mean": stage_mean,
    "second": stage_second,
    "lds": stage_lds,
    "removal": stage_removal,
    "patch": stage_patch,
}

if __name__ == "__main__":
    main()
