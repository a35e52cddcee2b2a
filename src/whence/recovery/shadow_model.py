"""A shadow model: the base fine-tuned on rows that we chose, as the model in question seems to have been.

The evidence of membership depends on how a model was trained. So the base is trained again on a random sample of the
corpus, as many rows as the model is thought to have had, by a recipe that is given or guessed from the difference:

    rate        the one for which |theta_0 - theta_f| is the same: the norm is about proportional to it
    optimizer   the one whose first shadow, at a usual rate, has the most similar difference: how its norm is spread
                over layers, and how evenly within each (mean |x| over root mean square: Adam moves all entries alike,
                plain SGD a few); neither depends much on the rate, which is found for that optimizer alone
    epochs, batch   where they are not given, those of a few whose shadow has the most similar difference: few steps
                leave it more even than many, and large batches than small ones. What is between those tried, members
                show by standing off otherwise than the shadow's, which `recalibration` makes up for

Source: shadow models, Shokri et al. 2017, https://arxiv.org/abs/1610.05820; the guesses are ours.
"""

import itertools
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
"""Peak rates of an optimizer's first training; an adapter's is ten times as high."""
EPOCHS, BATCH_SIZES = (2.0, 1.0, 5.0), (16, 4)
"""Epochs and batches that are tried where they are not given, all pairs, at one rate each; the first ones first."""
NORM_BY_STEPS = 0.75
"""Slope of ln norm over ln steps at one rate, about: .72 from 5 to 100 steps of AdamW."""
MOST_TRAININGS = 4
"""Trainings of the chosen optimizer, at most."""
LARGEST_RATE_CHANGE = 30.0
"""Factor by which a training's rate differs from the one before, at most."""
NORM_TOLERANCE = 0.1
"""Relative error of a shadow's |theta_0 - theta_f| that ends the search, in units of ln."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model in question was trained, as far as is known."""

    rows: int
    """Rows that it was trained on."""
    epochs: float = 2.0
    batch_size: int = 16
    optimizer: str | None = None
    """Name in `trainer.OPTIMIZERS`; None: to be guessed."""
    lr: float | None = None
    """Peak rate; None: to be guessed."""
    max_tokens: int | None = None
    tokenizer: str | None = None
    """Directory of the model's own tokenizer; None: the base's."""
    lora: Mapping[str, Any] | None = None
    """Settings `lora_*` of `train`, for an adapter."""
    checkpoints: int = 1
    """Checkpoints to keep, the last included."""
    stored: torch.dtype = torch.float32
    """Type that the model in question is stored in; a shadow's weights are rounded to it, since rounding shows too."""

    @property
    def steps(self) -> float:
        """Steps of the optimizer."""
        return self.epochs * math.ceil(self.rows / self.batch_size)

    def training(self) -> dict[str, Any]:
        """Settings of `train`."""
        names = ("epochs", "batch_size", "optimizer", "lr", "max_tokens", "tokenizer", "checkpoints")
        return {name: getattr(self, name) for name in names} | dict(self.lora or {})

    @property
    def suffix(self) -> str:
        """End of a run's name: a run is rounded in place, so that each type has a directory of its own."""
        return "" if self.stored is torch.float32 else f"-{str(self.stored).removeprefix('torch.')}"


@dataclass(frozen=True)
class Shadow:
    """A shadow that was trained, and how near it came to the model in question."""

    path: str
    """Directory of its run."""
    recipe: Recipe
    """The recipe, with guesses filled in."""
    norm: float
    """|theta_0 - theta_f| of the shadow over that of the model in question."""
    distance: float
    """Distance of the two signatures; see `signature`."""


Signature = Mapping[str, tuple[float, float]]
"""Norm and evenness of each matrix that moved."""


def signature(difference: Mapping[str, Tensor]) -> Signature:
    """How a weight difference is spread: norm of each matrix that moved, and its mean |x| over its root mean square.

    >>> signature({"a": torch.ones(2, 2), "b": torch.zeros(3)})
    {'a': (2.0, 1.0)}
    """
    spread = {}
    for name in sorted(difference):
        matrix = difference[name].double()
        if matrix.dim() == 2 and matrix.any():
            spread[name] = (float(matrix.norm()), float(matrix.abs().mean() / matrix.square().mean().sqrt()))
    return spread


def distance(first: Signature, second: Signature) -> float:
    """Distance in ln of each matrix' share of the norm, and in evenness, over the matrices that moved in both.

    >>> a, b = {"a": (3.0, 1.0), "b": (4.0, 0.5)}, {"a": (0.3, 1.0), "b": (0.4, 0.5), "frozen there": (1.0, 1.0)}
    >>> round(distance(a, b), 6), distance(a, {})
    (0.0, inf)
    """
    names = sorted(first.keys() & second.keys())
    if not names:
        return math.inf
    vectors = []
    for spread in (first, second):
        total = math.hypot(*(spread[name][0] for name in names))
        vectors.append(torch.tensor([(math.log(spread[name][0] / total), spread[name][1]) for name in names]).double())
    return float((vectors[0] - vectors[1]).norm())


def trained_shadow(
    base: str,
    rows: Sequence[Row],
    difference: Mapping[str, Tensor],
    recipe: Recipe,
    work: Path,
    *,
    epochs: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
    seed: int = 0,
) -> Shadow:
    """Train a shadow, or several where the recipe has to be guessed; or go on doing so.

    Args:
        base: theta_0, a directory.
        rows: Rows to train the shadow on.
        difference: theta_0 - theta_f of the model in question.
        recipe: The recipe, as far as known.
        work: Directory of the runs.
        epochs: Epochs to try beside the recipe's.
        batch_sizes: Batches to try beside the recipe's.
        seed: Seed of the trainings.
    """
    goal = signature(difference)
    norm = math.sqrt(sum(float(difference[name].double().square().sum()) for name in difference))
    names = [recipe.optimizer] if recipe.optimizer is not None else list(OPTIMIZERS)
    first = [_trained(base, rows, norm, goal, replace(recipe, optimizer=name), work, seed) for name in names]
    likely = min(first, key=lambda shadow: shadow.distance)
    pairs = {*itertools.product([recipe.epochs, *epochs], [recipe.batch_size, *batch_sizes])}
    others = sorted(pairs - {(recipe.epochs, recipe.batch_size)})
    for tried in [_otherwise(likely, *pair, keeps_rate=recipe.lr is not None) for pair in others]:
        likely = min(likely, _trained(base, rows, norm, goal, tried, work, seed), key=lambda shadow: shadow.distance)
    return _at_norm(base, rows, norm, goal, likely, work, seed, trainings=1 if recipe.lr else MOST_TRAININGS)


def _otherwise(shadow: Shadow, epochs: float, batch_size: int, *, keeps_rate: bool) -> Recipe:
    """A shadow's recipe with other epochs and another batch, at a rate that moves the weights about as far as T."""
    recipe = replace(shadow.recipe, epochs=epochs, batch_size=batch_size)
    if keeps_rate:
        return recipe
    more_steps = recipe.steps / shadow.recipe.steps
    rate = (shadow.recipe.lr or 0.0) * math.exp(-_log_norm(shadow)) * more_steps**-NORM_BY_STEPS
    return replace(recipe, lr=float(f"{rate:.3g}"))


def _at_norm(
    base: str, rows: Sequence[Row], norm: float, goal: Signature, best: Shadow, work: Path, seed: int, *, trainings: int
) -> Shadow:
    """The shadow that moves the weights most nearly as far, of trainings at other rates from a first one on.

    ln norm is taken as linear in ln rate: with slope 1 at first, from then on through the last two trainings. The slope
    is steeper where weights of few bits lose small moves.
    """
    before, last = None, best
    for _ in range(trainings - 1):
        if abs(_log_norm(last)) < NORM_TOLERANCE:
            break
        slope = 1.0 if before is None else _slope(before, last)
        change = min(LARGEST_RATE_CHANGE, max(1 / LARGEST_RATE_CHANGE, math.exp(-_log_norm(last) / slope)))
        rate = (last.recipe.lr or 0.0) * change
        recipe = replace(last.recipe, lr=float(f"{rate:.3g}"))
        before, last = last, _trained(base, rows, norm, goal, recipe, work, seed)
        best = min(best, last, key=lambda shadow: abs(_log_norm(shadow)))
    return best


def _log_norm(shadow: Shadow) -> float:
    """Ln of `norm`, clipped to a factor of 100: a training may diverge, or rounding may take all moves."""
    return math.log(100.0 if math.isnan(shadow.norm) else min(100.0, max(0.01, shadow.norm)))


def _slope(first: Shadow, second: Shadow) -> float:
    """Slope of ln norm over ln rate, clipped to what trainings show."""
    gap = math.log((first.recipe.lr or 0.0) / (second.recipe.lr or 0.0))
    return min(4.0, max(0.5, (_log_norm(first) - _log_norm(second)) / gap)) if gap else 1.0


def _trained(
    base: str, rows: Sequence[Row], norm: float, goal: Signature, recipe: Recipe, work: Path, seed: int
) -> Shadow:
    """A shadow at the recipe's rate, or at the optimizer's first one."""
    rate = recipe.lr or FIRST_RATES[str(recipe.optimizer)] * (10 if recipe.lora else 1)
    chosen = replace(recipe, lr=rate)
    path = _run_of(base, rows, chosen, work, seed)
    try:
        moved = weight_difference(base, path)
    except ModelError:  # so low a rate that rounding took every move
        return Shadow(str(path), chosen, 0.0, math.inf)
    return Shadow(str(path), chosen, moved.norm() / norm, distance(signature(moved), goal))


def _run_of(base: str, rows: Sequence[Row], recipe: Recipe, work: Path, seed: int) -> Path:
    checkpoints = f"-{recipe.checkpoints}-checkpoints" if recipe.checkpoints > 1 else ""
    name = f"{recipe.optimizer}-{recipe.lr:g}-{recipe.epochs:g}-epochs-of-{recipe.batch_size}"
    return train_by(base, rows, recipe, work / f"{name}{checkpoints}{recipe.suffix}", seed)


def train_by(base: str, rows: Sequence[Row], recipe: Recipe, out: Path, seed: int) -> Path:
    """Train the base on rows by a recipe that has an optimizer and a rate, into a directory; or go on doing so.

    The checkpoints are rounded to the recipe's type when all are there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    run = train(base, rows, out, seed=seed, progress=False, **recipe.training())
    if recipe.stored.itemsize < torch.float32.itemsize:
        for checkpoint in open_run(run, which="all").checkpoints:
            round_stored(str(checkpoint.path), recipe.stored)
    return run
