"""How much may be chosen, in all and of each source.

A budget is a number of rows, a fraction of the rows that can be ranked, or a number of tokens. A token budget stops at
the first row that would exceed it: less than one row's tokens stay unspent, whereas going on to shorter rows would
choose by length. Limits hold for sources: a cap is the most, a floor the least that is chosen of a source. An amount is
a number of rows (an int) or a share of the budget (a float), rounded down to whole rows or tokens; in a selection that
ends short of its budget, a capped source may have a larger share. The source "*" stands for every source that is not
named.

Floors are kept by reserving: a row is taken only if the rest of the budget still holds all that is owed to other
sources, so that rows are taken in their order and a source with a floor goes below it last. An amount that cannot be
filled, because the corpus or the filters leave too few rows, falls back to the other sources.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whence.counts import number_of
from whence.errors import SettingError

Amount = int | float
"""Rows, or a share of the budget."""
EVERY = "*"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is chosen; exactly one of the three is given."""

    fraction: float | None = None
    """Share of the rows that can be ranked, rounded to a whole row, and at least one."""
    count: int | None = None
    """Number of rows; more than there are means all."""
    tokens: int | None = None
    """Number of tokens in prompts and completions."""

    def __post_init__(self):
        named = [name for name in ("fraction", "count", "tokens") if getattr(self, name) is not None]
        if len(named) != 1:
            raise SettingError(
                f"give one of --fraction, --count and --tokens-budget; given: {', '.join(named) or 'none'}"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SettingError(f"--fraction {self.fraction}: a number above 0, at most 1, is expected")
        for flag, value in (("--count", self.count), ("--tokens-budget", self.tokens)):
            if value is not None and value < 1:
                raise SettingError(f"{flag} {value}: a number above 0 is expected")

    def __str__(self):
        if self.fraction is not None:
            return f"--fraction {self.fraction:g}"
        return f"--count {self.count:,}" if self.count is not None else f"--tokens-budget {self.tokens:,}"

    def size(self, rows: int) -> int:
        """The budget in rows, or in tokens, where so many rows can be ranked."""
        if self.fraction is not None:
            return max(1, round(self.fraction * rows))
        return self.tokens if self.count is None else self.count  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps and floors of sources, by name."""

    caps: Mapping[str, Amount] = field(default_factory=dict)
    floors: Mapping[str, Amount] = field(default_factory=dict)

    def __post_init__(self):
        for flag, amounts in (("--cap", self.caps), ("--floor", self.floors)):
            for source, amount in amounts.items():
                if not 0 <= amount <= (1 if isinstance(amount, float) else math.inf):
                    raise SettingError(
                        f"{flag} {source}={amount}: a number of rows, or a share from 0.0 to 1.0, is expected"
                    )


def no_index_for(method: str, source: str) -> SettingError:
    """The refusal of rows without an index, for a method that reads its vectors."""
    return SettingError(
        f"{source}: no index, which --method {method} needs. Make one with: whence index MODEL CORPUS -o INDEX"
    )


class Ledger:
    """How much of a budget is spent, reserved and still free.

    Args:
        budget: In rows or tokens.
        limits: Caps and floors of sources.
        sources: Every row's source.
        tokens: Every row's number of tokens.
        rankable: Numbers of the rows that can be ranked.

    Raises:
        SettingError: A limit is for a source that no row has, is a floor above its cap, or a floor in rows under a
            budget in tokens; or the floors add up to more than the budget.
    """

    def __init__(
        self,
        budget: Budget,
        limits: Limits,
        *,
        sources: Sequence[str | None],
        tokens: Sequence[int],
        rankable: Sequence[int],
    ):
        self.is_in_tokens = budget.tokens is not None
        self.size = budget.size(len(rankable))
        self.spent = 0
        self.notes: list[str] = []
        self._sources, self._tokens, self._limits = sources, tokens, limits
        self._names = sorted({source for source in sources if source is not None})
        self._rows_taken = dict.fromkeys(sources, 0)
        self._spent_by_source = dict.fromkeys(sources, 0)
        self._check(budget)
        self.owed = self._floors(rankable)
        self._closed: set[str | None] = set()
        self._is_closed = False

    def _check(self, budget: Budget) -> None:
        for flag, amounts in (("--cap", self._limits.caps), ("--floor", self._limits.floors)):
            for source in amounts:
                if source != EVERY and source not in self._names:
                    have = ", ".join(self._names) or "none: the corpus has no column `source`"
                    raise SettingError(f"{flag} {source}: no row has this source. There are {have}.")
        for source in self._names:
            floor = _amount_of(self._limits.floors, source)
            if floor is not None and isinstance(floor, int) and self.is_in_tokens:
                raise SettingError(f"--floor {source}={floor} in rows, {budget}: give the floor as a share, like 0.1")
            if floor is not None and not self._is_under_cap(source, self._amount(floor)):
                raise SettingError(f"--floor {source}={floor}: the cap of this source is below it")

    def _is_under_cap(self, source: str, floor: int) -> bool:
        cap = _amount_of(self._limits.caps, source)
        if cap is None or (isinstance(cap, int) and self.is_in_tokens):
            return True
        return floor <= self._amount(cap)

    def _amount(self, amount: Amount) -> int:
        """An amount in the budget's unit; a share loses the error of binary fractions before it is rounded down."""
        return amount if isinstance(amount, int) else math.floor(round(amount * self.size, 6))

    def _floors(self, rankable: Sequence[int]) -> dict[str | None, int]:
        """The amount owed to each source: its floor, or all that the corpus has of it."""
        available = dict.fromkeys(self._sources, 0)
        for row in rankable:
            available[self._sources[row]] += self._cost(row)
        owed: dict[str | None, int] = {}
        for source in self._names:
            floor = _amount_of(self._limits.floors, source)
            if floor is not None:
                owed[source] = self._amount(floor)
        if sum(owed.values()) > self.size:
            raise SettingError(f"the floors add up to {sum(owed.values()):,}, which is above the budget, {self.size:,}")
        for source, amount in owed.items():
            if amount > available[source]:
                unit = "tokens" if self.is_in_tokens else "rows"
                self.notes.append(f"--floor {source}: the pool has {available[source]:,} of {amount:,} {unit}.")
                owed[source] = available[source]
        return owed

    def _cost(self, row: int) -> int:
        return int(self._tokens[row]) if self.is_in_tokens else 1

    @property
    def is_full(self) -> bool:
        """Whether no row can be taken any more."""
        return self._is_closed and all(not owed or source in self._closed for source, owed in self.owed.items())

    def is_capped(self, row: int) -> bool:
        """Whether the row would take its source over its cap."""
        source = self._sources[row]
        cap = _amount_of(self._limits.caps, source)
        if cap is None:
            return False
        if isinstance(cap, int):
            return self._rows_taken[source] + 1 > cap
        return self._spent_by_source[source] + self._cost(row) > self._amount(cap)

    def is_open(self, row: int) -> bool:
        """Whether no row of its kind was refused for want of room before; once one was, the next is not tried."""
        source = self._sources[row]
        return source not in self._closed and (not self._is_closed or self.owed.get(source, 0) > 0)

    def fits(self, row: int) -> bool:
        """Whether there is room for a row. Once there is none, its kind is closed."""
        source, cost = self._sources[row], self._cost(row)
        owed = self.owed.get(source, 0)
        reserved = sum(self.owed.values()) - min(owed, cost)
        if self.spent + cost + reserved <= self.size:
            return True
        if owed:
            self._closed.add(source)
        else:
            self._is_closed = True
        return False

    def take(self, row: int) -> None:
        """Spend a row's cost."""
        source, cost = self._sources[row], self._cost(row)
        self.spent += cost
        self._rows_taken[source] += 1
        self._spent_by_source[source] += cost
        if source in self.owed:
            self.owed[source] = max(0, self.owed[source] - cost)
        self._is_closed |= self.spent == self.size

    def release(self) -> bool:
        """Give up what is still reserved, and return whether anything was."""
        unfilled = {source: owed for source, owed in self.owed.items() if owed}
        if not unfilled:
            return False
        unit = "tokens" if self.is_in_tokens else "rows"
        self.notes += [
            f"--floor {source}: {number_of(owed, unit.removesuffix('s'))} of it could not be filled."
            for source, owed in unfilled.items()
        ]
        self.owed = {}
        self._closed = set()
        self._is_closed = self.spent == self.size
        return True


def _amount_of(amounts: Mapping[str, Amount], source: str | None) -> Amount | None:
    amount = None if source is None else amounts.get(source)
    return amounts.get(EVERY) if amount is None else amount
