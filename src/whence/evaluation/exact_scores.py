"""Scores from unprojected gradients, as scorers: what `trace` re-ranks its short lists by, for every row.

    exact-dot      sum over checkpoints of weight_c * <v_c, g_c>, with v_c the mean gradient of the target's queries
    exact-cosine   sum over checkpoints of weight_c * cos(v_c, g_c)

where g_c is the plain gradient of a row's loss at the layers of the index, or at those of a corpus' model that are
traced by default, under its one checkpoint. A sketch of an index estimates them; larger is more helpful. An optimizer's
view of the index does not enter.

Cost: a backward pass over every row, for each checkpoint. The targets' whole gradients are held, s times the weights
that are traced; those of more than 2 GiB take several passes.

Source: TracInCP, Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, section 3.2; the cosine as in LESS, Xia et al.
2024, https://arxiv.org/abs/2402.04333.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.errors import SettingError
from whence.gradients.corpus_scores import corpus_scores, groups_that_fit
from whence.gradients.space import GradientSpace
from whence.models.loading import LoadedModel
from whence.runner import counting
from whence.selection.protocols import Target, View
from whence.selection.views import IndexView
from whence.turns import one_at_a_time


@dataclass(frozen=True, kw_only=True)
class ExactDot:
    """Inner products, in nats^2 for each squared unit of weight; -inf for a row without a supervised token."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores of every row."""
        return _exact(view, targets, cosine=False)


@dataclass(frozen=True, kw_only=True)
class ExactCosine:
    """Cosines, from -1 to 1; -inf for a row without a supervised token."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores of every row."""
        return _exact(view, targets, cosine=True)


@one_at_a_time
def _exact(view: View, targets: Sequence[Target], *, cosine: bool) -> Float32[Tensor, "s n"]:
    rows = list(view.encoded())
    queries = [target.sequences() for target in targets]
    total = torch.zeros(len(targets), len(rows))
    for weight, model, layers, space in _checkpoints(view):
        passes = len(groups_that_fit(layers, len(queries)))
        with counting("Exact gradients", passes * sum(row.supervised_count > 0 for row in rows)) as tick:
            total += weight * corpus_scores(
                model,
                layers,
                queries,
                rows,
                space,
                cosine=cosine,
                objective="loss",
                tokens_per_batch=view.tokens_per_batch,
                tick=tick,
            )
    return torch.where(total.isfinite(), total, -torch.inf)


def _checkpoints(view: View) -> Iterator[tuple[float, LoadedModel, dict[str, nn.Module], GradientSpace]]:
    """Weights, models, traced layers and spaces; the last model first, which is loaded already."""
    if isinstance(view, IndexView):
        index = view.index
        if index.has_contrasts:
            raise SettingError(
                f"{index.store.place.root}: its rows are contrasts of two answers, and exact scores read one of each. "
                "Use cosine or dot."
            )
        for number in reversed(range(len(index.weights))):
            model = index.model(number)
            yield index.weights[number], model, index.layers(model), index.space
        return
    model = view.model()
    yield 1.0, model, model.layers(), GradientSpace()
