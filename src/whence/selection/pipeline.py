"""Select: a task and a corpus of training rows in, the rows worth training on out.

A task is a corpus file of a few examples; a column `task` makes several targets of it. A scorer says how much each
row helps with each target, a selector makes one order of the scores, and limits and a budget cut that order: any
scorer goes with any selector. Scores of different methods compare by rank alone.

Methods that read gradients need an index (made with `--view adam` for LESS as published); the others take a corpus as
it stands, and a model where they read one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Unpack

from jaxtyping import Float32
from torch import Tensor

from whence import catalogue, outlets
from whence.corpus.columns import current
from whence.corpus.layouts import Row, shown_text
from whence.corpus.preferences import checked, refuse_contrast
from whence.corpus.reading import Corpus, open_corpus
from whence.corpus.tokens import Encoded, encode
from whence.counts import number_of
from whence.errors import CorpusError, SettingError
from whence.indexing.manifest import MANIFEST
from whence.indexing.opening import Index, open_index
from whence.models.load_options import Loading, split_loading
from whence.models.loading import LoadedModel, load_model
from whence.models.runs import open_run
from whence.models.training_state import warn_of_run
from whence.runner import LOCAL, EngineOption, ProgressOption, shown_as, workers_kept
from whence.selection import frozen_adam as frozen
from whence.selection.answers import AnswerShare, answer_shares, collapse
from whence.selection.budget import Budget, Limits, no_index_for
from whence.selection.choice import Candidates, Selection, choose
from whence.selection.other_budgets import full_order
from whence.selection.protocols import Pick, QueryText, Scorer, Target, View
from whence.selection.settings import SelectSettings, described_settings
from whence.selection.views import CorpusView, IndexView, refuse_contrasts
from whence.storage import Place

TASK = "task"
"""Column that names a row's task; rows without it are one task together."""


@dataclass(frozen=True)
class Chosen:
    """What `select` returns: the chosen rows, and how they were chosen."""

    selection: Selection
    rows: list[Row]
    """The chosen rows as the corpus has them, with `whence_score`, in rank order."""
    candidates: Candidates
    settings: dict[str, str]
    """How they were chosen, for a person."""
    asked: list[str] = field(default_factory=list)
    """Texts of the tasks' examples."""
    answers: list[AnswerShare] = field(default_factory=list)
    """How often the task's labels are the answers of the chosen rows, and of its examples; none for free text."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names that Whence reads, and the rows' own in their place, under which they are written; see `corpus.columns`."""
    order: list[Pick] = field(default_factory=list)
    """All rows that may be chosen, best first, the chosen ones in front; see `other_budgets`. Empty where sources have
    limits."""

    to_arrow = outlets.to_arrow
    to_pandas = outlets.to_pandas
    save = outlets.save
    _repr_html_ = outlets.as_html

    def __repr__(self) -> str:
        """How much was chosen, the first row, and how to go on."""
        selection, how = self.selection, f"{self.settings['method']}, {self.settings['selector']}"
        lines = [
            f"Chosen({len(self.rows):,} of {number_of(len(selection.reasons), 'row')}, "
            f"{number_of(selection.tokens, 'token')}, by {how})"
        ]
        if self.rows:
            lines.append(f"  first: row {selection.rows[0]:,}, score {selection.scores[0]:.4g}")
        return "\n".join(
            [*lines, "  More: .rows in rank order, to train on; .selection.tally(), .selection.notes, .settings"]
        )


def select(
    source: str | Path | Index | Corpus | Iterable[Row] | IndexView | CorpusView,
    tasks: str | Path | Corpus | Iterable[Row] | None = None,
    *,
    fraction: float | None = None,
    count: int | None = None,
    tokens_budget: int | None = None,
    corpus: str | Path | Corpus | None = None,
    model: str | None = None,
    view: str | None = None,
    adam_mode: str = "torch",
    preferences: str | None = None,
    engine: EngineOption = LOCAL,
    progress: ProgressOption = False,
    **settings: Any,
) -> Chosen:
    """Choose the training rows that should help most with a task.

    Args:
        source: An index, or a corpus for methods that need none; for the method "replay" a run.
        tasks: Whatever `open_corpus` takes: the examples to choose for. None for methods that look at no task.
        fraction: Share of the rows that can be chosen.
        count: Or a number of rows.
        tokens_budget: Or a number of tokens.
        corpus: The rows to choose from where `source` is an index: it must be the index' own, by ids. None: the copy
            that the index keeps.
        model: For a corpus, the model that scorers read; for an index, the model's directory, where it has moved.
        view: "frozen-v": read an index of plain gradients as Adam would use them; None: as the index has them.
        adam_mode: How that view treats the moments: "torch" or "less".
        preferences: What a task's row with a preferred and a rejected answer is: the one ("chosen"), or the two
            compared ("contrast"); None: as the index' rows are read.
        engine: Where an index is scanned; see `runner`. One that is open already is scanned as it was opened.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).
        settings: Fields of `SelectSettings` by name, such as `method="bm25", caps={"p3": 0.3}`; and of
            `models.load_options.Loading`, such as `device="cuda"`.

    Returns:
        The rows in rank order, and why the others were left out.

    Raises:
        SettingError: A method that cannot be used here, a limit that cannot be kept, no row that can be chosen.
        CorpusError: The task file is empty, or cannot be read.
    """
    loading, settings = split_loading(settings)
    how, budget = SelectSettings(**settings), Budget(fraction=fraction, count=count, tokens=tokens_budget)
    scorer = build_scorer(how.method, how.seed, how.options)
    with shown_as(progress, "Scoring"), workers_kept(engine):
        opened_view = open_view(
            source,
            how.method,
            corpus=corpus,
            model=model,
            brings_model="model" in how.options,
            view=view,
            adam_mode=adam_mode,
            engine=engine,
            **loading,
        )
        copy = None if corpus is None else open_corpus(corpus)
        return _select_each(opened_view, {"": tasks}, scorer, how, budget, copy, preferences)[""]


def select_each(
    view: IndexView | CorpusView,
    tasks: Mapping[str, Any],
    *,
    fraction: float | None = None,
    count: int | None = None,
    tokens_budget: int | None = None,
    **settings: Any,
) -> dict[str, Chosen]:
    """Choose for several task files apart, each with the whole budget, from one pass of scoring; else as `select`.

    Args:
        view: What `open_view` returned.
        tasks: Task files by name.
        fraction: Share of the rows that can be chosen, for each file.
        count: Or a number of rows.
        tokens_budget: Or a number of tokens.
        settings: Fields of `SelectSettings` by name.
    """
    how, budget = SelectSettings(**settings), Budget(fraction=fraction, count=count, tokens=tokens_budget)
    return _select_each(view, tasks, build_scorer(how.method, how.seed, how.options), how, budget, None)


def _select_each(
    view: IndexView | CorpusView,
    tasks: Mapping[str, Any],
    scorer: Scorer,
    settings: SelectSettings,
    budget: Budget,
    corpus: Corpus | None,
    preferences: str | None = None,
) -> dict[str, Chosen]:
    if None in tasks.values() and catalogue.scorer_entry(settings.method).reads_tasks:
        raise SettingError(f"--method {settings.method} compares rows with a task's examples: add --tasks FILE")
    checked(preferences)
    if not catalogue.scorer_entry(settings.method).contrasts:
        reason = f"--method {settings.method} reads one answer of a row"
        refuse_contrasts(view, reason, "Use --method less, or give the corpus in place of the index.")
        refuse_contrast(preferences, f"{reason}. Use --method less on an index, or leave it out for the chosen answer.")
    reading = {"by": settings.by or "task", "preferences": preferences}
    targets_by_task = {name: targets_of(task, view, **reading) for name, task in tasks.items()}
    all_targets = [target for targets, _ in targets_by_task.values() for target in targets]
    all_candidates = _candidates(view, all_targets, scorer(view, all_targets), budget)
    limits, first, out = Limits(caps=settings.caps, floors=settings.floors), 0, {}
    for name, (targets, notes) in targets_by_task.items():
        candidates = all_candidates.of_targets(slice(first, first + len(targets)))
        first += len(targets)
        selector = catalogue.selector(settings.selector or "max")(temperature=settings.temperature, seed=settings.seed)
        selection = choose(candidates, selector, budget, limits=limits, duplicates=settings.duplicates)
        selection.notes[:0] = notes
        queries = [query for target in targets for query in target.queries] if tasks[name] is not None else []
        rows = _rows(view, selection, corpus)
        answers = answer_shares([shown_text(row).get("completion") for row in rows], [q.completion for q in queries])
        takes_turns = (settings.by, settings.selector) == ("example", "round_robin")
        if (warning := collapse(answers, len(rows), takes_turns=takes_turns)) is not None:
            selection.notes.append(warning)
        texts = [f"{query.prompt} {query.completion}".strip() for query in queries]
        described = described_settings(settings, budget, targets, view)
        has_limits = bool(settings.caps or settings.floors)
        order = [] if has_limits else full_order(candidates, selector, selection)
        out[name] = Chosen(selection, rows, candidates, described, texts, answers, dict(view.columns), order)
    return out


def open_view(
    source: str | Path | Index | Corpus | Iterable[Row] | IndexView | CorpusView,
    method: str,
    *,
    corpus: str | Path | Corpus | None = None,
    model: str | None = None,
    brings_model: bool = False,
    view: str | None = None,
    adam_mode: str = "torch",
    engine: EngineOption = LOCAL,
    **loading: Unpack[Loading],
) -> IndexView | CorpusView:
    """An index or a corpus as scorers read it. A model is loaded only if the method needs one, or one is named.

    With `brings_model` the method's own options name the model that it runs. `select` says what `view` is. `corpus` is
    that of a run, where it is not where it was. `engine` says where an index is scanned.
    """
    entry = catalogue.scorer_entry(method)
    if view not in (None, frozen.NAME):
        raise SettingError(f"--view {view}: {frozen.NAME} is expected; without it the index is read as it was made")
    if isinstance(source, IndexView | CorpusView):
        return source
    if entry.needs_run:
        if not isinstance(source, str | Path):
            raise SettingError(f"--method {method} reads a run's directory, in place of an index or a corpus")
        if given := [name for name, value in loading.items() if value is not None and value is not False]:
            raise SettingError(f"--{given[0].replace('_', '-')}: --method {method} reads the model as it was trained")
        from whence.selection.run_view import RunView  # which brings the Trainer

        return RunView.of(source, corpus, model=model)
    if isinstance(source, str | Path) and Place.at(source).exists(MANIFEST):
        source = open_index(source, engine=engine, model=model, **loading)
        source.store.require_complete()
    if isinstance(source, Index):
        return IndexView(source) if view is None else frozen.FrozenView(source, adam_mode=adam_mode)
    if view is not None:
        raise SettingError(f"--view {view} is of an index, and this is a corpus")
    if entry.needs_index:
        raise no_index_for(method, str(source) if isinstance(source, str | Path) else "the rows")
    loaded: LoadedModel | None = None
    if model is not None:
        warn_of_run(model)
        loaded = load_model(open_run(model).checkpoints[-1].path, **loading)
    elif entry.needs_model and not brings_model:
        raise SettingError(f"--method {method} reads a model, and a corpus has none: add --model MODEL")
    return CorpusView(open_corpus(source), loaded)


def build_scorer(method: str, seed: int, options: Mapping[str, Any]) -> Any:
    """Build a scorer with these options; an option that is text is turned into its field's type.

    Raises:
        SettingError: The scorer has no such option, or it cannot have such a value.
    """
    scorer_class = catalogue.scorer(method)
    known = {option.name: option for option in fields(scorer_class)}
    typed = {}
    check_options(options, method, method)
    for name, value in options.items():
        typed[name] = _typed(method, name, value, known[name].type)
    return scorer_class(seed=seed, **typed)


def check_options(options: Mapping[str, Any], scorer: str | None, method: str) -> None:
    """Refuse options that a scorer does not have; `method` is what the user calls it.

    Raises:
        SettingError: The message lists those there are.
    """
    known = fields(catalogue.scorer(scorer)) if options and scorer is not None else ()
    names = [option.name for option in known if option.name != "seed"]
    for name in options:
        if name not in names:
            have = f"It has: {', '.join(names)}." if names else "It has none."
            raise SettingError(f"--set {name}: --method {method} has no such option. {have}")


def _typed(method: str, name: str, value: Any, annotation: Any) -> Any:
    if not isinstance(value, str):
        return value
    kind = str(annotation if isinstance(annotation, str) else getattr(annotation, "__name__", annotation))
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[value.lower()]
        if "float" in kind:
            return float(value)
        return int(value) if "int" in kind else value
    except (ValueError, KeyError):
        raise SettingError(f"--set {name}={value}: this option of --method {method} is a {kind}") from None


def targets_of(
    tasks: str | Path | Corpus | Iterable[Row] | None,
    view: View,
    *,
    by: str = "task",
    preferences: str | None = None,
    max_tokens: int | None = None,
) -> tuple[list[Target], list[str]]:
    """Examples of a task file as targets, in the file's order, and notes of the rows that were left out.

    Without a task file there is one target with an empty example, for methods that do not read it. For `preferences`
    see `select`. `max_tokens` cuts longer examples, as the model's context does.

    Raises:
        CorpusError: The file has no row, or no example with a supervised token.
    """
    if tasks is None:
        return [Target("any", [QueryText("", "", Encoded([], []))])], []
    loaded = view.loaded if isinstance(view, CorpusView) else view.model()
    limits = (max_tokens, None if loaded is None else loaded.context)
    longest = min((limit for limit in limits if limit), default=None)
    groups: dict[str, list[QueryText]] = {}
    indexed = view.columns if isinstance(view, IndexView) else None
    if isinstance(view, IndexView):
        preferences = preferences or view.index.settings.preferences
    names = None if current() or isinstance(tasks, Corpus) else indexed
    dropped, corpus = 0, open_corpus(tasks, columns=names, preferences=preferences)
    for number, example in enumerate(corpus):
        text = shown_text(example.row)
        encoded = Encoded([], [])
        if loaded is not None:
            encoded = encode(example.row, loaded.tokenizer, longest, preferences=preferences)
        is_usable = (
            encoded.supervised_count > 0 if loaded is not None else any(line and line.strip() for line in text.values())
        )
        if not is_usable:
            dropped += 1
            continue
        name = str(example.row.get(TASK, "task"))
        group = name if by == "task" else f"{name} {number}"
        completion = text.get("completion", text.get("text")) or ""
        groups.setdefault(group, []).append(QueryText(text.get("prompt") or "", completion, encoded))
    if not groups:
        raise CorpusError(
            f"{corpus.name}: none of its {number_of(dropped, 'row')} has a supervised token, so there is no task"
        )
    notes = [f"Left out, for they have no supervised token: {number_of(dropped, 'task row')}."] if dropped else []
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
    """The chosen rows, in rank order, from another copy of the corpus where one is given."""
    numbers, rows = set(selection.rows), {}
    if corpus is not None and isinstance(view, IndexView):
        ids = dict(zip(selection.rows, (row["id"] for row in view.index.store.read_rows(selection.rows)), strict=True))
        for number, example in enumerate(corpus):
            if number in numbers:
                if example.id != ids[number]:
                    raise SettingError(
                        f"--corpus {corpus.name}: row {number + 1} has the id {example.id}, in the index it is "
                        f"{ids[number]}. Give the corpus of the index, or leave --corpus out: the index has a copy."
                    )
                rows[number] = example.row
    else:
        rows = {number: row for number, row in enumerate(view.examples()) if number in numbers}
    if len(rows) < len(numbers):
        raise SettingError(f"--corpus {corpus.name if corpus else ''}: it has fewer rows than the index, {view.rows:,}")
    return [
        rows[number] | {"whence_score": score} for number, score in zip(selection.rows, selection.scores, strict=True)
    ]
