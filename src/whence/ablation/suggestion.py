"""The best mixture of a pool for an evaluation loss, by gradient descent through the merged models.

With theta(w) = theta_0 + sum over u of w_u (theta_u - theta_0) and L the mean over evaluation sets of their losses,

    dL / dw_u = <grad L(theta(w)), theta_u - theta_0>

a step takes one backward pass for all partitions, and moves by the exponentiated gradient on the simplex:

    w_u <- w_u exp(-rate * dL/dw_u / largest |dL/dw|) / sum,     then held under the caps

All steps read one seeded sample of every set's windows, so that the rate and not the rows makes a loss rise; the losses
that are reported at the end are of all rows. The descent minimises the loss of merged models, which ranks mixtures and
is not the loss of a model trained on them: confirm the mixture by a real training (`whence ablate --truth`).

Sources: exponentiated gradient, Kivinen and Warmuth 1997, https://doi.org/10.1006/inco.1996.2612; through merged
models, ours.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence import runner
from whence.ablation.heldout_losses import EvalSet, Losses, measure, read_sets
from whence.ablation.member_training import recipe_of
from whence.ablation.mixed_model import MixedModel, mixed_model, placed_sources
from whence.ablation.pool import Pool, open_pool
from whence.corpus.partitions import pieces_of
from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.errors import CorpusError, SettingError
from whence.mixing.simplex import cap_vector, capped
from whence.models.loading import LoadedModel

SMALLEST = 1e-4
"""Weight below which a partition is left out of the suggestion."""


@dataclass(frozen=True)
class Suggestion:
    """A mixture, and the losses of merged models at it and at simple alternatives."""

    mixture: dict[str, float]
    losses: dict[str, float]
    """Loss of the merged model at the mixture by evaluation set, over all rows, in nats a token."""
    uniform: dict[str, float]
    """Losses of the uniform mixture."""
    best_alone: dict[str, float]
    """Losses of the single partition with the smallest mean loss."""
    alone: str
    """Name of that partition."""
    parent: dict[str, float]
    """Losses of the parent."""
    gain: tuple[float, float, float]
    """Loss of the uniform mixture less that of the suggestion, in nats a token, over the sets by their weights; and the
    ends of its 95% interval over the sets' rows. The descent read some of these rows: fresh ones would show less."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Mixture, and loss of the sampled rows, at each step."""

    def __repr__(self) -> str:
        """The mixture, what it gains, and how to go on."""
        shares = ", ".join(f"{name} {weight:.1%}" for name, weight in self.mixture.items())
        gain = "{:+.3f} nats a token against all alike ({:+.3f} to {:+.3f})".format(*self.gain)
        return f"Suggestion({shares})\n  {gain}\n  More: .mixture, .losses, .uniform, .best_alone, .parent, .steps"

    def rows(self) -> list[dict[str, Any]]:
        """One row a partition."""
        return [{"partition": name, "weight": weight} for name, weight in self.mixture.items()]


def suggest(
    pool: str | Path | Pool,
    evaluated: str | Path | Sequence[str | Path] | Sequence[EvalSet],
    *,
    steps: int = 20,
    rate: float = 0.5,
    rows: int = 64,
    caps: Mapping[str, float] | None = None,
    targets: Mapping[str, float] | None = None,
    max_tokens: int | None = None,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    progress: runner.ProgressOption = True,
) -> Suggestion:
    """Find the mixture with the smallest loss, by descent from the uniform mixture.

    Args:
        pool: A pool of `train_pool`.
        evaluated: Files or directories of held-out rows; each file is one set.
        steps: Steps of the descent; where the loss rises, the rate is halved.
        rate: Largest change of a weight's logarithm in the first step.
        rows: Windows of every set that the descent reads; longer texts are cut into windows of `max_tokens`.
        caps: Largest share of a partition, by its name.
        targets: Weights of the sets; None: all alike.
        max_tokens: Longest window; None: as members were trained.
        tokens_per_batch: Tokens of a pass.
        seed: Seed of the sampled rows.
        progress: Show bars on stderr; or a function to call with (done, total, what is being done).

    Raises:
        SettingError: A number is out of range, caps leave less than a whole mixture, or a name is unknown.
        CorpusError: An evaluation set has no text.
    """
    if steps < 1 or rows < 1 or not 0 < rate < math.inf:
        raise SettingError(f"--steps {steps}, --rows {rows}, --rate {rate}: numbers above 0 are expected")
    opened = pool if isinstance(pool, Pool) else open_pool(pool)
    entries = [evaluated] if isinstance(evaluated, str | Path) else list(evaluated)
    sets = [entry for entry in entries if isinstance(entry, EvalSet)] or read_sets(str(entry) for entry in entries)
    names, upper = opened.partitions, cap_vector(tuple(opened.partitions), dict(caps or {}))
    set_weights = _set_weights(sets, targets)
    longest = max_tokens or recipe_of(opened).max_tokens
    mixed = mixed_model(opened)
    windows = [_windows(mixed.model, evaluated_set, longest, rows, seed) for evaluated_set in sets]
    weights = capped(np.full((1, len(names)), 1 / len(names)), upper)[0]
    trail: list[dict[str, Any]] = []
    with runner.progress("Descending", steps, unit="steps", shown=progress) as tick:
        for _ in range(steps):
            loss, slopes = _slopes(mixed, _named(names, weights), windows, set_weights, tokens_per_batch)
            if trail and loss > trail[-1]["loss"]:
                rate /= 2
            trail.append({"loss": loss, "mixture": _named(names, weights)})
            steps_down = -rate * slopes / max(np.abs(slopes).max(), 1e-30)
            weights = weights * np.exp(steps_down - steps_down.max())  # their ratios are all that counts
            weights = capped((weights / weights.sum())[None], upper)[0]
            tick(1, 0)
    large = np.where(weights < SMALLEST, 0.0, weights)
    if upper[large > 0].sum() >= 1:
        weights = capped((large / large.sum())[None], np.where(large > 0, upper, 0.0))[0]
    mixture = _named(names, weights)

    def measured(mixture: Mapping[str, float] | None) -> dict[str, Losses]:
        model = mixed.become(mixture)
        return {evaluated_set.name: measure(model, evaluated_set, max_tokens=longest, tokens_per_batch=tokens_per_batch)
                for evaluated_set in sets}  # fmt: skip

    def losses(mixture: Mapping[str, float] | None) -> dict[str, float]:
        return {name: of_set.loss for name, of_set in measured(mixture).items()}

    def overall(by_set: Mapping[str, float]) -> float:
        return sum(weight * by_set[evaluated_set.name] for weight, evaluated_set in zip(set_weights, sets, strict=True))

    single = {name: losses({name: 1.0}) for name in names}
    alone = min(single, key=lambda name: overall(single[name]))
    rows_at, rows_uniform = measured(mixture), measured(dict.fromkeys(names, 1 / len(names)))
    at, uniform = ({name: of_set.loss for name, of_set in found.items()} for found in (rows_at, rows_uniform))
    gain = gain_of(list(rows_uniform.values()), list(rows_at.values()), set_weights)
    return Suggestion(mixture, at, uniform, single[alone], alone, losses(None), gain, trail)


def gain_of(before: Sequence[Losses], after: Sequence[Losses], weights: Sequence[float]) -> tuple[float, float, float]:
    """Loss before less loss after, the weighted sum over sets, and its 95% interval.

    A row counts as one draw, the same before and after; sets are independent. Of a set of one row nothing is known.

    >>> nats, tokens = torch.tensor([2.0, 4.0]).double(), torch.tensor([1, 2])
    >>> one, half = Losses(nats, tokens, tokens), Losses(nats / 2, tokens, tokens)
    >>> gain_of([one], [half], [1.0])
    (1.0, 1.0, 1.0)
    """
    gain = sum(weight * (old.loss - new.loss) for old, new, weight in zip(before, after, weights, strict=True))
    variance = sum(weight**2 * _variance(old, new) for old, new, weight in zip(before, after, weights, strict=True))
    spread = 1.96 * math.sqrt(variance)
    return gain, gain - spread, gain + spread


def _variance(before: Losses, after: Losses) -> float:
    """Variance of the difference of two losses on the same rows, each a ratio of sums over rows.

    Source: Cochran 1977, Sampling Techniques, equation 6.13: linearised.
    """
    n = len(before.nats)
    if n < 2:
        return math.inf
    residuals = before.nats - after.nats - (before.loss - after.loss) * before.tokens
    return float(residuals.square().sum() / (before.tokens.sum() ** 2)) * n / (n - 1)


def _named(names: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    """Positive weights by name."""
    return {name: float(weight) for name, weight in zip(names, weights, strict=True) if weight > 0}


def _set_weights(sets: Sequence[EvalSet], targets: Mapping[str, float] | None) -> list[float]:
    """Weights of the sets in the loss, which sum to 1."""
    if not targets:
        return [1 / len(sets)] * len(sets)
    names = [evaluated_set.name for evaluated_set in sets]
    if unknown := [name for name in targets if name not in names]:
        raise SettingError(f"--target {unknown[0]}: no such evaluation set; there are {', '.join(names)}")
    total = sum(targets.values())
    if not (min(targets.values()) >= 0 and 0 < total < math.inf):
        raise SettingError("--target: weights of 0 or more are expected, one of them above 0")
    return [targets.get(name, 0.0) / total for name in names]


def _windows(model: LoadedModel, evaluated: EvalSet, longest: int, count: int, seed: int) -> list[Encoded]:
    """A sample of a set's windows that have a token to predict.

    Raises:
        CorpusError: The set has none.
    """
    pieces = (piece for row in evaluated.rows for piece in pieces_of(row, model.tokenizer, longest))
    usable = [encoded for piece in pieces if (encoded := encode(piece, model.tokenizer, longest)).supervised_count]
    if not usable:
        raise CorpusError(f"the evaluation set {evaluated.name} has no text: none of its rows has a token to predict")
    return random.Random(f"suggest {evaluated.name} {seed}").sample(usable, min(count, len(usable)))


def _slopes(
    mixed: MixedModel,
    mixture: Mapping[str, float],
    windows: Sequence[Sequence[Encoded]],
    weights: Sequence[float],
    size: int,
) -> tuple[float, np.ndarray]:
    """Loss on the windows of every set, and its slope by each partition's weight."""
    model = mixed.become(mixture)
    loss = 0.0
    model.model.requires_grad_(True)
    try:
        for set_windows, weight in zip(windows, weights, strict=True):
            count = sum(window.supervised_count for window in set_windows)
            for batch in bucketed([len(window.ids) for window in set_windows], size):
                nats = _nats(model, [set_windows[place] for place in batch])
                batch_loss = nats * (weight / count)
                batch_loss.backward()
                loss += float(batch_loss.detach())
        return loss, _member_slopes(mixed.pool, model)
    finally:
        model.model.requires_grad_(False)
        for parameter in model.model.parameters():
            parameter.grad = None


def _nats(model: LoadedModel, rows: Sequence[Encoded]) -> Tensor:
    """Loss summed over supervised tokens, with its graph."""
    batch = collate(rows).to(model.device)
    logits = model.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits[:, :-1].float()
    labels = batch.ids[:, 1:].masked_fill(~batch.supervised[:, 1:], -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


def _member_slopes(pool: Pool, model: LoadedModel) -> np.ndarray:
    """<gradient, theta_u - theta_0> of every member, one tensor at a time."""
    start, members = pool.start(), [pool.member(name) for name in pool.partitions]
    by_pointer = {parameter.data_ptr(): parameter.grad for parameter in model.model.parameters()}
    slopes = np.zeros(len(members))
    for parameters, source in placed_sources(model, start.files):
        gradients = {name: by_pointer.get(parameter.data_ptr()) for name, parameter in parameters.items()}
        if all(gradient is None for gradient in gradients.values()):
            continue
        parents = [start.read(name).float() for name in source.stored]
        for place, member in enumerate(members):
            stored = [member.read(name, parent) for name, parent in zip(source.stored, parents, strict=True)]
            if all(tensor is None for tensor in stored):
                continue
            moves = (
                torch.zeros_like(parent) if x is None else x - parent for x, parent in zip(stored, parents, strict=True)
            )
            for name, move in source.made_of(moves, model.base).items():
                if (gradient := gradients.get(name)) is not None:
                    slopes[place] += float((gradient.cpu().double() * move.double()).sum())
    return slopes
