"""The level that a query's best z must pass: what meaningless queries of its own length reach.

A long completion's gradient is a mean over many tokens, a short one's is a few tokens' own, and what chance reaches
differs. So completions that no example can have taught, as long as the query's and under prompts of the corpus as long
as its prompt, are traced in the same way, by the index alone. They are of three kinds, `OF_A_KIND` of each:

    tokens     uniformly random ones: what nobody wrote
    letters    of the corpus' answers, shuffled: its own alphabet, without a word
    answers    of other rows of the corpus, which answer something else; those rows, and others with the same answer,
               do not count

The level is the highest of the kinds' `needed_z`: among the completions of a kind and one more, that one stands above
it with probability `CHANCE` at most, whatever the distribution. A text is like one kind or another, and which is not
known: where the level was that of random tokens alone, one in eight ordinary answers about something else passed it
(docs/LOG.md). Where a query's z is of exact scores, it has not the index' noise, which lifts the best of many, so that
fewer pass. A span and a contrast are the query's own too.

Cost: `MEANINGLESS` gradients for each `Shape`, once while an index is open. Lengths are rounded to a tenth, so that
queries of all lengths up to 1,000 tokens need some thirty levels.

Source of the rank: conformal prediction, Vovk et al. 2005, https://doi.org/10.1007/b106715, proposition 2.3.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from whence.corpus.layouts import shown_text
from whence.corpus.shapes import Row
from whence.corpus.templates import Tokenizer
from whence.corpus.tokens import Encoded, encode_query
from whence.gradients.exact import SignedSequence
from whence.indexing.opening import Index
from whence.numerics import generator
from whence.tracing.queries import EncodedQuery

KINDS = ("tokens", "letters", "answers")
OF_A_KIND = 33
"""Of so many the largest is passed by one more with a probability of 1 in 34."""
MEANINGLESS = len(KINDS) * OF_A_KIND
CHANCE = 0.05
STEPS_AN_OCTAVE = 4
PROMPT_CHARACTERS = 400
"""Longest prompt, of a meaningless query: the level hardly depends on it, and a longer one costs time."""
SPARE = 1.5
"""Random tokens that are drawn for each one that is needed: as text, some are merged."""
LETTERS_A_TOKEN = 4
"""Shuffled letters that are enough for a token."""
MOST_ANSWERS = 64
"""Answers that one text is made of, at most."""
EQUAL_ANSWERS = 64
"""Examples that are ranked beside those that count, for some may have the answer that a text is made of."""


@dataclass(frozen=True)
class Shape:
    """What two queries share whose levels are the same."""

    prompt: int
    """Characters of the prompt."""
    completions: tuple[tuple[float, int, int, int], ...]
    """Of the completion, and of the contrast: sign, number of tokens, first and end of those that are asked about."""

    @staticmethod
    def of(query: EncodedQuery, context: int | None = None) -> "Shape":
        """The shape of a query, its lengths rounded, and no longer than a model's context beside a prompt's token."""
        answer, completions = query.answer, []
        asked = [answer.asked, [True] * len(answer.contrast_tokens)]
        for sequence, is_asked in zip(query.sequences, asked, strict=False):
            completions.append((sequence.sign, *_stretch(is_asked, context)))
        return Shape(rounded(min(PROMPT_CHARACTERS, len(query.answer.prompt)), 1), tuple(completions))


def _stretch(asked: list[bool], context: int | None) -> tuple[int, int, int]:
    """Number of tokens, and first and end of those that are asked about, for a completion of about this length."""
    count, size = len(asked), rounded(len(asked), STEPS_AN_OCTAVE)
    size = min(size, max(1, context - 1)) if context else size
    first, end = asked.index(True), count - asked[::-1].index(True)
    if (first, end) == (0, count):
        return size, 0, size
    begin = min(size - 1, round(first * size / count))
    return size, begin, min(size, begin + rounded(end - first, STEPS_AN_OCTAVE))


def rounded(length: int, steps: int) -> int:
    """A length to the nearest of so many in each octave.

    >>> [rounded(length, 4) for length in (0, 1, 5, 9, 24, 25, 60, 120)]
    [0, 1, 5, 10, 23, 27, 64, 128]
    """
    return round(2 ** (round(steps * math.log2(length)) / steps)) if length else 0


@dataclass(frozen=True)
class Meaningless:
    """A query that no example can have taught, but for those that its text is taken from."""

    sequences: list[SignedSequence]
    kind: str
    answers: frozenset[str] = frozenset()
    """Texts of rows that it is made of: examples with such an answer do not count."""


def meaningless(index: Index, shape: Shape, seed: int = 0) -> list[Meaningless]:
    """Queries of a shape, `OF_A_KIND` of each of `KINDS`.

    They are laid out and closed as any query is, so that they have what all rows share, such as a chat template.
    """
    rng, tokenizer = generator(seed, "levels", "meaningless"), index.model().tokenizer
    context = index.model().context
    prompts, answers = _prompts(index, shape.prompt, rng), itertools.cycle(_answers(index, rng))
    queries = []
    for number, prompt in enumerate(prompts):
        kind = KINDS[number * len(KINDS) // len(prompts)]
        sequences, used = list[SignedSequence](), list[str]()
        for sign, size, first, end in shape.completions:
            text, own = _completion(kind, size, tokenizer, answers, rng)
            encoded = encode_query(prompt, text, tokenizer, kind=index.layout)
            sequences.append(SignedSequence(_cut(encoded, size, first, end, context), sign))
            used += own
        queries.append(Meaningless(sequences, kind, frozenset(used)))
    return queries


def _completion(
    kind: str, size: int, tokenizer: Tokenizer, answers: Iterator[str], rng: torch.Generator
) -> tuple[str, list[str]]:
    """A text of so many tokens or more, and the answers of which it may be taught."""
    if kind == "tokens":
        allowed = torch.tensor(sorted({*range(len(tokenizer))} - {*tokenizer.all_special_ids}))
        drawn = torch.randint(len(allowed), (math.ceil(SPARE * size) + 8,), generator=rng)
        return tokenizer.decode(allowed[drawn]), []
    if kind == "letters":
        needed = LETTERS_A_TOKEN * size + 8
        letters = "".join(_filled(answers, lambda text: len(text) >= needed))[-needed:]
        return "".join(letters[place] for place in torch.randperm(len(letters), generator=rng).tolist()), []
    used = _filled(answers, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= size)
    return " ".join(used), used


def _filled(answers: Iterator[str], is_enough: Callable[[str], bool]) -> list[str]:
    """So many of the next answers that they are enough together."""
    used = [next(answers)]
    while not is_enough(" ".join(used)) and len(used) < MOST_ANSWERS:
        used.append(next(answers))
    return used


def _answers(index: Index, rng: torch.Generator) -> list[str]:
    """Answers of some rows, or texts, that are not empty; a letter where all are."""
    rankable = index.store.rankable()
    rows = rankable[torch.randperm(len(rankable), generator=rng)[: 4 * MEANINGLESS]].tolist()
    texts = [answer_of(index, row) for row in index.store.read_rows(rows)]
    return [text for text in texts if text.strip()] or ["?"]


def answer_of(index: Index, stored: Row) -> str:
    """Text of a stored row's answer, or all of it where nothing is asked."""
    shown = shown_text(index.shown_row(stored))
    return str(shown.get("completion") or shown.get("text") or "")


def _prompts(index: Index, characters: int, rng: torch.Generator) -> list[str]:
    """Starts of the corpus' prompts, or of its texts; where one is too short, others follow it."""
    rankable = index.store.rankable()
    rows = rankable[torch.randint(len(rankable), (2 * MEANINGLESS,), generator=rng)].tolist()
    shown = [shown_text(index.shown_row(row)) for row in index.store.read_rows(rows)]
    texts = [str(text.get("prompt") or text.get("text") or "") for text in shown]
    prompts = []
    for number in range(MEANINGLESS):
        prompt = texts[number]
        for other in texts[number + 1 : number + MEANINGLESS]:
            if len(prompt) >= characters:
                break
            prompt = f"{prompt} {other}".strip()
        prompts.append(prompt[:characters])
    return prompts


def _cut(encoded: Encoded, size: int, first: int, end: int, context: int | None) -> Encoded:
    """The prompt, and the last `size` tokens of the completion, of which those from `first` to `end` are supervised."""
    targets = [place for place, is_target in enumerate(encoded.supervised) if is_target][-size:]
    prompt = encoded.ids[: encoded.supervised.index(True)]
    prompt = prompt[: max(1, context - size)] if context else prompt
    asked = [first <= place < end for place in range(len(targets))]
    if not any(asked):
        asked[-1] = True  # fewer tokens than were drawn
    return Encoded([*prompt, *(encoded.ids[place] for place in targets)], [False] * len(prompt) + asked)


def cost(shapes: Sequence[Shape]) -> str:
    """What was measured, in words."""
    lengths = sorted({sum(completion[1] for completion in shape.completions) for shape in shapes})
    words = ", ".join(map(str, lengths[:-1])) + " and " if len(lengths) > 1 else ""
    return f"{MEANINGLESS} meaningless completions of {words}{lengths[-1]} tokens"


def level_of(drawn: Sequence[Meaningless], best: Sequence[float | None]) -> float:
    """The highest of the kinds' `needed_z`, from the best z of each query.

    None stands for a query that all examples ranked for it may have taught. In a corpus of a few answers, such as
    labels, they are many: then the kind says nothing, and is left out.
    """
    levels = []
    for kind in KINDS:
        own = [z for query, z in zip(drawn, best, strict=True) if query.kind == kind]
        known = [z for z in own if z is not None]
        if known and 2 * len(known) >= len(own):
            levels.append(needed_z(known))
    return max(levels)


def needed_z(best: Sequence[float]) -> float:
    """The z that the best z of 19 in 20 queries of one kind stays below."""
    rank = math.ceil((1 - CHANCE) * (len(best) + 1))
    return sorted(best)[min(rank, len(best)) - 1]


def verdict(best: float | None, needed: float) -> str:
    """Whether any example stands above chance (the null), in words."""
    if best is not None and best > needed:
        return f"The best example stands above chance: z {best:.1f}, where meaningless completions reach {needed:.1f}."
    reason = "no example has a z" if best is None else f"the best z is {best:.1f}"
    return (
        f"Nothing here stands above chance: {reason}, and meaningless completions reach {needed:.1f}. "
        "Do not read a cause into these examples."
    )
