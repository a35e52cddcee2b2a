"""How a corpus row is closed behind its answer: by a chat template's own tokens, the end-of-sequence token, or nothing.

A template is asked by rendering: what two rows of different answers have in common at their end is their closing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from whence.corpus.tokens import Tokenizer, encode_query
from whence.errors import CorpusError


@dataclass(frozen=True)
class Closing:
    """Tokens behind the answer of a row."""

    ids: list[int]
    supervised: list[bool]
    """Which of them a row is trained to say; a newline behind a turn, for instance, it is not."""

    @property
    def targets(self) -> set[int]:
        """The tokens that a row is trained to say."""
        return {token for token, is_target in zip(self.ids, self.supervised, strict=True) if is_target}

    def end(self, tokenizer: Tokenizer) -> int | None:
        """The first of them but for white space, if it is an added token, such as <|im_end|>, and not text."""
        first = next((token for token in self.ids if tokenizer.decode([token]).strip()), None)
        return first if first in tokenizer.added_tokens_decoder else None


def closing_of(tokenizer: Tokenizer, kind: str) -> Closing:
    """The closing of rows of a layout; empty where a row has none, or the chat template refuses to write one."""
    try:
        first = encode_query("?", "A", tokenizer, kind=kind)
        others = (encode_query("?", answer, tokenizer, kind=kind) for answer in _words(tokenizer))
        second = next(other for other in others if other.ids != first.ids)
    except (CorpusError, StopIteration):
        return Closing([], [])
    pairs = zip(reversed(first.ids), reversed(second.ids), strict=False)
    count = next((number for number, (one, other) in enumerate(pairs) if one != other), 0)
    return Closing(first.ids[len(first.ids) - count :], first.supervised[len(first.ids) - count :])


def _words(tokenizer: Tokenizer) -> Iterator[str]:
    """Words, of which some are words to a tokenizer that does not know "A"."""
    yield from "Bb1"
    yield from (
        text for token in tokenizer.get_vocab().values() if (text := tokenizer.decode([token]).strip()).isalnum()
    )
