"""The characters that each token of a text has, by which it is known which tokens a stretch of the text supervises."""

import functools
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from whence.corpus.conversations import Rendered
from whence.corpus.templates import Tokenizer

logger = logging.getLogger(__name__)


def with_offsets(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, each with its characters, without a beginning that the tokenizer adds to the text's own."""
    if tokenizer.is_fast:
        out = tokenizer(rendered.text, add_special_tokens=rendered.special, return_offsets_mapping=True)
        ids, offsets = out["input_ids"], out["offset_mapping"]
    else:
        ids, offsets = _with_computed_offsets(rendered, tokenizer)
    begin, id_of_begin = str(tokenizer.bos_token or ""), tokenizer.bos_token_id
    is_doubled = rendered.special and begin and ids[:2] == [id_of_begin] * 2
    if is_doubled and rendered.text.startswith(begin) and not rendered.text.startswith(begin * 2):
        _warn_of_two_beginnings(str(tokenizer.name_or_path), begin)
        return ids[1:], offsets[1:]
    return ids, offsets


def _with_computed_offsets(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """As `with_offsets`, for a tokenizer that does not say which characters a token has.

    A boundary is where the ids of the text up to it stop agreeing with the ids of the whole text.
    """
    ids = tokenizer(rendered.text, add_special_tokens=rendered.special)["input_ids"]
    marks = sorted({0, len(rendered.text), *(edge for span in rendered.spans for edge in span)})
    offsets: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(marks):
        prefix = tokenizer(rendered.text[:end], add_special_tokens=rendered.special)["input_ids"]
        is_last = end == len(rendered.text)
        same = next((k for k, pair in enumerate(zip(prefix, ids, strict=False)) if pair[0] != pair[1]), len(prefix))
        offsets += [(begin, end)] * ((len(ids) if is_last else same) - len(offsets))
    return ids, offsets + [(0, 0)] * (len(ids) - len(offsets))


def tokenised(rendered: Rendered, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a text, and which are supervised; closed where its last turn is."""
    ids, offsets = with_offsets(rendered, tokenizer)
    return closed(ids, in_spans(offsets, rendered.spans), rendered, tokenizer)


def closed(
    ids: list[int], supervised: list[bool], rendered: Rendered, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """With the end of its last turn, where that is supervised; the first token never is."""
    if rendered.closed and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, supervised = [*ids, tokenizer.eos_token_id], [*supervised, True]
        supervised[-1] = True
    if supervised:
        supervised[0] = False
    return ids, supervised


@functools.cache  # once per process and model, not once per row
def _warn_of_two_beginnings(model: str, begin: str) -> None:
    logger.warning(
        "%s: texts begin with %s, which the tokenizer adds too; it is read once. If the model was trained with two, "
        "write it twice.",
        model or "the tokenizer",
        begin,
    )


def in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token, of characters [start, end), holds some of a span [begin, stop)."""
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    out = np.zeros(len(start), dtype=bool)
    for begin, stop in spans:
        # A tokenizer that trims its offsets gives a token of spaces the length 0, at its end. The special tokens that a
        # tokenizer puts first lie at 0.
        empty = (begin < end) & (end <= stop) | (begin == end) & (end == 0)
        out |= np.where(start < end, (start < stop) & (end > begin), empty)
    return out.tolist()
