"""The pool job: one model for each partition of a corpus, all from one parent, with equal budgets.

Every member is an idempotent job: what is finished is kept, what was interrupted is done again, and partitions that
come later join without the others being trained anew. `true_model` trains the real thing, on a mixture's rows, which is
what an average of members stands in for.

All trainings have the same rate, schedule, seed and tokens a step. A member of `tokens` tokens is trained in `steps`
steps; a mixture of m budgets in m times as many. Averages need the members to stay near one another: the default rate
is constant after a short warm-up, as in the source.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whence import runner
from whence.ablation.merging import Mixture, checked
from whence.ablation.pool import DTYPES, Pool, begin_pool
from whence.corpus.layouts import Row
from whence.corpus.partitions import Partition, draw_mixture, partitions_of
from whence.corpus.reading import Corpus, open_corpus
from whence.errors import ManifestMismatchError, SettingError
from whence.models.loading import load_tokenizer, located, tokenizer_digest
from whence.models.pairing import weights_by_name
from whence.models.runs import open_run
from whence.storage import Place
from whence.training.trainer import train


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """How every member is trained, and how it is kept."""

    by: str = "source"
    """Column that partitions the corpus; "file": its files."""
    unit_tokens: int | None = None
    """Cut partitions into units of about so many tokens, each a member of its own."""
    tokens: int = 100_000
    """Budget of a member: smaller partitions are read again, of larger ones a random part."""
    steps: int = 48
    """Of a member's training."""
    lr: float = 3e-4
    """Constant after the warm-up."""
    warmup_steps: int = 10
    max_tokens: int = 128
    """Longest row; longer texts are cut into several."""
    lora_rank: int | None = None
    """Train adapters; None: all weights."""
    seed: int = 0
    dtype: str = "bfloat16"
    """Of the stored delta, or float32, which keeps the weights to the last bit."""

    def __post_init__(self):
        for name in ("tokens", "steps", "lr", "max_tokens"):
            if not getattr(self, name) > 0:
                raise SettingError(f"--{name.replace('_', '-')} {getattr(self, name)}: a number above 0 is expected")
        if not 0 <= self.warmup_steps < self.steps:
            raise SettingError(f"--warmup-steps {self.warmup_steps}: from 0 to below --steps {self.steps} are expected")
        if self.dtype not in DTYPES:
            raise SettingError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")

    def recipe(self) -> dict[str, Any]:
        """What members must have in common."""
        return asdict(self)


def train_pool(
    parent: str | Path,
    corpus: str | Path | Corpus | Iterable[Row],
    out: str | Path,
    *,
    engine: str = "local",
    shown: bool = True,
    **settings: Any,
) -> Pool:
    """Train a model for each partition of a corpus that has none in the pool yet.

    Args:
        parent: theta_0: directory or Hub name; of a Trainer's directory the last checkpoint.
        corpus: Whatever `open_corpus` takes, with the column to partition by.
        out: The pool's directory; the same call goes on from there.
        engine: Where members are trained; see `runner`.
        shown: Show a bar on stderr.
        settings: Fields of `PoolSettings` by name.

    Returns:
        The pool.

    Raises:
        CorpusError: The corpus cannot be read, or lacks the column.
        ManifestMismatchError: The pool there is of another parent or recipe, or a member of other rows.
        ModelError: The parent is no whole model, such as an adapter alone.
        SettingError: A setting that cannot work, or only one partition.
    """
    chosen = PoolSettings(**settings)
    runner.check_engine(engine)
    start = located(open_run(parent).checkpoints[-1].path)
    weights_by_name(start)  # every member is held against them: better now than after the first is trained
    opened = open_corpus(corpus)
    parts = read_partitions(start, opened, chosen)
    address = str(Path(opened.origin).resolve()) if isinstance(opened.origin, str | Path) else None
    words = tokenizer_digest(load_tokenizer(start, start, False))
    pool = begin_pool(out, start, chosen.recipe(), corpus=address, words=words)
    if len({*parts, *pool.members}) < 2:
        raise SettingError(
            f"--by {chosen.by}: {len(parts)} partition in the corpus; two or more are expected, to be mixed"
        )
    with pool.place.locked():
        pool = begin_pool(out, start, chosen.recipe(), corpus=address, words=words)  # as it is now that it is ours
        for part in parts.values():
            refuse_other_rows(pool, part, opened.name)
        todo = [part for name, part in parts.items() if not pool.has(name)]
        with runner.progress("Training members", len(parts), done=len(parts) - len(todo), shown=shown) as tick:

            def work(part: Partition, report: runner.Tick) -> tuple[Path, float | None]:
                place = Path(pool.place.root) / "work" / slug(part.name)
                rows = part.draw(chosen.tokens, seed=chosen.seed)
                run = trained(start, rows, place, chosen, tokens=chosen.tokens)
                report(1, chosen.tokens)
                return run, last_loss(run)

            for part, (run, loss) in runner.map(work, todo, engine=engine, on_tick=tick):
                pool = pool.with_member(part.name, run, dtype=chosen.dtype, tokens=chosen.tokens, loss=loss,
                                        rows=len(part.pieces), size=part.tokens, digest=part.digest)  # fmt: skip
                _forget_work(pool)
        pool.write()  # the parent's place and the corpus', which may have moved
        _forget_work(pool)  # of a process that was killed right after its member was listed
    return pool


def refuse_other_rows(pool: Pool, part: Partition, corpus: str) -> None:
    """Where a partition has a member, it was trained on these rows.

    Raises:
        ManifestMismatchError: It was trained on others.
    """
    member = pool.members.get(part.name)
    if member is None or (member.rows == len(part.pieces) and member.digest in (None, part.digest)):
        return
    raise ManifestMismatchError(
        f"{corpus}: its {len(part.pieces):,} rows of the partition {part.name} are not the {member.rows:,} that the "
        f"member in {pool.place.root} was trained on. Give the corpus of the pool, or name another pool."
    )


def _forget_work(pool: Pool) -> None:
    """Remove trainings whose members are there."""
    work = Path(pool.place.root) / "work"
    for name in pool.members:
        shutil.rmtree(work / slug(name), ignore_errors=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def true_model(
    pool: Pool, partitions: Mapping[str, Partition], mixture: Mixture, out: str | Path, *, budgets: float
) -> Path:
    """Train the parent on a mixture's own rows: what a merge only stands in for.

    Args:
        pool: Whose recipe is used.
        partitions: Of the corpus that the pool was trained on.
        mixture: Shares of the token budget.
        out: Of the training.
        budgets: The token budget, in members': of a uniform mixture as many as it has partitions, as in the source.

    Returns:
        Directory of the model or adapter.
    """
    chosen = PoolSettings(**pool.recipe)
    weights = checked(mixture, partitions)
    tokens = round(budgets * chosen.tokens)
    rows = draw_mixture(partitions, weights, tokens, seed=chosen.seed)
    return trained(pool.parent, rows, Path(out), chosen, tokens=tokens)


def read_partitions(parent: str, corpus: Corpus, settings: PoolSettings) -> dict[str, Partition]:
    """A corpus' partitions as the parent's tokenizer counts them."""
    tokenizer = load_tokenizer(parent, parent, False)
    return partitions_of(
        corpus, tokenizer, by=settings.by, max_tokens=settings.max_tokens, unit_tokens=settings.unit_tokens
    )


def pool_partitions(
    pool: Pool, corpus: str | Path | Corpus | Iterable[Row] | None, names: Iterable[str]
) -> dict[str, Partition]:
    """The rows that some members were trained on, from the corpus given or from where the pool remembers it.

    Raises:
        SettingError: There is no corpus, or it lacks a partition.
        ManifestMismatchError: A partition has other rows than its member was trained on.
    """
    origin = corpus if corpus is not None else pool.corpus
    if origin is None or (corpus is None and not Path(str(origin)).exists()):
        raise SettingError(f"{pool.place.root} does not know its corpus any more; give it with --corpus")
    opened = open_corpus(origin)
    found = read_partitions(pool.parent, opened, PoolSettings(**pool.recipe))
    wanted = list(names)
    if missing := [name for name in wanted if name not in found]:
        raise SettingError(
            f"{opened.name}: no row of the partition {missing[0]}. Give a corpus that has all partitions with --corpus."
        )
    for name in wanted:
        refuse_other_rows(pool, found[name], opened.name)
    return {name: found[name] for name in wanted}


def trained(parent: str, rows: list[Row], place: Path, settings: PoolSettings, *, tokens: int) -> Path:
    """One training by the recipe, through `train`; its last checkpoint's directory."""
    steps = max(1, round(settings.steps * tokens / settings.tokens))
    run = train(
        parent,
        [row | {"id": f"{number}:{row['id']}"} for number, row in enumerate(rows)],  # a repeated row is a row
        place,
        epochs=1,
        batch_size=math.ceil(len(rows) / steps),
        lr=settings.lr,
        schedule="constant_with_warmup",
        warmup=settings.warmup_steps / steps,
        max_tokens=settings.max_tokens,
        lora_rank=settings.lora_rank,
        checkpoints=1,
        seed=settings.seed,
        progress=False,
    )
    return Path(located(open_run(run).checkpoints[-1].path))


def last_loss(checkpoint: Path) -> float | None:
    """The last loss that a training logged; None where there is no log."""
    file = checkpoint / "trainer_state.json"
    logged = json.loads(file.read_text())["log_history"] if file.is_file() else []
    losses = [float(line["loss"]) for line in logged if "loss" in line]
    return losses[-1] if losses else None


def slug(name: str) -> str:
    """A partition's or mixture's name as that of a directory.

    >>> slug("code/0"), slug("C++ & C")
    ('code-0-9c54', 'C-C-c562')
    """
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
    return f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"


def pool_place(pool: Pool, *names: str) -> Place:
    """A directory inside a pool."""
    return Place(pool.place.fs, "/".join([pool.place.root, *names]))
