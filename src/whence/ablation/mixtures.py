"""Mixtures of a pool: weights by partition, by hand or by name.

From shares pi of partitions that are split into units, w_u = pi(partition of u) * tokens_u / tokens of the partition:
with pi by size every token weighs alike (the paper's micro), with equal pi every partition does (macro). In a pool of
units a partition's name stands for all of its units.

Source: Na et al. 2024, https://arxiv.org/abs/2410.15661 (uniform means). Weights other than uniform are an extension of
ours, measured in docs/results/ablation.md.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from whence.ablation.pool import Pool
from whence.errors import SettingError

SUM_TOLERANCE = 1e-3
"""Deviation of a sum of weights from 1 that is accepted: that of rounding to three digits."""

Mixture = Mapping[str, float]
"""Weights by partition."""


def checked_mixture(mixture: Mixture, partitions: Iterable[str], *, name: str = "mixture") -> dict[str, float]:
    """A mixture's positive weights, made to sum to 1.

    Raises:
        SettingError: A partition is unknown, a weight is negative or infinite, or the sum is not 1.

    >>> checked_mixture({"a": 0.25, "b": 0.75, "c": 0.0}, ["a", "b", "c"])
    {'a': 0.25, 'b': 0.75}
    >>> checked_mixture({"a": 0.5, "b": 0.5}, ["a/0", "a/1", "b"])
    {'a/0': 0.25, 'a/1': 0.25, 'b': 0.5}
    """
    known, by_unit = list(partitions), dict[str, float]()
    for partition, weight in mixture.items():
        units = [partition] if partition in known else units_of(partition, known)
        for unit in units:
            by_unit[unit] = by_unit.get(unit, 0.0) + weight / len(units)
        if not units:
            raise SettingError(f"{name}: no partition {partition!r}; the pool has {', '.join(known)}")
        if not 0 <= weight < math.inf:
            raise SettingError(f"{name}: the weight of {partition} is {weight}; 0 or more is expected")
    total = math.fsum(by_unit.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise SettingError(f"{name}: its weights sum to {total:.6g}; a sum of 1 is expected")
    return {partition: by_unit[partition] / total for partition in known if by_unit.get(partition)}


def units_of(partition: str, members: Iterable[str]) -> list[str]:
    """Members that are units of a partition: they bear its name with a number."""
    return [name for name in members if re.fullmatch(re.escape(partition) + r"/\d+", name)]


def named_mixture(pool: Pool, name: str) -> dict[str, float]:
    """The mixture of the whole corpus, by tokens ("micro"), or of all partitions alike ("macro").

    Raises:
        SettingError: The name is another, or the pool does not know how large its partitions are.
    """
    if name not in ("micro", "macro"):
        raise SettingError(f"--mixture {name}: NAME=WEIGHT,... is expected, or micro (by size), or macro (all alike)")
    sizes: dict[str, int] = {}
    for member in pool.members.values():
        if member.size is None:
            raise SettingError(f"{pool.place.root} does not know how large {member.partition} is: give weights")
        sizes[member.partition] = member.size
    partitions = {unit: re.sub(r"/\d+$", "", unit) if pool.recipe.get("unit_tokens") else unit for unit in sizes}
    totals = Counter[str]()
    for unit, partition in partitions.items():
        totals[partition] += sizes[unit]
    if name == "micro":
        return {unit: size / totals.total() for unit, size in sizes.items()}
    return {unit: size / totals[partitions[unit]] / len(totals) for unit, size in sizes.items()}
