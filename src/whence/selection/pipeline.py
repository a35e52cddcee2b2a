"""Select: a task and a pool of training rows in, the rows worth training on out.

A task is a corpus file of a few examples; a column `task` makes several targets of it. A scorer says how much each
pool row helps with each target, a selector makes one order of that, and limits and a budget cut it: any scorer goes
with any selector. Scores of different methods compare by rank alone.

Methods that read gradients need an index, with the moments' view (`--view adam`) for LESS as published; the others take
a corpus as it stands, and a model where they read one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxtyping import Float32
from torch import Tensor

from whence import catalogue
from whence.corpus.layouts import Row, shown_text
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.tokens import Encoded, encode
from whence.errors import CorpusError, SettingError
from whence.indexing.build import Index, open_index
from whence.indexing.manifest import MANIFEST
from whence.models.loading import LoadedModel, load_model
from whence.selection import frozen_adam as frozen
from whence.selection.budget import Amount, Budget, Limits
from whence.selection.choice import Candidates, Selection, choose
from whence.selection.protocols import QueryText, Scorer, Target, View
from whence.selection.scorers.lexical import kl_reduction
from whence.selection.views import CorpusView, IndexView
from whence.storage import Place

TASK = "task"
"""Column that names a row's task; rows without it are one task together."""


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """How to choose."""

    method: str = "less"
    """Name in `catalogue.SCORERS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the method, by the names of its fields, such as {"within": "mean_cosine"}."""
    selector: str | None = None
    """Name in `catalogue.SELECTORS`; None: the method's own."""
    by: str | None = None
    """What a target is: a "task", or each "example" of the task file; None: the method's own."""
    caps: Mapping[str, Amount] = field(default_factory=dict)
    """Most of each source: rows, or a share of the budget."""
    floors: Mapping[str, Amount] = field(default_factory=dict)
    """Least of each source."""
    duplicates: float | None = 1.0
    """Similarity of texts from which a row is a duplicate of one already chosen; None takes duplicates too."""
    temperature: float = 0.0
    """0: the best rows. Above: rows drawn with probability softmax(score / temperature)."""
    seed: int = 0
    """Of whatever is drawn."""

    def __post_init__(self):
        entry = catalogue.scorer_entry(self.method)
        if self.by not in (None, "task", "example"):
            raise SettingError(f"--by {self.by}: choose task or example")
        object.__setattr__(self, "selector", self.selector or entry.selector)
        object.__setattr__(self, "by", self.by or entry.by)


@dataclass(frozen=True)
class Chosen:
    """What a select job found."""

    selection: Selection
    rows: list[Row]
    """The chosen rows as the corpus has them, with `whence_score`, in rank order."""
    candidates: Candidates
    settings: dict[str, str]
    """How, for a person."""
    asked: list[str] = field(default_factory=list)
    """Texts of the tasks' examples."""


def select(
    source: str | Path | Index | Corpus | Iterable[Row] | IndexView | CorpusView,
    tasks: str | Path | Corpus | Iterable[Row] | None = None,
    *,
    fraction: float | None = None,
    count: int | None = None,
    tokens_budget: int | None = None,
    corpus: str | Path | Corpus | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    view: str | None = None,
    adam_mode: str = "torch",
    **settings: Any,
) -> Chosen:
    """Choose the training rows that should help most with a task.

    Args:
        source: An index, or a corpus for methods that need none.
        tasks: Whatever `open_corpus` takes: the examples to choose for. None for methods that look at no task.
        fraction: Share of the rows that can be chosen.
        count: Or a number of rows.
        tokens_budget: Or a number of tokens.
        corpus: The rows to choose from where `source` is an index: it must be the index' own, by ids. None: the copy
            that the index keeps.
        model: For a corpus: what its scores read. For an index: the model's directory, where it has moved.
        tokenizer: Where the tokenizer is, if not with the model, or if it has moved.
        device: Where to load the model.
        device_map: "auto" spreads a large model over all devices.
        trust_remote_code: Let the model's repository run its own code.
        view: "frozen-v": read an index of plain gradients as Adam would use them; None: as the index has them.
        adam_mode: "torch" or "less", of that view.
        settings: Fields of `SelectSettings` by name, such as `method="bm25", caps={"p3": 0.3}`.

    Returns:
        The rows in rank order, and why the others were left out.

    Raises:
        SettingError: A method that cannot be used here, a limit that cannot be kept, no row that can be chosen.
        CorpusError: The task file is empty, or cannot be read.
    """
    chosen, budget = SelectSettings(**settings), Budget(fraction=fraction, count=count, tokens=tokens_budget)
    scorer = made_scorer(chosen.method, chosen.seed, chosen.options)
    opened = open_view(
        source,
        chosen.method,
        model=model,
        tokenizer=tokenizer,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        brings_model="model" in chosen.options,
        view=view,
        adam_mode=adam_mode,
    )
    named = None if corpus is None else open_corpus(corpus)
    return _select_each(opened, {"": tasks}, scorer, chosen, budget, named)[""]


def select_each(
    view: IndexView | CorpusView,
    tasks: Mapping[str, Any],
    *,
    fraction: float | None = None,
    count: int | None = None,
    tokens_budget: int | None = None,
    **settings: Any,
) -> dict[str, Chosen]:
    """Choose for several task files apart, each with the whole budget, by one pass of scoring; else as `select`.

    Args:
        view: Of `open_view`.
        tasks: Task files by name.
        fraction: Share of the rows that can be chosen, for each file.
        count: Or a number of rows.
        tokens_budget: Or a number of tokens.
        settings: Fields of `SelectSettings` by name.
    """
    chosen, budget = SelectSettings(**settings), Budget(fraction=fraction, count=count, tokens=tokens_budget)
    return _select_each(view, tasks, made_scorer(chosen.method, chosen.seed, chosen.options), chosen, budget, None)


def _select_each(
    view: IndexView | CorpusView,
    tasks: Mapping[str, Any],
    scorer: Scorer,
    settings: SelectSettings,
    budget: Budget,
    corpus: Corpus | None,
) -> dict[str, Chosen]:
    if None in tasks.values() and catalogue.scorer_entry(settings.method).reads_tasks:
        raise SettingError(f"--method {settings.method} compares rows with a task's examples: add --tasks FILE")
    asked = {name: targets_of(task, view, by=settings.by or "task") for name, task in tasks.items()}
    every = [target for targets, _ in asked.values() for target in targets]
    candidates = _candidates(view, every, scorer(view, every), budget)
    limits, first, out = Limits(caps=settings.caps, floors=settings.floors), 0, {}
    for name, (targets, notes) in asked.items():
        own = candidates.of_targets(slice(first, first + len(targets)))
        first += len(targets)
        selector = catalogue.selector(settings.selector or "max")(temperature=settings.temperature, seed=settings.seed)
        selection = choose(own, selector, budget, limits=limits, duplicates=settings.duplicates)
        selection.notes[:0] = notes
        texts = [f"{query.prompt} {query.completion}".strip() for target in targets for query in target.queries]
        told = _told(settings, budget, targets, view)
        out[name] = Chosen(selection, _rows(view, selection, corpus), own, told, texts)
    return out


def open_view(
    source: str | Path | Index | Corpus | Iterable[Row] | IndexView | CorpusView,
    method: str,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    brings_model: bool = False,
    view: str | None = None,
    adam_mode: str = "torch",
) -> IndexView | CorpusView:
    """An index or a corpus as scorers read it. A model is loaded only if the method needs one, or it is named.

    `brings_model`: the method's own options name the one that it runs. `view`: see `select`.
    """
    entry = catalogue.scorer_entry(method)
    where: dict[str, Any] = {"tokenizer": tokenizer, "device": device, "device_map": device_map}
    if view not in (None, frozen.NAME):
        raise SettingError(f"--view {view}: {frozen.NAME} is expected; without it the index is read as it was made")
    if isinstance(source, IndexView | CorpusView):
        return source
    if isinstance(source, str | Path) and Place.at(source).exists(MANIFEST):
        source = open_index(source, model=model, trust_remote_code=trust_remote_code, **where)
        source.store.require_complete()
    if isinstance(source, Index):
        return IndexView(source) if view is None else frozen.FrozenView(source, adam_mode=adam_mode)
    if view is not None:
        raise SettingError(f"--view {view} is of an index, and this is a corpus")
    if entry.needs_index:
        named = source if isinstance(source, str | Path) else "the rows"
        raise SettingError(
            f"{named}: no index, which --method {method} needs. Make one with: whence index MODEL CORPUS -o INDEX"
        )
    loaded: LoadedModel | None = None
    if model is not None:
        loaded = load_model(model, trust_remote_code=trust_remote_code, **where)
    elif entry.needs_model and not brings_model:
        raise SettingError(f"--method {method} reads a model, and a corpus has none: add --model MODEL")
    return CorpusView(open_corpus(source), loaded)


def made_scorer(method: str, seed: int, options: Mapping[str, Any]) -> Any:
    """A scorer with its options set, each turned from text into its field's type where it is text.

    Raises:
        SettingError: The scorer has no such option, or it cannot have such a value.
    """
    make = catalogue.scorer(method)
    known = {each.name: each for each in fields(make) if each.name != "seed"}
    given = {}
    for name, value in options.items():
        if name not in known:
            have = ", ".join(known) or "none"
            raise SettingError(f"--set {name}: --method {method} has no such option. It has: {have}.")
        given[name] = _typed(method, name, value, known[name].type)
    return make(seed=seed, **given)


def _typed(method: str, name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str):
        return value
    kinds = str(kind if isinstance(kind, str) else getattr(kind, "__name__", kind))
    try:
        if "bool" in kinds:
            return {"true": True, "false": False}[value.lower()]
        if "float" in kinds:
            return float(value)
        return int(value) if "int" in kinds else value
    except (ValueError, KeyError):
        raise SettingError(f"--set {name}={value}: this option of --method {method} is a {kinds}") from None


def targets_of(
    tasks: str | Path | Corpus | Iterable[Row] | None, view: View, *, by: str = "task"
) -> tuple[list[Target], list[str]]:
    """Examples of a task file as targets, in the file's order, and what was left out of them.

    Without a task file there is one target, whose example says nothing, for methods that do not read it.

    Raises:
        CorpusError: The file has no row, or no example with a supervised token.
    """
    if tasks is None:
        return [Target("any", [QueryText("", "", Encoded([], []))])], []
    loaded = view.loaded if isinstance(view, CorpusView) else view.model()
    longest = None if loaded is None else loaded.context
    groups: dict[str, list[QueryText]] = {}
    dropped, corpus = 0, open_corpus(tasks)
    for number, example in enumerate(corpus):
        shown = shown_text(example.row)
        encoded = Encoded([], []) if loaded is None else encode(example.row, loaded.tokenizer, longest)
        is_usable = encoded.targets > 0 if loaded is not None else any(text and text.strip() for text in shown.values())
        if not is_usable:
            dropped += 1
            continue
        name = str(example.row.get(TASK, "task"))
        group = name if by == "task" else f"{name} {number}"
        completion = shown.get("completion", shown.get("text")) or ""
        groups.setdefault(group, []).append(QueryText(shown.get("prompt") or "", completion, encoded))
    if not groups:
        raise CorpusError(f"{corpus.name}: none of its {dropped} rows has a supervised token, so there is no task")
    notes = [f"{dropped} task rows have no supervised token and were left out."] if dropped else []
    return [Target(name, queries) for name, queries in groups.items()], notes


def _candidates(
    view: IndexView | CorpusView, targets: Sequence[Target], scores: Float32[Tensor, "s n"], budget: Budget
) -> Candidates:
    if isinstance(view, IndexView) or view.loaded is not None:
        return Candidates.of(view, targets, scores)
    if budget.tokens is not None:
        raise SettingError(f"{budget}: without a model there is no tokenizer to count tokens with: add --model MODEL")
    return Candidates.of_texts(view.examples(), targets, scores)


def _rows(view: IndexView | CorpusView, selection: Selection, corpus: Corpus | None) -> list[Row]:
    """The chosen rows, in rank order; of another copy of the corpus, where one is given."""
    wanted, kept = set(selection.rows), {}
    if corpus is not None and isinstance(view, IndexView):
        ids = dict(zip(selection.rows, (row["id"] for row in view.index.store.read_rows(selection.rows)), strict=True))
        for number, example in enumerate(corpus):
            if number in wanted:
                if example.id != ids[number]:
                    raise SettingError(
                        f"--corpus {corpus.name}: row {number + 1} has the id {example.id}, in the index it is "
                        f"{ids[number]}. Give the corpus of the index, or leave --corpus out: the index has a copy."
                    )
                kept[number] = example.row
    else:
        kept = {number: row for number, row in enumerate(view.examples()) if number in wanted}
    if len(kept) < len(wanted):
        raise SettingError(f"--corpus {corpus.name if corpus else ''}: it has fewer rows than the index, {view.rows:,}")
    return [
        kept[number] | {"whence_score": score} for number, score in zip(selection.rows, selection.scores, strict=True)
    ]


def _told(settings: SelectSettings, budget: Budget, targets: Sequence[Target], view: View) -> dict[str, str]:
    examples = sum(len(target.queries) for target in targets)
    told = {
        "method": settings.method,
        "options": ", ".join(f"{name}={value}" for name, value in settings.options.items()),
        "selector": f"{settings.selector} over {_counted(len(targets), settings.by)}, {_counted(examples, 'example')}",
        "budget": str(budget),
        "caps": ", ".join(f"{name}={value}" for name, value in settings.caps.items()),
        "floors": ", ".join(f"{name}={value}" for name, value in settings.floors.items()),
        "duplicates": "kept" if settings.duplicates is None else f"left out from similarity {settings.duplicates:g}",
        "temperature": f"{settings.temperature:g}, seed {settings.seed}" if settings.temperature else "",
    }
    if isinstance(view, IndexView):
        space = view.index.space.as_json()
        told["index"] = str(view.index.store.place.root)
        if isinstance(view, frozen.FrozenView):
            told["view"] = f"{frozen.NAME}, mode {view.adam_mode}"
        told["gradients"] = ", ".join(f"{name} {value}" for name, value in space.items() if value is not None)
    else:
        told["corpus"] = view.corpus.name if isinstance(view, CorpusView) else ""
    return {name: value for name, value in told.items() if value}


def _counted(count: int, thing: str | None) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


# -- what a person should know of a selection


def composition(chosen: Chosen) -> list[dict[str, Any]]:
    """Of each source: rows and tokens of the pool and of the selection, and how far it is over-represented.

    `lift` is its share of the selection over its share of the pool, in rows: 1 for a fair draw.
    """
    candidates, selected = chosen.candidates, set(chosen.selection.rows)
    pool, pool_tokens, rows, tokens = Counter(), Counter(), Counter(), Counter()
    for number, source in enumerate(candidates.sources):
        length = int(candidates.tokens[number])
        pool[source] += 1
        pool_tokens[source] += length
        if number in selected:
            rows[source] += 1
            tokens[source] += length
    total, chosen_rows = sum(pool.values()), len(selected)
    return [
        {
            "source": source,
            "pool_rows": count,
            "rows": rows[source],
            "share": rows[source] / chosen_rows,
            "lift": rows[source] / chosen_rows / (count / total),
            "pool_tokens": pool_tokens[source],
            "tokens": tokens[source],
        }
        for source, count in sorted(pool.items(), key=lambda item: (-rows[item[0]], -item[1]))
    ]


def lengths(chosen: Chosen) -> dict[str, float]:
    """Median tokens of the pool's rows that could be chosen, and of the chosen."""
    able = chosen.candidates.rankable()
    tokens = chosen.candidates.tokens.double()
    return {
        "pool_median_tokens": float(tokens[able].median()),
        "median_tokens": float(tokens[chosen.selection.rows].median()),
    }


def nearness(chosen: Chosen) -> float | None:
    """How much nearer the chosen rows' n-grams are to the tasks' than the pool's: see `lexical.kl_reduction`, in nats.

    None where the tasks, or the rows, have no word. One pass over the pool's text.
    """
    texts = chosen.candidates.texts
    try:
        return kl_reduction([texts[row] for row in chosen.selection.rows], chosen.asked, texts)
    except SettingError:
        return None


def compared(
    chosen: Chosen, view: IndexView | CorpusView, tasks: Any, methods: Sequence[str], **settings: Any
) -> dict[str, float]:
    """Overlap of a selection with those of other methods under the same budget; see `overlap`."""
    found = {name: select(view, tasks, method=name, **settings).selection.rows for name in methods}
    return {name: overlap(chosen.selection.rows, rows) for name, rows in found.items()}


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the smaller selection's rows that the other has too.

    >>> overlap([1, 2, 3, 4], [4, 3, 9])
    0.6666666666666666
    """
    return len({*one} & {*other}) / max(1, min(len({*one}), len({*other})))
