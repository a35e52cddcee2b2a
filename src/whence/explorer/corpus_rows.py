"""The rows of an index in memory: what a page shows of them, filters, words, duplicates.

Texts are Arrow columns: a row's JSON as the index has it, and its shown text in lower case for search. Together they
take about twice what the corpus takes on disk, uncompressed.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow
import torch
from jaxtyping import Bool, Int64
from pyarrow.compute import MatchSubstringOptions, call_function
from torch import Tensor

from whence.corpus.layouts import columns_read, layout, shown_text
from whence.corpus.shapes import Row
from whence.corpus.tokens import with_text
from whence.errors import SettingError
from whence.indexing.opening import Index
from whence.reports.text import encodable
from whence.runner import counted

MOST_VALUES = 50
"""Values of a column that a page offers as a filter; a column of more is none."""
MOST_SOURCES = 200
MOST_WORDS = 20
"""Words that rows are searched for at once."""
LONGEST_VALUE = 100
"""Characters of such a value."""


@dataclass(frozen=True)
class Filters:
    """Which rows may be ranked."""

    sources: Sequence[str | None] | None = None
    """None: all."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values that a column may have, by its name."""
    text: str = ""
    """Words that must all occur, whatever their case."""

    @property
    def is_empty(self) -> bool:
        """Whether every row passes."""
        return self.sources is None and not self.columns and not self.text.split()


class CorpusRows:
    """The rows of an index, in its order."""

    def __init__(self, index: Index):
        self._tokenizer = index.model().tokenizer
        ids: list[str] = []
        self.sources: list[str | None] = []
        rows: list[str] = []
        texts: list[str] = []
        values: list[dict[str, Any]] = []
        preferences = index.settings.preferences
        count = len(index.store.manifest.parts)
        parts = counted(range(count), "Reading rows", count, lambda part: 1, "files")
        for part in parts:
            for stored in index.store.read_part(part):
                shown = self._readable(stored["row"])
                read = columns_read(shown, preferences=preferences) | {"id", "source"}
                ids.append(stored["id"])
                self.sources.append(stored["source"])
                rows.append(stored["row"])
                texts.append(encodable("\n".join(map(str, shown_text(shown).values()))))
                values.append({name: value for name, value in shown.items() if name not in read and _is_value(value)})
        self.ids = ids
        self._rows = pyarrow.array(rows, pyarrow.large_string())
        self._texts = pyarrow.array(texts, pyarrow.large_string())
        self.columns = _columns(values)

    def __len__(self) -> int:
        return len(self.ids)

    def stored(self, number: int) -> dict[str, Any]:
        """A row as the index stores it."""
        return {"id": self.ids[number], "source": self.sources[number], "row": self._rows[number].as_py()}

    def row(self, number: int) -> Row:
        """A row of the corpus, as it was given."""
        return json.loads(self._rows[number].as_py())

    def shown(self, number: int) -> Row:
        """A row as a person reads it."""
        return self._readable(self._rows[number].as_py())

    def _readable(self, stored: str) -> Row:
        """A row of token ids has their text beside them."""
        row = json.loads(stored)
        return with_text(row, self._tokenizer) if layout(row) == "tokens" else row

    def text(self, number: int) -> str:
        """All that is shown of a row's text."""
        return self._texts[number].as_py()

    def values(self, number: int) -> dict[str, Any]:
        """A row's values in the columns that filters know."""
        return {name: column[number] for name, column in self.columns.items() if column[number] is not None}

    @cached_property
    def groups(self) -> Int64[Tensor, " n"]:
        """Number of each row's text: rows of the same text have the same."""
        encoded = self._texts.dictionary_encode()
        return torch.from_numpy(encoded.indices.to_numpy(zero_copy_only=False).copy()).long()

    @cached_property
    def _folded(self) -> Any:
        return call_function("utf8_lower", [self._texts])

    def source_counts(self) -> list[tuple[str | None, int]]:
        """Sources with their numbers of rows, most rows first."""
        return Counter(self.sources).most_common(MOST_SOURCES)

    def column_counts(self) -> dict[str, list[tuple[Any, int]]]:
        """Values of each column, most rows first; rows without one are not counted."""
        return {
            name: Counter(value for value in column if value is not None).most_common()
            for name, column in self.columns.items()
        }

    def passing(self, filters: Filters) -> Bool[Tensor, " n"]:
        """Which rows pass.

        Raises:
            SettingError: A column is none that filters know.
        """
        out = torch.ones(len(self), dtype=torch.bool)
        if filters.sources is not None:
            allowed = {*filters.sources}
            out &= torch.tensor([source in allowed for source in self.sources], dtype=torch.bool)
        for name, allowed in filters.columns.items():
            if name not in self.columns:
                known = ", ".join(self.columns) or "none"
                raise SettingError(f"no column {name!r:.60} to choose rows by; there are {known}")
            out &= torch.tensor([_is_among(value, allowed) for value in self.columns[name]], dtype=torch.bool)
        words = call_function("utf8_lower", [pyarrow.array([encodable(filters.text)])])[0].as_py().split()
        if len(words) > MOST_WORDS:
            raise SettingError(f"{len(words)} words to look for; {MOST_WORDS} at most are expected")
        for word in dict.fromkeys(words):
            if not out.any():
                break
            found = call_function("match_substring", [self._folded], MatchSubstringOptions(word))
            out &= torch.from_numpy(found.to_numpy(zero_copy_only=False).copy())
        return out


def _is_value(value: Any) -> bool:
    return isinstance(value, bool | int) or (isinstance(value, str) and 0 < len(value) <= LONGEST_VALUE)


def _is_among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a value is one of some, where True is not 1."""
    return any(type(value) is type(other) and value == other for other in allowed)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns of a few values each, more than one of them."""
    values: dict[str, set[Any]] = {}
    for row in rows:
        for name, value in row.items():
            known = values.setdefault(name, set())
            if len(known) <= MOST_VALUES:
                known.add((type(value), value))
    names = sorted(name for name, known in values.items() if 1 < len(known) <= MOST_VALUES)
    return {name: [row.get(name) for row in rows] for name in names}
