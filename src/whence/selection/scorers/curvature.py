"""Influence by the curvature of the loss: how far taking a row out of a finished training moves a target's loss.

    score = sum over layers l of <v_l, (H_l + d_l)^-1 g_l>

with v the mean gradient of the target's queries (each one's mean loss over tokens), g that of the row's loss (the sum
over its tokens), H the Gauss-Newton matrix of the corpus as K-FAC or EK-FAC has it, and d a tenth of the mean of its
eigenvalues. Larger is more helpful; the unit is nats for each row of the corpus' mean loss, but for damping. It asks of
a minimum that no training reaches, so that its length says less than its order.

An index of plain gradients serves as it is: what the inverse makes of v is projected as a gradient is, and compared
with the vectors of the last checkpoint.

Cost: two or three passes over the rows (one for K-FAC's factors, one more for EK-FAC's eigenvalues, one for scores).

Sources: Koh and Liang 2017, https://arxiv.org/abs/1703.04730; Grosse et al. 2023, https://arxiv.org/abs/2308.03296.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.gradients.curvature.eigen import DAMPING, Curvature, ekfac, ekfac_sums, kfac
from whence.gradients.curvature.factors import kfac_factors
from whence.gradients.curvature.gauss_newton import damped_solution, gauss_newton_product
from whence.gradients.curvature.scores import Directions, direction_scores, mean_gradients
from whence.gradients.exact import SignedSequence, sequences_of
from whence.numerics import generator
from whence.runner import counting
from whence.selection.protocols import Target, View
from whence.selection.views import IndexView
from whence.turns import one_at_a_time


@dataclass(frozen=True, kw_only=True)
class EKFAC:
    """EK-FAC's inverse, or K-FAC's, of the last model's Gauss-Newton matrix over the rows that are scored."""

    seed: int = 0
    """Of the answers that the model draws."""
    kind: Literal["ekfac", "kfac"] = "ekfac"
    damping: float = DAMPING
    empirical: bool = False
    """Take the rows' own answers in place of drawn ones."""
    refine: int = 0
    """Steps of conjugate gradients on exact Gauss-Newton products, for every target."""
    sample: int = 256
    """Rows that each of those products is taken over, at most."""
    exact: bool = False
    """Form the rows' gradients again where an index has their sketches."""

    @one_at_a_time
    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores of every row; -inf for a row without a supervised token."""
        model = view.model()
        layers = view.index.layers(model) if isinstance(view, IndexView) else model.layers()
        rows = list(view.encoded())
        usable = [number for number, row in enumerate(rows) if any(row.supervised[1:])]
        some = [rows[number] for number in usable]
        curvature = self._curvature(model, layers, some, view.tokens_per_batch)
        directions = mean_gradients(model, layers, [_sequences(target) for target in targets])
        directions = self._solved(model, layers, curvature, directions, some, view.tokens_per_batch)
        out = torch.full((len(targets), len(rows)), -torch.inf)
        if isinstance(view, IndexView) and not self.exact:
            return _by_sketches(view, directions, rows)
        with counting("Scoring by curvature", len(some)) as tick:
            out[:, usable] = direction_scores(
                model, layers, directions, some, tokens_per_batch=view.tokens_per_batch, tick=tick
            )
        return torch.where(out.isfinite(), out, -torch.inf)

    def _solved(self, model, layers, curvature, targets, rows, tokens_per_batch):
        """Targets by the damped inverse [s o i], by layer."""
        if not self.refine:
            return {name: curvature[name].power(each, -1.0, damping=self.damping) for name, each in targets.items()}
        drawn = torch.randperm(len(rows), generator=generator(self.seed, "gauss-newton"))[: self.sample].tolist()
        some = [rows[number] for number in drawn]
        product = partial(gauss_newton_product, model, layers, some, tokens_per_batch=tokens_per_batch)
        solved = []
        with counting("Refining", len(next(iter(targets.values())))) as tick:
            for number in range(len(next(iter(targets.values())))):
                target = {name: each[number] for name, each in targets.items()}
                solved.append(damped_solution(product, curvature, target, steps=self.refine, damping=self.damping))
                tick(1, 0)
        return {name: torch.stack([one[name] for one in solved]) for name in targets}

    def _curvature(self, model, layers, rows, tokens_per_batch) -> Curvature:
        how = {"seed": self.seed, "is_empirical": self.empirical, "tokens_per_batch": tokens_per_batch}
        curvature = kfac(kfac_factors(model, layers, rows, **how))
        if self.kind == "kfac":
            return curvature
        return ekfac(curvature, ekfac_sums(model, layers, curvature, rows, **how), len(rows))


def _by_sketches(view: IndexView, directions: Directions, rows: Sequence[Encoded]) -> Float32[Tensor, "s n"]:
    """The same inner products, from the index' vectors of its last checkpoint.

    Raises:
        SettingError: The vectors are not rows' gradients as they are.
    """
    space, store = view.index.space, view.index.store
    if space.view != "sgd" or space.normalise != "none":
        raise SettingError(
            f"{store.place.root}: its vectors are not plain gradients (--view {space.view}, --normalise "
            f"{space.normalise}), and curvature is of these. Use --set exact=true, or an index without those flags."
        )
    projection = view.index.projection(view.index.model())
    vectors = torch.zeros(len(view.weights), len(next(iter(directions.values()))), projection.width)
    for layer, matrices in directions.items():
        vectors[-1][:, projection.columns(layer)] += projection.flat(matrices, layer=layer).cpu()
    scores = view.scores(vectors / view.weights[-1], cosine=False)
    if space.reduction == "mean":  # rows count by their sums
        scores = scores * torch.tensor([max(1, row.supervised_count) for row in rows])
    return scores


def _sequences(target: Target) -> list[SignedSequence]:
    share = 1 / len(target.queries)
    return [
        replace(sequence, sign=share * sequence.sign)
        for query in target.queries
        for sequence in sequences_of(query.encoded)
    ]
