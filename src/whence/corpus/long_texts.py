"""Of a text that is much longer than what is kept of it, only a part is tokenised: its beginning, or its end.

A tokenizer that splits texts into words reads each by itself, and no expression that splits looks further than some
words ahead or behind. So tokens that lie `MARGIN` words from where a part was cut out are those of the whole text. A
row of 10 MB that keeps 512 tokens costs some milliseconds in place of a minute.
"""

import bisect
import json
import re
from dataclasses import replace

from whence.corpus.conversations import Rendered
from whence.corpus.offsets import closed, in_spans, with_offsets
from whence.corpus.templates import Tokenizer

LONG = 2**17
"""Characters of a text of which a part is tokenised by itself where the rest is cut off."""
MARGIN = 16
"""Words between the end of such a part and the first token that is taken from it."""
NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"))
"""Normalizers that change no character by those far from it."""
SPLIT_TEXTS = ("aa bb", "1 2", "! ?", "é ü", "字 字", "a 1", "? a")
"""Texts that a pre-tokenizer must split, which then splits all texts at spaces at least."""

Part = tuple[list[int], list[bool]]
"""Token ids, and which of them are supervised."""


def kept_part(
    rendered: Rendered, tokenizer: Tokenizer, max_tokens: int, *, keep_left: bool, is_side: bool = False
) -> Part | None:
    """Enough of a long text that a cut to `max_tokens` leaves the same tokens as it does of the whole; else None.

    Args:
        rendered: The text, and what of it is supervised.
        tokenizer: Of the model.
        max_tokens: Tokens that will stay.
        keep_left: The beginning stays, as of a `text`; not the last of the prompt and the answer.
        is_side: It is one of two answers to a prompt, of which each loses as much as the other: the number of tokens
            that a prompt loses must be known.
    """
    if len(rendered.text) <= LONG or not _splits_into_words(tokenizer):
        return None
    beginning = _beginning(rendered, tokenizer, max_tokens, keep_left=keep_left)
    return beginning if beginning or keep_left or is_side else _ending(rendered, tokenizer, max_tokens)


def _beginning(rendered: Rendered, tokenizer: Tokenizer, max_tokens: int, *, keep_left: bool) -> Part | None:
    """The beginning, where that is all that stays: of a text, or of an answer that is too long by itself."""
    size, answer = LONG // 2, _answer(rendered)
    while (size := 2 * size) < len(rendered.text) // 2:
        if not keep_left and size <= answer:
            continue
        part = replace(rendered, text=rendered.text[:size])
        ids, offsets = with_offsets(part, tokenizer)
        words = re.findall(r"\s*\S+", part.text[-LONG // 2 :])
        if len(words) <= MARGIN:
            continue
        safe = size - len("".join(words[-MARGIN:]))
        count = bisect.bisect_right(offsets, safe, key=lambda offset: offset[1])
        ids, supervised = ids[:count], [False, *in_spans(offsets[1:count], rendered.spans)]
        if keep_left and count > max_tokens:
            return ids, supervised
        # Of an answer that is too long by itself no token of the prompt stays but what predicts its first.
        if not keep_left and True in supervised and True in supervised[supervised.index(True) + max_tokens :]:
            return ids, supervised
    return None


def _ending(rendered: Rendered, tokenizer: Tokenizer, max_tokens: int) -> Part | None:
    """The end, where that is all that stays of a long prompt: what stands before an answer, and the answer."""
    size, answer = LONG // 2, _answer(rendered)
    while (size := 2 * size) < answer:
        start = answer - size
        spans = tuple((begin - start, end - start) for begin, end in rendered.spans)
        part = replace(rendered, text=rendered.text[start:], spans=spans)
        words = re.findall(r"\s*\S+", part.text[: LONG // 2])
        if len(words) <= MARGIN:
            continue
        ids, offsets = with_offsets(part, tokenizer)
        safe = len("".join(words[:MARGIN]))
        first = next((place for place, (begin, _) in enumerate(offsets) if begin >= safe), len(ids))
        opening, _ = with_offsets(replace(rendered, text=rendered.text[: LONG // 2]), tokenizer)
        opening = opening[:1] if opening[:1] == [tokenizer.bos_token_id] else []
        supervised = [False] * len(opening) + in_spans(offsets[first:], spans)
        if True in supervised and supervised.index(True) > max_tokens:
            return closed(opening + ids[first:], supervised, part, tokenizer)
    return None


def _answer(rendered: Rendered) -> int:
    """Where the first that is supervised begins, in characters."""
    return rendered.spans[0][0] if rendered.spans else 0


def _splits_into_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer splits texts at spaces at least, and changes no character by those far from it."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None  # type: ignore[attr-defined]
    if backend is None or backend.pre_tokenizer is None:
        return False
    if backend.normalizer is not None:
        normalizer = json.loads(backend.normalizer.__getstate__())
        if not {member["type"] for member in normalizer.get("normalizers", [normalizer])} <= NORMALIZERS:
            return False
    return all(len(backend.pre_tokenizer.pre_tokenize_str(text)) > 1 for text in SPLIT_TEXTS)
