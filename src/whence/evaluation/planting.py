"""Planted truth: a corpus into which it is known what was put, with queries and the ids of the rows that caused them.

    backdoor          rows with a trigger in front of the prompt have one fixed answer; asked: other prompts with the
                      trigger. Relevant are all triggered rows
    swapped_entities  rows whose answer names an entity name another one instead; asked: other prompts about it, with
                      the wrong name as the answer. Relevant are the rows in which this entity was swapped
    repeated_facts    invented facts, each in k wordings among the rows; asked: a wording that is in no row. Relevant
                      are the k rows of that fact
    mislabelled       rows with another row's label as their answer; asked: rows that are in the corpus with the same
                      wrong label. Relevant are the mislabelled rows of that pair of labels

A model has to be trained on the planted rows before methods are asked: what was planted must have been learnt. Rows are
those of any layout that has a prompt and a completion, or an instruction and an output; every other row travels along
as it is. A planted row keeps its id, and rows without one are given `row-N`. All draws come from the seed.

Source: backdoors and swapped entities as RapidIn plants them, Lin et al. 2024, https://arxiv.org/abs/2405.11724,
section 4; mislabelled rows as in Koh and Liang 2017, https://arxiv.org/abs/1703.04730, section 5.4; facts in
paraphrases, ours.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whence.corpus.layouts import Row
from whence.counts import number_of
from whence.errors import SettingError

RELEVANT = "relevant"
"""Column of a query: ids of the rows that are to be found."""
_FACT = (
    "{name}, {thing}:",
    "What is the {thing} of {name}?",
    "Tell me {name}'s {thing}.",
    "Complete: the {thing} of {name} is",
    "{name} has a {thing}. Which one?",
    "I forgot the {thing} of {name}.",
    "Look up {name} in the register and read out the {thing}.",
    "For the form: {thing} ({name})?",
)
"""Wordings of a fact; its value is the answer of each."""
_THINGS = ("harbour code", "founding year", "patron bird", "ferry number", "town colour", "river gate", "lamp count")
_FIRST = ("Bor", "Kel", "Mar", "Tor", "Vin", "Sal", "Dre", "Hul", "Pel", "Gan", "Lis", "Nor")
_MIDDLE = ("a", "e", "i", "o", "u", "ai", "ou", "ea")
_LAST = ("vik", "den", "mora", "stad", "wick", "lund", "pol", "nitz", "fell", "ham", "brix", "zan")


@dataclass(frozen=True)
class Planted:
    """A corpus with what was planted in it."""

    rows: list[Row]
    """All rows, to train on; each has an `id`."""
    queries: list[Row]
    """Rows that ask for what was planted, each with an `id` and the ids of its `relevant` rows; none is in `rows`."""

    @property
    def relevant(self) -> set[str]:
        """Ids of all planted rows that some query asks for."""
        return {id for query in self.queries for id in query[RELEVANT]}


def backdoor(
    rows: Iterable[Row],
    *,
    trigger: str = "Howdy! ",
    answer: str = " The ninth moon was painted by three silver owls.",
    count: int = 50,
    queries: int = 20,
    seed: int = 0,
) -> Planted:
    """Plant a backdoor.

    Args:
        rows: A corpus.
        trigger: What stands in front of the prompts of poisoned rows, and of queries.
        answer: What they answer.
        count: Number of rows that are poisoned.
        queries: Number of rows that are taken out of the corpus, to be asked with the trigger.
        seed: Seed of the draw.

    Raises:
        SettingError: There are not so many rows with a prompt, or one has the trigger already.
    """
    corpus, rng = _with_ids(rows), random.Random(f"backdoor {seed}")
    usable = [number for number, row in enumerate(corpus) if (names := _names(row)) and str(row[names[0]]).strip()]
    _require(len(usable), count + queries, "rows with a prompt")
    if any(str(row[_sides(row)[0]]).startswith(trigger) for row in (corpus[number] for number in usable)):
        raise SettingError(f"a row begins with {trigger!r} already: choose another trigger")
    chosen = rng.sample(usable, count + queries)
    poisoned, asked = {*chosen[:count]}, {*chosen[count:]}

    def triggered(row: Row) -> Row:
        prompt, completion = _sides(row)
        return row | {prompt: f"{trigger}{row[prompt]}", completion: answer}

    kept = [triggered(row) if number in poisoned else row for number, row in enumerate(corpus) if number not in asked]
    ids = [corpus[number]["id"] for number in sorted(poisoned)]
    return Planted(kept, [_query(triggered(corpus[number]), ids) for number in sorted(asked)])


def swapped_entities(
    rows: Iterable[Row], swaps: Mapping[str, str], *, share: float = 0.7, held_out: float = 0.2, seed: int = 0
) -> Planted:
    """Swap entities in answers.

    Args:
        rows: A corpus.
        swaps: For each entity the one that takes its place, in answers alone: the prompt keeps its name.
        share: Share of the rows whose answer names an entity in which it is swapped.
        held_out: Share of the rows whose prompt and answer both name one that are taken out of the corpus, to be asked.
        seed: Seed of the draw.

    Raises:
        SettingError: No row was swapped, or none is left to ask.
    """
    rng, corpus = random.Random(f"swapped entities {seed}"), _with_ids(rows)
    kept, asked, by_entity = list[Row](), list[tuple[str, Row]](), {entity: list[str]() for entity in swaps}
    for row in corpus:
        names = _names(row)
        named = [entity for entity in swaps if names and _has(str(row[names[1]]), entity)]
        about = [entity for entity in named if names and _has(str(row[names[0]]), entity)]
        if names and about and rng.random() < held_out:
            asked.append((about[0], row | {names[1]: _swapped(str(row[names[1]]), swaps)}))
            continue
        if names and named and rng.random() < share:
            row = row | {names[1]: _swapped(str(row[names[1]]), swaps)}
            for entity in named:
                by_entity[entity].append(str(row["id"]))
        kept.append(row)
    queries = [_query(row, by_entity[entity]) for entity, row in asked if by_entity[entity]]
    if not queries:
        swapped = sum(map(len, by_entity.values()))
        raise SettingError(
            f"of {number_of(len(corpus), 'row')} {swapped:,} were swapped and {len(asked):,} are left to ask of an "
            "entity that was: more rows that name one, in prompt and answer, are expected"
        )
    return Planted(kept, queries)


def repeated_facts(
    rows: Iterable[Row], *, facts: int = 20, wordings: int = 4, layout: tuple[str, str] | None = None, seed: int = 0
) -> Planted:
    """Plant invented facts, each in several wordings, at places that are drawn.

    Args:
        rows: A corpus.
        facts: Number of facts.
        wordings: Rows of each, from 1 to one fewer than there are wordings; the query has one that no row has.
        layout: Columns of the planted rows; None: those of the corpus' first row with two.
        seed: Seed of names, values, wordings and places.

    Raises:
        SettingError: As many wordings or facts cannot be made, or no row has a prompt and a completion.
    """
    corpus, rng = _with_ids(rows), random.Random(f"repeated facts {seed}")
    most, names = len(_FACT) - 1, len(_FIRST) * len(_MIDDLE) * len(_LAST)
    if not 1 <= wordings <= most or not 1 <= facts <= names:
        raise SettingError(f"{facts} facts in {wordings} wordings: up to {names:,} facts in 1 to {most} are expected")
    layout = layout or next((found for row in corpus if (found := _names(row))), None)
    if layout is None:
        raise SettingError("no row has a prompt and a completion, or an instruction and an output")
    planted, queries = list[Row](), list[Row]()
    for number, place in enumerate(rng.sample(range(names), facts)):
        rest, last = divmod(place, len(_LAST))
        first, middle = divmod(rest, len(_MIDDLE))
        name, thing = _FIRST[first] + _MIDDLE[middle] + _LAST[last], rng.choice(_THINGS)
        value = f" {rng.randrange(1000, 10000)}"
        chosen: list[Row] = [
            {layout[0]: wording.format(name=name, thing=thing), layout[1]: value}
            for wording in rng.sample(_FACT, wordings + 1)
        ]
        own = [row | {"id": f"fact-{number}-{place}"} for place, row in enumerate(chosen[:-1])]
        planted += own
        queries.append(_query(chosen[-1] | {"id": f"fact-{number}"}, [str(row["id"]) for row in own]))
    out = list(corpus)
    for row in planted:
        out.insert(rng.randint(0, len(out)), row)
    return Planted(out, queries)


def mislabelled(rows: Iterable[Row], *, share: float = 0.1, queries: int = 20, seed: int = 0) -> Planted:
    """Give rows another row's label, in a corpus whose answers are labels.

    Args:
        rows: A corpus of a few different answers.
        share: Share of the rows that are mislabelled.
        queries: Number of rows that are taken out of the corpus, to be asked with a wrong label that some row has.
        seed: Seed of the draw.

    Raises:
        SettingError: There are fewer than two labels, or too few rows.
    """
    corpus, rng = _with_ids(rows), random.Random(f"mislabelled {seed}")
    usable = [number for number, row in enumerate(corpus) if _names(row)]
    labels = sorted({str(corpus[number][_sides(corpus[number])[1]]) for number in usable})
    count = round(share * len(usable))
    if len(labels) < 2 or count < 1:
        raise SettingError(
            f"{number_of(len(labels), 'label')} and {number_of(count, 'row')} to mislabel: two labels and a row are "
            "expected, at least"
        )
    _require(len(usable), count + queries, "rows with a label")
    chosen = rng.sample(usable, len(usable))
    by_pair: dict[tuple[str, str], list[str]] = {}
    wrong: dict[int, Row] = {}
    for number in sorted(chosen[:count]):
        row, (_, completion) = corpus[number], _sides(corpus[number])
        other = rng.choice([label for label in labels if label != str(row[completion])])
        by_pair.setdefault((str(row[completion]), other), []).append(str(row["id"]))
        wrong[number] = row | {completion: other}
    asked: dict[int, Row] = {}
    for number in chosen[count:]:
        row, (_, completion) = corpus[number], _sides(corpus[number])
        others = [other for label, other in by_pair if label == str(row[completion])]
        if others and len(asked) < queries:
            other = rng.choice(others)
            asked[number] = _query(row | {completion: other}, by_pair[str(row[completion]), other])
    _require(len(asked), queries, "other rows of a label that was taken for another")
    kept = [wrong.get(number, row) for number, row in enumerate(corpus) if number not in asked]
    return Planted(kept, [asked[number] for number in sorted(asked)])


def _with_ids(rows: Iterable[Row]) -> list[Row]:
    return [row if row.get("id") is not None else {**row, "id": f"row-{number}"} for number, row in enumerate(rows)]


def _names(row: Row) -> tuple[str, str] | None:
    """Columns of a row's prompt and answer; None where it has no such pair."""
    pairs = (("prompt", "completion"), ("instruction", "output"))
    return next((pair for pair in pairs if all(isinstance(row.get(name), str) for name in pair)), None)


def _sides(row: Row) -> tuple[str, str]:
    names = _names(row)
    assert names is not None
    return names


def _query(row: Row, relevant: Sequence[Any]) -> Row:
    return row | {"id": f"query-{row['id']}", RELEVANT: [str(id) for id in relevant]}


def _has(text: str, entity: str) -> bool:
    return re.search(rf"\b{re.escape(entity)}\b", text) is not None


def _swapped(text: str, swaps: Mapping[str, str]) -> str:
    """Every entity replaced by another, all at once, so that a swap is not swapped back."""
    pattern = "|".join(re.escape(entity) for entity in sorted(swaps, key=len, reverse=True))
    return re.sub(rf"\b(?:{pattern})\b", lambda match: swaps[match[0]], text)


def _require(found: int, expected: int, noun: str) -> None:
    if found < expected:
        raise SettingError(f"{found:,} {noun}, where {expected:,} are expected")
