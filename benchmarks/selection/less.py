"""LESS and its baselines on a pool of four sources: what is chosen, what training on it gives, what it costs.

    python -m benchmarks.selection.less STAGE... [--index default|old] [--data ../shared/data]
        [--model ../shared/models/base-6m] [--work DIR]

Stages, in order (`all` runs them all); each goes on where it was stopped:

    data        the pool, the tasks' examples and the graded rows (`less_data.py`), as files in WORK
    less        the whole of LESS by the commands that a user would type: warm-up, index with Adam's view, selection;
                seconds of each, the index' size, the share of gsm8k rows in what is chosen for gsm8k
    agreement   the paper's cosine with the mean gradient against the code's mean of cosines; from an index in bfloat16
                also the choice at 5% from int8, int4 and one bit against that from bfloat16
    replay      a run on the whole pool that can be replayed, by the warm-up's settings in one epoch, for the method of
                that name; a way back through it for each of a task's 27 or 57 subtasks would take a day, so that its
                target is the mean loss of a task's examples
    table       every method's 5% (of the pool's tokens), trained on with equal steps, against random, everything and
                nothing, on held-out rows; cells are kept in WORK/cells-FRACTION. `--turns less` adds what `select`
                does unless told otherwise: examples choose in turns
    larger      the same choices train a larger model (`larger_model.py`; `--larger DIR`)
    budgets     less, random and bm25 (those that `--methods` names) at 1% and 20%

`--index old` is the index that these tables had until 2026-11-29: 8,192 numbers in bfloat16. Methods that read no index
choose the same from either: `--methods less influence datainf --no-pool` leaves them out, and the training on the whole
pool.

Results go to benchmarks/selection/results/less.json, by index and seed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.selection.less_data import TASKS, load

from whence import open_index, select
from whence.corpus.tokens import Encoded as Tokens
from whence.evaluation.choices import EVERYTHING, selection_methods
from whence.evaluation.selection import Recipe, evaluate_selection
from whence.indexing.codecs import codec
from whence.selection.description import overlap
from whence.selection.views import IndexView

FRACTION = 0.05
METHODS = (
    *(
        "less",
        "influence",
        "datainf",
        "rds",
        "rds+",
        "bm25",
        "dsir:length_normalised=false,backoff=0",
        "dsir",
        "density",
    ),
    *("loss", "loss_drop", "replay"),
)
PUBLISHED = {"by": "task", "selector": "max"}
"""LESS's own, and the order of all methods here but of those of `--turns`."""
RECIPE = Recipe(steps=100, batch_size=8, lr=5e-4, max_tokens=256, schedule="linear")
WARM_UP = ["--fraction", "0.05", "--epochs", "4", "--lora-rank", "16", "--lr", "2e-3", "--max-tokens", "256"]
ON_ALL = ["--epochs", "1", *WARM_UP[4:], "--replayable"]
INDEX = ["--view", "adam", "--checkpoints", "all", "--max-tokens", "256"]
INDEXES = {"default": INDEX, "old": [*INDEX, "--projection", "count_sketch", "--width", "8192", "--codec", "bfloat16"]}
OLD = ", 8,192 numbers in bfloat16"
"""Of the key under which results of the old index stand."""
RESULTS = Path(__file__).parent / "results" / "less.json"


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/less-0"))
    parser.add_argument("--seed", type=int, default=0, help="of the pool and the warm-up")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="trainings of each cell")
    parser.add_argument("--index", choices=list(INDEXES), default="default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--larger", type=Path, default=Path("/tmp/larger"), help="a model of larger_model.py")
    parser.add_argument("--no-pool", action="store_true", help="no training on the whole pool")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--turns", nargs="*", default=[], help="methods that choose as `select` does unless told")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in options.stages else options.stages:
        STAGES[stage](options)


def keep(options: argparse.Namespace, name: str, found: object) -> None:
    """Put a stage's results into the committed file."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(f"seed {options.seed}{OLD if options.index == 'old' else ''}", {})[name] = found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def stage_data(options: argparse.Namespace) -> None:
    """Files that the commands read."""
    found = load(options.data, options.seed)
    files = {"pool": found.pool}
    files |= {f"{task}-examples": rows for task, rows in found.tasks.items()}
    for task, rows in found.tasks.items():  # as one subtask
        files[f"{task}-whole"] = [{name: value for name, value in row.items() if name != "task"} for row in rows]
    files |= {f"{task}-graded": rows for task, rows in found.graded.items()}
    for name, rows in files.items():
        (options.work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(options: argparse.Namespace, *words: str) -> float:
    """Run a command as a user would; its seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "whence", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def stage_less(options: argparse.Namespace) -> None:
    """Warm-up, index, selection."""
    work = options.work
    pool, run, index = str(work / "pool.jsonl"), str(work / "run"), str(work / "index")
    seconds = {"warm-up": command(options, "train", options.model, pool, "-o", run, *WARM_UP)}
    seconds["index"] = command(options, "index", run, pool, "-o", index, *INDEXES[options.index])
    chosen = {}
    for task in options.tasks:
        out, examples = str(work / f"less-{task}.jsonl"), str(work / f"{task}-examples.jsonl")
        words = ["select", index, "--tasks", examples, "--method", "less", "--fraction", str(FRACTION), "-o", out]
        words += ["--by", "task", "--selector", "max"]
        seconds[f"select {task}"] = command(options, *words)
        sources = [json.loads(line)["source"] for line in Path(out).read_text().splitlines()]
        chosen[task] = {source: sources.count(source) / len(sources) for source in sorted({*sources})}
    info = open_index(index).store.info()
    keep(options, "less", {"seconds": seconds, "shares": chosen, "index": info["bytes"], "rows": info["rows"],
                           "warm-up flags": WARM_UP, "index flags": INDEXES[options.index]})  # fmt: skip
    print(json.dumps({"seconds": seconds, "shares": chosen}, indent=1))


def stage_agreement(options: argparse.Namespace) -> None:
    """What the codec and the variants change in the choice."""
    built = open_index(options.work / "index")
    view, stored_as = Encoded(built), built.store.manifest.codec
    found: dict[str, dict[str, float]] = {}
    for task in options.tasks:
        examples = options.work / f"{task}-examples.jsonl"

        def rows(method: str = "less", examples: Path = examples, **settings: object) -> list[int]:
            return select(view, examples, method=method, fraction=FRACTION, **PUBLISHED, **settings).selection.rows

        stored = rows()
        found[task] = {}
        for name in ("int8", "int4", "onebit") if stored_as == "bfloat16" else ():
            view.named = name
            found[task][name] = overlap(stored, rows())
            view.named = None
        found[task]["mean of cosines"] = overlap(stored, rows(options={"within": "mean_cosine"}))
    keep(options, f"overlap at 5% with {stored_as}", found)
    print(json.dumps(found, indent=1))


class Encoded(IndexView):
    """An index as if it had been stored in another codec."""

    named: str | None = None

    def __init__(self, index: object):
        object.__setattr__(self, "index", index)
        self.asked = {}

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def query_vectors(self, queries: Sequence[Tokens]) -> torch.Tensor:
        """Made once for each task."""
        key = tuple(tuple(query.ids) for query in queries)
        if key not in self.asked:
            self.asked[key] = super().query_vectors(queries)
        return self.asked[key]

    def scores(self, vectors: torch.Tensor, *, cosine: bool) -> torch.Tensor:
        """From rows encoded anew."""
        if self.named is None:
            return super().scores(vectors, cosine=cosine)
        other, parts = codec(self.named), []
        for rows, is_ok in self.vectors():
            total = torch.zeros(vectors.shape[1], rows.shape[1])
            for c, weight in enumerate(self.weights):
                found = other.scores(*other.encode(rows[c]), vectors[c])
                total += weight * found / rows[c].norm(dim=1).clamp_min(1e-30) if cosine else weight * found
            parts.append(total.masked_fill(~is_ok, -torch.inf))
        return torch.cat(parts, 1)


def stage_table(options: argparse.Namespace, fraction: float = FRACTION, larger: Path | None = None) -> None:
    """Train and grade: the model that chose, or a larger one."""
    work, base = options.work, str(Path(options.model).resolve())
    source, more = (work / "index", {}) if (work / "index").exists() else (work / "pool.jsonl", {"model": base})
    methods = [f"loss_drop:base={base}" if name == "loss_drop" else name for name in options.methods]
    examples = {task: work / f"{task}-examples.jsonl" for task in options.tasks}
    graded = {task: [json.loads(line) for line in (work / f"{task}-graded.jsonl").open()] for task in options.tasks}
    cells = work / f"cells-{fraction:g}-{'-'.join(options.tasks)}"
    whole = {task: work / f"{task}-whole.jsonl" for task in options.tasks}
    alike = {"fraction": fraction, "work": cells, **more}
    made, budget = selection_methods([name for name in methods if name == "rds+"], source, examples, **alike)
    others = [name for name in methods if name not in ("rds+", "replay")]
    made |= selection_methods(others, source, examples, **alike, **PUBLISHED)[0]
    if "replay" in methods:
        made |= selection_methods(["replay"], source, whole, run=work / "replayable", **alike, **PUBLISHED)[0]
    as_used = selection_methods(options.turns, source, examples, **alike | {"work": work / f"{cells.name}-turns"})[0]
    made |= {f"{name}, in turns": as_used[name] for name in options.turns}
    if options.no_pool:
        del made[EVERYTHING]
    if larger is not None:
        cells = work / f"{cells.name}-larger"
    table = evaluate_selection(
        base if larger is None else str(larger.resolve()),
        made,
        graded,
        work=cells,
        recipe=RECIPE,
        seeds=options.seeds,
        say=lambda line: print(line, flush=True),
    )
    name = f"table {fraction:g}" if larger is None else f"larger model {fraction:g}"
    name += "" if not more else ", methods without an index"
    keep(options, name, {"tokens_budget": budget, "recipe": asdict(RECIPE), "lines": table.rows()})
    for line in table.lines:
        print(line.task, line.method, f"{line.loss:.4f}", line.gain, line.gain_interval)


def stage_replay(options: argparse.Namespace) -> None:
    """The training that replay goes back through: of all rows, as its scores are of what was trained on."""
    run, pool = options.work / "replayable", options.work / "pool.jsonl"
    seconds = command(options, "train", options.model, str(pool), "-o", str(run), *ON_ALL)
    keep(options, "replay", {"seconds of its training": seconds, "flags": ON_ALL})


def stage_larger(options: argparse.Namespace) -> None:
    """LESS-T: a small model chooses, a larger one is trained."""
    stage_table(options, larger=options.larger)


def stage_budgets(options: argparse.Namespace) -> None:
    """Less, random and bm25 at other budgets."""
    options.methods = [name for name in ("less", "bm25") if name in options.methods]
    for fraction in (0.01, 0.2):
        stage_table(options, fraction)


STAGES = {
    "data": stage_data,
    "less": stage_less,
    "agreement": stage_agreement,
    "replay": stage_replay,
    "table": stage_table,
    "larger": stage_larger,
    "budgets": stage_budgets,
}

if __name__ == "__main__":
    main()
