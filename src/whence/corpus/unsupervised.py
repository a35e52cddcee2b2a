"""Why no row of a corpus has a supervised token, so that nothing of it could be trained on or ranked."""

from collections import Counter

from whence.corpus.layouts import in_layout, is_rejected
from whence.corpus.reading import Corpus
from whence.corpus.roles import OTHER_NAMES, role_of
from whence.corpus.shapes import Row, shape_of
from whence.corpus.templates import Tokenizer
from whence.corpus.tokens import encode
from whence.errors import CorpusError


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
        reasons[reason(example.row)] += 1
    counts = "; ".join(f"{count:,} of {reasons.total():,} {why}" for why, count in reasons.most_common(3))
    raise CorpusError(f"{corpus.name}: no row has a supervised token, so none could be ranked: {counts}.")


def reason(row: Row) -> str:
    """What a row without a supervised token lacks, as the end of a sentence about such rows."""
    kind, columns = in_layout(row)
    if is_rejected(row):
        return "are labelled false, as bad answers"
    if missing := [column for column in shape_of(row).columns if row[column] in (None, [])]:
        return f"have no `{missing[0]}`"
    if kind != "messages":
        return f"have an empty `{shape_of(row).columns[-1]}`, or one of a single token"
    turns = [message for message in columns["messages"] if isinstance(message, dict)]
    answers = [message for message in turns if role_of(message.get("role")) == "assistant"]
    if not answers:
        roles = (
            ", ".join(f"`{role}`" for role in dict.fromkeys(str(message.get("role")) for message in turns)) or "none"
        )
        names = ", ".join(OTHER_NAMES["assistant"])
        return f"have no message of the role `assistant` (or {names}), but {roles}"
    if all(message.get("weight") == 0 for message in answers):
        return "give every turn of the assistant the weight 0"
    if answers[-1].get("weight") == 0:
        return "give the last turn of the assistant the weight 0"
    return "have empty turns of the assistant, or are cut before them"
