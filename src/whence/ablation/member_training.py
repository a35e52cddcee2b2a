"""Training the members of a pool: one model for each partition of a corpus, all from one parent, with equal budgets.

Every member is an idempotent job: a finished one is kept, an interrupted one is done again, and partitions that come
later join without the others being trained anew. `true_model` trains on a mixture's own rows: the model that an average
of members stands in for.

All trainings have the same rate, schedule, seed and tokens a step. A member of `tokens` tokens is trained in `steps`
steps; a mixture of m budgets in m times as many. Averages need the members to stay near one another: the default rate
is constant after a short warm-up, as in the source.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661.
"""

import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whence import runner
from whence.ablation.mixtures import Mixture, checked_mixture
from whence.ablation.pool import DTYPES, MANIFEST, REMEDY, Pool, begin_pool, date_in
from whence.corpus.layouts import Row
from whence.corpus.partitions import Partition, draw_mixture, partitions_of
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.templates import date_of, prepare, stored_date, today, written_by
from whence.counts import number_of
from whence.errors import ManifestMismatchError, SettingError, StorageError
from whence.models.loading import load_tokenizer, tokenizer_digest
from whence.models.local_copies import local_directory
from whence.models.pairing import weights_by_name
from whence.models.runs import open_run
from whence.models.saved_files import check_file
from whence.models.training_state import date_of_training, warn_of_run
from whence.outputs import refuse_inputs
from whence.paths import absolute, may_exist, writing_to
from whence.records import MisfitError, fitting, unlike_written
from whence.storage import Place
from whence.training.recipe import check_amount, check_seed
from whence.training.trainer import train


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """How every member is trained, and how it is kept."""

    by: str = "source"
    """Column that partitions the corpus; "file": its files."""
    unit_tokens: int | None = None
    """Cut partitions into units of about so many tokens, each a member of its own."""
    tokens: int = 100_000
    """Token budget of a member: a smaller partition is read again, a larger one gives a random sample."""
    steps: int = 48
    """Steps of a member's training."""
    lr: float = 3e-4
    """Constant after the warm-up."""
    warmup_steps: int = 10
    max_tokens: int = 128
    """Longest row; longer texts are cut into several."""
    lora_rank: int | None = None
    """Train adapters; None: all weights."""
    seed: int = 0
    dtype: str = "bfloat16"
    """Type of the stored delta; "float32" stores the weights themselves, exactly."""

    def __post_init__(self):
        for name in ("tokens", "steps", "lr", "max_tokens"):
            check_amount(f"--{name.replace('_', '-')}", getattr(self, name))
        check_seed(self.seed)
        if self.lora_rank is not None:
            check_amount("--lora-rank", self.lora_rank)
        if not 0 <= self.warmup_steps < self.steps:
            raise SettingError(f"--warmup-steps {self.warmup_steps}: from 0 to below --steps {self.steps} are expected")
        if self.dtype not in DTYPES:
            raise SettingError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")

    def recipe(self) -> dict[str, Any]:
        """Settings that members must have in common."""
        return asdict(self)


def recipe_of(pool: Pool) -> PoolSettings:
    """How a pool's members were trained.

    Raises:
        ChecksumError: Its manifest does not say so, or gives a value that no training has.
    """
    try:
        stored = fitting(PoolSettings, dict(pool.recipe), "recipe")
        if lacking := PoolSettings.__dataclass_fields__.keys() - pool.recipe.keys():
            raise MisfitError(f"recipe.{min(lacking)} is missing")
    except (MisfitError, SettingError) as error:
        raise unlike_written(pool.place.path(MANIFEST), error, REMEDY) from None
    return stored


def train_pool(
    parent: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    engine: runner.EngineOption = "local",
    progress: runner.ProgressOption = True,
    **settings: Any,
) -> Pool:
    """Train a model for each partition of a corpus that has none in the pool yet.

    Args:
        parent: theta_0: a directory or Hub name; in a Trainer's directory its last checkpoint.
        corpus: Anything that `open_corpus` takes, with the column to partition by.
        out: The pool's directory; the same call goes on from there.
        engine: Engine that members are trained on; see `runner`.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        settings: Fields of `PoolSettings` by name.

    Returns:
        The pool.

    Raises:
        CorpusError: The corpus cannot be read, or lacks the column.
        ManifestMismatchError: The pool there has another parent or recipe, or a member has other rows.
        ModelError: The parent is no whole model, such as an adapter alone.
        SettingError: A setting cannot work, or there is only one partition.
    """
    chosen = PoolSettings(**settings)
    runner.check_engine(engine)
    refuse_inputs(out, [parent, corpus], is_directory=True)
    start = local_directory(open_run(parent).checkpoints[-1].path)
    warn_of_run(parent)
    weights_by_name(start)  # every member is compared with them: a parent without weights fails before any training
    opened = open_corpus(corpus)
    tokenizer = load_tokenizer(start, start, False)
    date = stored_date(Place.at(out)) or date_of_training(start) or today()
    partitions = read_partitions(start, opened, chosen, date=date)
    address = absolute(str(opened.origin)) if isinstance(opened.origin, str | Path) else None
    words = tokenizer_digest(tokenizer)
    pool = begin_pool(out, start, chosen.recipe(), corpus=address, words=words)
    if len({*partitions, *pool.members}) < 2:
        raise SettingError(
            f"--by {chosen.by}: {len(partitions)} partition in the corpus; two or more are expected, to be mixed"
        )
    date = date_of(pool.place, tokenizer, date)
    with pool.place.locked(), written_by(None, date), writing_to(pool.place.scratch):
        pool = begin_pool(out, start, chosen.recipe(), corpus=address, words=words)  # read again, under the lock
        pool.place.scratch.mkdir(parents=True, exist_ok=True)
        for partition in partitions.values():
            refuse_other_rows(pool, partition, opened.name)
        todo = [partition for name, partition in partitions.items() if not pool.has(name)]
        free, numbers = pool.free_numbers(), dict[str, int]()  # whatever worker is done first
        for partition in todo:
            if partition.name not in pool.members:
                numbers[partition.name] = next(free)
        done = len(partitions) - len(todo)
        with runner.progress("Training members", len(partitions), unit="members", done=done, shown=progress) as tick:
            is_here = runner.check_engine(engine).name == runner.LOCAL
            work = PoolWork(pool.place.scratch.resolve() / "work", str(absolute(str(start))), chosen, date, is_here)
            for partition, (run, loss) in runner.map(work, todo, engine=engine, on_tick=tick):
                if not run.is_dir():
                    raise StorageError(
                        f"{run}: a worker trained {partition.name} on a disk of its own, and it is not here. Let the "
                        "pool, or WHENCE_CACHE for one in a store, be a directory that all machines share"
                    )
                pool = pool.with_member(partition.name, run, dtype=chosen.dtype, tokens=chosen.tokens, loss=loss,
                                        rows=len(partition.pieces), number=numbers.get(partition.name),
                                        size=partition.tokens,
                                        digest=partition.digest)  # fmt: skip
                _forget_work(pool)
        pool.write()  # the addresses of parent and corpus, which may have moved
        _forget_work(pool)  # of a process that was killed right after its member was listed
    return pool


@dataclass(frozen=True)
class PoolWork:
    """Trains members of a pool; who gives out the partitions stores what they become."""

    folder: Path
    """Where trainings are, until their members are stored."""
    start: str
    settings: PoolSettings
    date: str | None
    """Day that a chat template writes."""
    is_here: bool
    """Whether one process does all jobs: then a training that was stopped goes on where it was."""

    def __call__(self, partition: Partition, report: runner.Tick) -> tuple[Path, float | None]:
        """Train one member: its run, and the last loss of its training."""
        rows = partition.draw(self.settings.tokens, seed=self.settings.seed)
        with written_by(None, self.date):
            name = slug(partition.name) + ("" if self.is_here else f".{socket.gethostname()}-{os.getpid()}")
            run = train_model(self.start, rows, self.folder / name, self.settings,
                              tokens=self.settings.tokens)  # fmt: skip
        report(1, self.settings.tokens)
        return run, last_loss(run)


def refuse_other_rows(pool: Pool, partition: Partition, corpus: str) -> None:
    """Refuse a partition whose member was trained on other rows.

    Raises:
        ManifestMismatchError: It was.
    """
    member = pool.members.get(partition.name)
    if member is None or (member.rows == len(partition.pieces) and member.digest in (None, partition.digest)):
        return
    raise ManifestMismatchError(
        f"{corpus}: the partition {partition.name} is {number_of(len(partition.pieces), 'row')} here, other ones than "
        f"the {member.rows:,} that the member in {pool.place.root} was trained on. Give the corpus of the pool, or "
        "name another pool."
    )


def _forget_work(pool: Pool) -> None:
    """Remove trainings whose members are there."""
    work = pool.place.scratch / "work"
    for name in pool.members:
        for folder in (work / slug(name), *work.glob(f"{slug(name)}.*-*")):
            shutil.rmtree(folder, ignore_errors=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def true_model(
    pool: Pool, partitions: Mapping[str, Partition], mixture: Mixture, out: str | Path, *, budgets: float
) -> Path:
    """Train the parent on a mixture's own rows: the model that a merged one stands in for.

    Args:
        pool: The pool whose recipe is used.
        partitions: Partitions of the corpus that the pool was trained on.
        mixture: Shares of the token budget.
        out: Directory of the training.
        budgets: Token budget, in members' budgets; in the source, the number of partitions of a uniform mixture.

    Returns:
        Directory of the model or adapter.
    """
    chosen = recipe_of(pool)
    weights = checked_mixture(mixture, partitions)
    tokens = round(budgets * chosen.tokens)
    rows = draw_mixture(partitions, weights, tokens, seed=chosen.seed)
    with written_by(None, date_in(pool)):
        return train_model(pool.parent, rows, Path(out), chosen, tokens=tokens)


def read_partitions(
    parent: str, corpus: Corpus, settings: PoolSettings, *, date: str | None = None
) -> dict[str, Partition]:
    """A corpus' partitions as the parent's tokenizer counts them, in a chat template that writes this date."""
    tokenizer = load_tokenizer(parent, parent, False)
    prepare(tokenizer, date=date)
    return partitions_of(
        corpus, tokenizer, by=settings.by, max_tokens=settings.max_tokens, unit_tokens=settings.unit_tokens
    )


def pool_partitions(
    pool: Pool, corpus: str | Path | Corpus | Iterable[Row] | None, names: Iterable[str]
) -> dict[str, Partition]:
    """The rows that some members were trained on, from the given corpus or from the address that the pool stores.

    Raises:
        SettingError: There is no corpus, or it lacks a partition.
        ManifestMismatchError: A partition has other rows than its member was trained on.
    """
    origin = corpus if corpus is not None else pool.corpus
    if origin is None or (corpus is None and not may_exist(str(origin))):
        raise SettingError(f"{pool.place.root} does not know its corpus any more; give it with --corpus")
    opened = open_corpus(origin)
    partitions = read_partitions(pool.parent, opened, recipe_of(pool), date=date_in(pool))
    required = list(names)
    if missing := [name for name in required if name not in partitions]:
        raise SettingError(
            f"{opened.name}: no row of the partition {missing[0]}. Give a corpus that has all partitions with --corpus."
        )
    for name in required:
        refuse_other_rows(pool, partitions[name], opened.name)
    return {name: partitions[name] for name in required}


def train_model(parent: str, rows: list[Row], place: Path, settings: PoolSettings, *, tokens: int) -> Path:
    """Train a model by the pool's recipe; the directory of its last checkpoint."""
    run = train(parent, with_own_ids(rows), place, progress=False, **training_of(len(rows), settings, tokens=tokens))
    return Path(local_directory(open_run(run).checkpoints[-1].path))


def with_own_ids(rows: list[Row]) -> list[Row]:
    """Rows that may be repeated, with ids of their own."""
    return [row | {"id": f"{number}:{row['id']}"} for number, row in enumerate(rows)]


def training_of(rows: int, settings: PoolSettings, *, tokens: int) -> dict[str, Any]:
    """Settings of `train` for so many rows of so many tokens by a pool's recipe."""
    steps = max(1, round(settings.steps * tokens / settings.tokens))
    return {
        "epochs": 1,
        "batch_size": math.ceil(rows / steps),
        "lr": settings.lr,
        "schedule": "constant_with_warmup",
        "warmup": settings.warmup_steps / steps,
        "max_tokens": settings.max_tokens,
        "lora_rank": settings.lora_rank,
        "checkpoints": 1,
        "seed": settings.seed,
    }


def last_loss(checkpoint: Path) -> float | None:
    """The last loss that a training logged; None where there is no log."""
    file = checkpoint / "trainer_state.json"
    check_file(file)
    logged = json.loads(file.read_text())["log_history"] if file.is_file() else []
    losses = [float(line["loss"]) for line in logged if "loss" in line]
    return losses[-1] if losses else None


def slug(name: str) -> str:
    """A directory's name for a partition or mixture.

    >>> slug("code/0"), slug("C++ & C")
    ('code-0-9c54', 'C-C-c562')
    """
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
    return f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"


def pool_place(pool: Pool, *names: str) -> Place:
    """A directory inside a pool."""
    return pool.place.below(*names)
