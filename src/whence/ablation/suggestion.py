"""The best mixture of a pool for an evaluation loss, by descent through the averages themselves.

With theta(w) = theta_0 + sum over u of w_u (theta_u - theta_0) and L the mean over evaluation sets of their losses,

    dL / dw_u = <grad L(theta(w)), theta_u - theta_0>

one backward pass a step for all partitions, and exponentiated gradient on the simplex:

    w_u <- w_u exp(-rate * dL/dw_u / largest |dL/dw|) / sum,     then held under the caps

All steps read one seeded part of every set's windows, so that a loss that rises is the rate's doing and not the
rows'; the losses that are told at the end are of all rows. What is minimised is the loss of averages, which ranks
mixtures and is not the loss of a model trained on them: confirm the mixture by a real training (`whence ablate
--truth`).

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

from whence.ablation.heldout_losses import EvalSet, measure, read_sets
from whence.ablation.member_training import PoolSettings
from whence.ablation.merging import Mixed, mixed, parameters
from whence.ablation.pool import Pool, open_pool
from whence.corpus.partitions import pieces_of
from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.errors import CorpusError, SettingError
from whence.mixing.simplex import cap_vector, capped
from whence.models.loading import LoadedModel
from whence.runner import progress

SMALLEST = 1e-4
"""Weight below which a partition is left out of what is suggested."""


@dataclass(frozen=True)
class Suggestion:
    """A mixture, and what the averages say of it."""

    mixture: dict[str, float]
    losses: dict[str, float]
    """By evaluation set, of the average at the mixture, all rows, in nats a token."""
    uniform: dict[str, float]
    """The same of all partitions alike."""
    best_alone: dict[str, float]
    """Of the single partition with the smallest mean loss."""
    alone: str
    """That one's name."""
    parent: dict[str, float]
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Mixture and loss of the rows read, at each step."""

    def rows(self) -> list[dict[str, Any]]:
        """A row each partition."""
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
    shown: bool = True,
) -> Suggestion:
    """Descend from the uniform mixture.

    Args:
        pool: Of `train_pool`.
        evaluated: Files or directories of held-out rows, one set each.
        steps: Of the descent; where the loss rises, the rate is halved.
        rate: Largest change of a weight's logarithm in the first step.
        rows: Of every set, that the descent reads: windows of `max_tokens`, into which longer texts are cut.
        caps: Most of a partition by name, as a share.
        targets: Weights of the sets; None: all alike.
        max_tokens: Longest window; None: as members were trained.
        tokens_per_batch: Of a pass.
        seed: Of those rows.
        shown: Show a bar.

    Raises:
        SettingError: A number that cannot be, caps that leave less than a whole mixture, an unknown name.
        CorpusError: An evaluation set without text.
    """
    if steps < 1 or rows < 1 or not 0 < rate < math.inf:
        raise SettingError(f"--steps {steps}, --rows {rows}, --rate {rate}: numbers above 0 are expected")
    own = pool if isinstance(pool, Pool) else open_pool(pool)
    given = [evaluated] if isinstance(evaluated, str | Path) else list(evaluated)
    sets = [one for one in given if isinstance(one, EvalSet)] or read_sets(str(one) for one in given)
    names, most = own.partitions, cap_vector(tuple(own.partitions), dict(caps or {}))
    weights_of_sets = _targets(sets, targets)
    longest = max_tokens or PoolSettings(**own.recipe).max_tokens
    made = mixed(own)
    read = [_windows(made.model, one, longest, rows, seed) for one in sets]
    weights = capped(np.full((1, len(names)), 1 / len(names)), most)[0]
    trail: list[dict[str, Any]] = []
    with progress("Descending", steps, shown=shown) as tick:
        for _ in range(steps):
            loss, slopes = _slopes(made, _named(names, weights), read, weights_of_sets, tokens_per_batch)
            if trail and loss > trail[-1]["loss"]:
                rate /= 2
            trail.append({"loss": loss, "mixture": _named(names, weights)})
            weights = weights * np.exp(-rate * slopes / max(np.abs(slopes).max(), 1e-30))
            weights = capped((weights / weights.sum())[None], most)[0]
            tick(1, 0)
    kept = np.where(weights < SMALLEST, 0.0, weights)
    kept = capped((kept / kept.sum())[None], np.where(kept > 0, most, 0.0))[0] if most[kept > 0].sum() >= 1 else weights
    found = _named(names, kept)

    def losses(mixture: Mapping[str, float] | None) -> dict[str, float]:
        model = made.become(mixture)
        return {one.name: measure(model, one, max_tokens=longest, tokens_per_batch=tokens_per_batch).loss
                for one in sets}  # fmt: skip

    def overall(by_set: Mapping[str, float]) -> float:
        return sum(weight * by_set[one.name] for weight, one in zip(weights_of_sets, sets, strict=True))

    single = {name: losses({name: 1.0}) for name in names}
    alone = min(single, key=lambda name: overall(single[name]))
    uniform = losses(dict.fromkeys(names, 1 / len(names)))
    return Suggestion(found, losses(found), uniform, single[alone], alone, losses(None), trail)


def _named(names: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    return {name: float(weight) for name, weight in zip(names, weights, strict=True) if weight > 0}


def _targets(sets: Sequence[EvalSet], targets: Mapping[str, float] | None) -> list[float]:
    if not targets:
        return [1 / len(sets)] * len(sets)
    names = [one.name for one in sets]
    if unknown := [name for name in targets if name not in names]:
        raise SettingError(f"--target {unknown[0]}: no such evaluation set; there are {', '.join(names)}")
    total = sum(targets.values())
    if not (min(targets.values()) >= 0 and 0 < total < math.inf):
        raise SettingError("--target: weights of 0 or more are expected, one of them above 0")
    return [targets.get(name, 0.0) / total for name in names]


def _windows(model: LoadedModel, evaluated: EvalSet, longest: int, count: int, seed: int) -> list[Encoded]:
    """Some of a set's windows, with a token to predict in each.

    Raises:
        CorpusError: There is none.
    """
    pieces = (piece for row in evaluated.rows for piece in pieces_of(row, model.tokenizer, longest))
    usable = [found for piece in pieces if (found := encode(piece, model.tokenizer, longest)).targets]
    if not usable:
        raise CorpusError(f"the evaluation set {evaluated.name} has no text: none of its rows has a token to predict")
    return random.Random(f"suggest {evaluated.name} {seed}").sample(usable, min(count, len(usable)))


def _slopes(
    made: Mixed, mixture: Mapping[str, float], rows: Sequence[Sequence[Encoded]], weights: Sequence[float], size: int
) -> tuple[float, np.ndarray]:
    """Loss, and its slope by each partition's weight, on some rows of every set."""
    model = made.become(mixture)
    loss = 0.0
    model.model.requires_grad_(True)
    try:
        for some, weight in zip(rows, weights, strict=True):
            count = sum(row.targets for row in some)
            for batch in bucketed([len(row.ids) for row in some], size):
                nats = _nats(model, [some[place] for place in batch])
                part = nats * (weight / count)
                part.backward()
                loss += float(part.detach())
        return loss, _along(made.pool, model)
    finally:
        model.model.requires_grad_(False)
        for parameter in model.model.parameters():
            parameter.grad = None


def _nats(model: LoadedModel, rows: Sequence[Encoded]) -> Tensor:
    """Summed over supervised tokens, with a graph."""
    batch = collate(rows).to(model.device)
    logits = model.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits[:, :-1].float()
    targets = batch.ids[:, 1:].masked_fill(~batch.supervised[:, 1:], -100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
    )


def _along(pool: Pool, model: LoadedModel) -> np.ndarray:
    """<gradient, theta_u - theta_0> of every member, one tensor at a time."""
    own = parameters(model)
    start, members = pool.start(), [pool.member(name) for name in pool.partitions]
    by_pointer = {parameter.data_ptr(): parameter.grad for parameter in model.model.parameters()}
    slopes = np.zeros(len(members))
    for name in start.files:
        gradient = by_pointer.get(own(name).data_ptr())
        if gradient is None:
            continue
        parent = start.read(name).float()
        for place, member in enumerate(members):
            part = member.read(name, parent)
            if part is not None:
                slopes[place] += float((gradient.cpu().double() * (part - parent).double()).sum())
    return slopes
