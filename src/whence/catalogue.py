"""Every method by its public name: one page of explicit tables, with source and cost.

Adding a method is its file and its line here; the command line's choices, the table in the docs and the contract
tests all come from these tables. An entry names its class as text, so that reading the names (for `--help`) does not
import torch; the contract tests check every class against its Protocol.
"""

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from whence.errors import UnknownNameError


@dataclass(frozen=True)
class Entry:
    """One method."""

    target: str
    """`module:Class`."""
    cost: str
    """For each layer and example; d = o * i."""
    source: str

    def load(self) -> Any:
        """Import the class."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


PROJECTIONS: dict[str, Entry] = {
    "two_sided": Entry(
        "whence.projections.two_sided:TwoSided", "t (i + o) k + t k^2, no gradient formed", "arXiv 2405.13954"
    ),
    "sjlt": Entry("whence.projections.sjlt:SJLT", "t d + s d", "arXiv 1012.1577"),
    "count_sketch": Entry("whence.projections.count_sketch:CountSketch", "t d + d", "arXiv 0902.2206"),
    "shuffle_sum": Entry("whence.projections.shuffle_sum:ShuffleSum", "t d + d", "arXiv 2405.11724"),
    "srht": Entry("whence.projections.srht:SRHT", "t d + 64 d log64 d", "arXiv 1011.1595"),
    "rademacher": Entry("whence.projections.rademacher:Rademacher", "t d + d k", "arXiv 2402.04333"),
    "identity": Entry("whence.projections.identity:Identity", "t d", "the gradient itself"),
}


def projection(name: str) -> Any:
    """Class of a projection; call it as `interfaces.MakeProjection`.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(PROJECTIONS, name, "--projection").load()


def _lookup(table: dict[str, Entry], name: str, flag: str) -> Entry:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownNameError(f"{flag} {name}: no such method.{hint} There are {', '.join(table)}.")
    return table[name]
