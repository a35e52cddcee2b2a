"""A shadow: the base fine-tuned on rows that we chose, as the model in question seems to have been.

What membership looks like depends on how a model was trained. So the base is trained again on a random part of the
corpus, as many rows as are thought to have been used, by a recipe that is given or guessed from the weight difference:

    rate        the one for which |theta_0 - theta_f| is the same: the norm is about proportional to it
    optimizer   the one whose first shadow, at a usual rate, has the most similar difference: how its norm is spread
                over layers, and how evenly within each (mean |x| over root mean square: Adam moves all entries alike,
                plain SGD a few); neither depends much on the rate, which is found for that optimizer alone
    epochs      given; a wrong number changes little, for the rate makes up for it

Source: shadow models, Shokri et al. 2017, https://arxiv.org/abs/1610.05820; the guesses are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.corpus.layouts import Row
from whence.errors import ModelError
from whence.models.difference import weight_difference
from whence.models.rounding import round_stored
from whence.models.runs import open_run
from whence.training.trainer import OPTIMIZERS, train

FIRST_RATES = {"adamw": 3e-4, "sgd": 0.1}
"""Rates of a first try; for adapters ten times as much."""
TRIES = 4
FASTER = 30.0
"""Times the rate before, at most, that a further try is."""
CLOSE = 0.1
"""Of the norm, by which a shadow's may be wrong."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model in question was trained, as far as is known."""

    rows: int
    """Of them it was trained on."""
    epochs: float = 2.0
    batch_size: int = 16
    optimizer: str | None = None
    """Name in `train.OPTIMIZERS`; None: to be guessed."""
    lr: float | None = None
    """Peak rate; None: to be guessed."""
    max_tokens: int | None = None
    tokenizer: str | None = None
    """That the model in question came with, where it is not the base's."""
    lora: Mapping[str, Any] | None = None
    """Settings `lora_*` of `train`, of an adapter."""
    checkpoints: int = 1
    """Kept on the way, the last among them."""
    stored: torch.dtype = torch.float32
    """Of the model in question, to which a shadow's weights are rounded: rounding is part of what is seen of them."""

    @property
    def suffix(self) -> str:
        """Of a run's directory, which is rounded in place."""
        return "" if self.stored is torch.float32 else f"-{str(self.stored).removeprefix('torch.')}"


@dataclass(frozen=True)
class Shadow:
    """A shadow that was trained."""

    path: str
    """Its run."""
    recipe: Recipe
    """With what was guessed."""
    norm: float
    """|theta_0 - theta_f| over the norm that was to be met."""
    distance: float
    """Of its signature from the one to be met; see `signature`."""


Signature = Mapping[str, tuple[float, float]]
"""Of each matrix that moved, its norm and its evenness."""


def signature(difference: Mapping[str, Tensor]) -> Signature:
    """How a weight difference is spread: of each matrix that moved its norm, and mean |x| over root mean square.

    >>> signature({"a": torch.ones(2, 2), "b": torch.zeros(3)})
    {'a': (2.0, 1.0)}
    """
    found = {}
    for name in sorted(difference):
        part = difference[name].double()
        if part.dim() == 2 and part.any():
            found[name] = (float(part.norm()), float(part.abs().mean() / part.square().mean().sqrt()))
    return found


def distance(one: Signature, other: Signature) -> float:
    """Between ln of each matrix' share of the norm, and between evenness, over the matrices that moved in both.

    >>> a, b = {"a": (3.0, 1.0), "b": (4.0, 0.5)}, {"a": (0.3, 1.0), "b": (0.4, 0.5), "frozen there": (1.0, 1.0)}
    >>> round(distance(a, b), 6), distance(a, {})
    (0.0, inf)
    """
    names = sorted(one.keys() & other.keys())
    if not names:
        return math.inf
    vectors = []
    for own in (one, other):
        total = math.hypot(*(own[name][0] for name in names))
        vectors.append(torch.tensor([(math.log(own[name][0] / total), own[name][1]) for name in names]).double())
    return float((vectors[0] - vectors[1]).norm())


def trained_shadow(
    base: str, rows: Sequence[Row], difference: Mapping[str, Tensor], recipe: Recipe, work: Path, *, seed: int = 0
) -> Shadow:
    """Train a shadow, or several where the optimizer or the rate has to be found out; or go on doing so.

    Args:
        base: theta_0, a directory.
        rows: What the shadow is trained on.
        difference: theta_0 - theta_f of the model in question.
        recipe: As far as known.
        work: Directory of the runs.
        seed: Of the trainings.
    """
    wanted = signature(difference)
    norm = math.sqrt(sum(float(difference[name].double().square().sum()) for name in difference))
    names = [recipe.optimizer] if recipe.optimizer is not None else list(OPTIMIZERS)
    first = [_tried(base, rows, norm, wanted, replace(recipe, optimizer=name), work, seed) for name in names]
    likely = min(first, key=lambda shadow: shadow.distance)
    return _at_norm(base, rows, norm, wanted, likely, work, seed, tries=1 if recipe.lr else TRIES)


def _at_norm(
    base: str, rows: Sequence[Row], norm: float, wanted: Signature, best: Shadow, work: Path, seed: int, *, tries: int
) -> Shadow:
    """From a first try on, at rates that move the weights as far; the best that was found.

    ln norm over ln rate is taken for a line: of slope 1 at first, through the last two tries from then on. It is
    steeper where weights of few bits lose small moves.
    """
    before, last = None, best
    for _ in range(tries - 1):
        if abs(_too_far(last)) < CLOSE:
            break
        slope = 1.0 if before is None else _slope(before, last)
        rate = (last.recipe.lr or 0.0) * min(FASTER, max(1 / FASTER, math.exp(-_too_far(last) / slope)))
        recipe = replace(last.recipe, lr=float(f"{rate:.3g}"))
        before, last = last, _tried(base, rows, norm, wanted, recipe, work, seed)
        best = min(best, last, key=lambda shadow: abs(_too_far(shadow)))
    return best


def _too_far(shadow: Shadow) -> float:
    """Ln of the norm over that to be met, within a factor of 100: of a training that diverged, and where rounding took
    every move.
    """
    return math.log(100.0 if math.isnan(shadow.norm) else min(100.0, max(0.01, shadow.norm)))


def _slope(one: Shadow, other: Shadow) -> float:
    """Of ln norm over ln rate, within what trainings show."""
    wide = math.log((one.recipe.lr or 0.0) / (other.recipe.lr or 0.0))
    return min(4.0, max(0.5, (_too_far(one) - _too_far(other)) / wide)) if wide else 1.0


def _tried(
    base: str, rows: Sequence[Row], norm: float, wanted: Signature, recipe: Recipe, work: Path, seed: int
) -> Shadow:
    """One training, at the recipe's rate or a usual one."""
    rate = recipe.lr or FIRST_RATES[str(recipe.optimizer)] * (10 if recipe.lora else 1)
    chosen = replace(recipe, lr=rate)
    path = _trained(base, rows, chosen, work, seed)
    try:
        moved = weight_difference(base, path)
    except ModelError:  # so low a rate that rounding took every move
        return Shadow(str(path), chosen, 0.0, math.inf)
    return Shadow(str(path), chosen, moved.norm() / norm, distance(signature(moved), wanted))


def _trained(base: str, rows: Sequence[Row], recipe: Recipe, work: Path, seed: int) -> Path:
    kept = f"-{recipe.checkpoints}-checkpoints" if recipe.checkpoints > 1 else ""
    return train_by(base, rows, recipe, work / f"{recipe.optimizer}-{recipe.lr:g}{kept}{recipe.suffix}", seed)


def train_by(base: str, rows: Sequence[Row], recipe: Recipe, out: Path, seed: int) -> Path:
    """Train the base on rows by a recipe that has an optimizer and a rate, into a directory; or go on doing so.

    The checkpoints are rounded to the recipe's type when all are there.
    """
    settings = {
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "optimizer": recipe.optimizer,
        "lr": recipe.lr,
        "max_tokens": recipe.max_tokens,
        "tokenizer": recipe.tokenizer,
        **(recipe.lora or {}),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    run = train(base, rows, out, checkpoints=recipe.checkpoints, seed=seed, progress=False, **settings)
    if recipe.stored.itemsize < torch.float32.itemsize:
        for checkpoint in open_run(run, which="all").checkpoints:
            round_stored(str(checkpoint.path), recipe.stored)
    return run
