"""Re-linearisation: train theta_0 on the chosen rows, take what that training did beside gradients off T, match anew.

Matching treats T = theta_0 - theta_f as a sum of gradients at one point, which it is not: weights move while rows are
visited, and an optimizer scales its steps. Both show in a training on rows that we know. With C the rows chosen,
u_i unit gradients at theta_f, and theta_r what theta_0 becomes on C,

    w     = the non-negative sum of u_i, i in C, that is nearest to theta_0 - theta_r
    E     = (theta_0 - theta_r) - sum of w_i u_i      the misfit: what that training did beside its rows' gradients
    T'    = T - E                                     T less the same misfit

and rows are matched to T' anew: rows that C lacks appear, rows that it should not have disappear. A round counts if
its training came nearer to theta_f, by |theta_r - theta_f|, than the one before; the first that does not is the last.
All of it is in the space of the sketches, so that a round costs one training.

Source: ours; measured in docs/results/recovery.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from whence.corpus.layouts import Row
from whence.models.difference import weight_difference
from whence.models.local_copies import local_directory
from whence.models.runs import open_run
from whence.recovery.case import Case, at_point
from whence.recovery.evidence import LayerDirection, length_of, sketch_of
from whence.recovery.matching_problem import gram_problem
from whence.recovery.membership import CorpusEvidence, matched
from whence.recovery.pursuit import nnls
from whence.recovery.shadow_model import Recipe, Shadow, trained_shadow


@dataclass(frozen=True)
class Round:
    """One training on the chosen rows."""

    shadow: Shadow
    remaining: float
    """|theta_r - theta_f| / |T| over the traced layers; 1 without any training."""
    cosine: float
    """Cosine of theta_0 - theta_r with T."""
    explained: float
    """Norm of the sum of w_i u_i over that of theta_0 - theta_r, in sketches."""


def relinearised(
    case: Case, evidence: CorpusEvidence, rows: Sequence[Row], recipe: Recipe, work: Path, *, rounds: int, seed: int = 0
) -> tuple[CorpusEvidence, list[Round]]:
    """Evidence with the sketch of T' in place of T's, and the rounds that count.

    Args:
        case: The two models.
        evidence: Evidence of a corpus; its vectors at "final" and its short list are used.
        rows: The rows of the short list, in its order.
        recipe: The training, as far as known; the first round finds the rest.
        work: Directory of the trainings; a finished one is not made again.
        rounds: Rounds, at most.
        seed: Seed of the trainings.
    """
    vectors = torch.nn.functional.normalize(evidence.points["final"].vectors(evidence.short_list))
    counted: list[Round] = []
    for number in range(rounds):
        chosen = matched(evidence)[1].topk(min(recipe.rows, len(evidence.short_list))).indices.sort().values
        chosen_rows = [rows[row] for row in chosen.tolist()]
        shadow = trained_shadow(
            case.base, chosen_rows, case.difference, recipe, work / f"round-{number + 1}", seed=seed
        )
        recipe = replace(recipe, optimizer=shadow.recipe.optimizer, lr=shadow.recipe.lr)
        training, sketch = _round_of(case, shadow, vectors, chosen)
        if training.remaining >= (counted[-1].remaining if counted else 1.0):
            break
        counted.append(training)
        evidence = replace(evidence, sketch=sketch)
    return evidence, counted


def _round_of(
    case: Case, shadow: Shadow, vectors: Float32[Tensor, "m k"], chosen: Int64[Tensor, " c"]
) -> tuple[Round, Float32[Tensor, " k"]]:
    """The round of a training on chosen rows, and the sketch of T'."""
    reached = local_directory(open_run(shadow.path).checkpoints[-1].path)
    trained = replace(case, final=reached, difference=weight_difference(case.base, reached))
    with at_point(case, 1.0) as model:
        layers = model.layers(case.settings.space.layers)
        difference, moved = case.direction(model, layers), trained.direction(model, layers)
        whole, sketch = sketch_of(difference, model, case.settings), sketch_of(moved, model, case.settings)
    weights = nnls(gram_problem(vectors[chosen], sketch)).weights
    explained = weights @ vectors[chosen]
    residual: LayerDirection = {name: moved[name] - difference[name] for name in difference}
    length = length_of(difference, difference)
    along = sum(float((moved[name] * matrix).sum()) for name, matrix in difference.items())
    cosine = along / max(length * length_of(moved, moved), 1e-30)
    remaining = length_of(residual, residual) / length
    return Round(shadow, remaining, cosine, float(explained.norm() / sketch.norm())), whole - (sketch - explained)
