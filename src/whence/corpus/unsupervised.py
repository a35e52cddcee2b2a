"""Why no row of a corpus has a supervised token, so that nothing of it could be trained on or ranked."""

from collections import Counter

from whence.corpus.layouts import in_layout, is_rejected
from whence.corpus.preferences import CHOSEN, CONTRAST, preferences_of
from whence.corpus.reading import Corpus
from whence.corpus.roles import OTHER_NAMES, role_of
from whence.corpus.shapes import Row, shape_of
from whence.corpus.templates import LAST, Tokenizer, supervision
from whence.corpus.tokens import encode, sides_of
from whence.errors import CorpusError

REJECTED = ("rejected", "non_preferred_output")
"""Columns of a rejected answer, which only a contrast reads."""


def refuse_unsupervised(corpus: Corpus, tokenizer: Tokenizer, longest: int | None) -> None:
    """Refuse a corpus of which no row has a supervised token; rows are read up to the first that has one.

    Args:
        corpus: The rows.
        tokenizer: That of the model.
        longest: Most tokens of a row.

    Raises:
        CorpusError: There is no such row, or a row cannot be read.
    """
    reasons: Counter[str] = Counter()
    for example in corpus:
        try:
            if encode(example.row, tokenizer, longest).supervised_count:
                return
        except CorpusError as error:
            raise CorpusError(f"{corpus.name}: row {example.id}: {error}") from None
        reasons[reason(example.row, tokenizer, longest)] += 1
    counts = "; ".join(f"{count:,} of {reasons.total():,} {why}" for why, count in reasons.most_common(3))
    raise CorpusError(f"{corpus.name}: no row has a supervised token, so none could be ranked: {counts}.")


def reason(row: Row, tokenizer: Tokenizer, longest: int | None = None) -> str:
    """What a row without a supervised token lacks, as the end of a sentence about such rows.

    Args:
        row: The row.
        tokenizer: That of the model; it says what is supervised, and whether pairs of answers are contrasts.
        longest: Most tokens of a row.
    """
    if is_rejected(row):
        return "are labelled false, as bad answers"
    preferences = preferences_of(tokenizer)
    columns = shape_of(row, preferences=preferences).columns
    needed = [name for name in columns if preferences == CONTRAST or name not in REJECTED]
    if missing := [name for name in needed if row[name] in (None, [])]:
        return f"have no `{missing[0]}`"
    sides = sides_of(row, tokenizer)
    if len(sides) == 1:
        return _reason_of_side(row, columns[-1], "", tokenizer, longest)
    for side, name in zip(sides, reversed(columns), strict=False):
        if not encode(side, tokenizer, longest, preferences=CHOSEN).supervised_count:
            return _reason_of_side(side, name, f" in `{name}`", tokenizer, longest)
    return f"have the same tokens in `{columns[-1]}` and `{columns[-2]}`, as far as they are kept"


def _reason_of_side(row: Row, column: str, where: str, tokenizer: Tokenizer, longest: int | None) -> str:
    """The reason of a row, or of one answer of a contrast, as a row.

    Args:
        row: The row.
        column: Where it has its answer.
        where: Which of two answers it is, as the end of the reason.
        tokenizer: As for `reason`.
        longest: As for `reason`.
    """
    kind, columns = in_layout(row)
    if longest is not None and encode(row, tokenizer, preferences=CHOSEN).supervised_count:
        return f"are cut to {longest} tokens, of which none is supervised{where}"
    if kind != "messages":
        return f"have an empty `{column}`, or one of a single token"
    turns = [message for message in columns["messages"] or () if isinstance(message, dict)]
    answers = [message for message in turns if role_of(message.get("role")) == "assistant"]
    if not answers:
        roles = ", ".join(f"`{role}`" for role in dict.fromkeys(str(turn.get("role")) for turn in turns)) or "none"
        names = ", ".join(OTHER_NAMES["assistant"])
        return f"have no message of the role `assistant` (or {names}), but {roles}{where}"
    supervised = supervision(tokenizer)
    if supervised != "all" and all(message.get("weight") == 0 for message in answers):
        return f"give every turn of the assistant the weight 0{where}"
    if supervised == LAST and answers[-1].get("weight") == 0:
        return f"give the last turn of the assistant the weight 0{where}"
    return f"have empty turns of the assistant{where}"
