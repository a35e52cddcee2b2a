"""Re-linearise: train theta_0 on what was chosen, see where that leads, and match what it leaves.

Matching takes T = theta_0 - theta_f for a sum of gradients at one point, which it is not: weights move on while rows
are visited, and an optimizer scales its steps. Both show in a training on rows that we know. With C the rows chosen,
u_i unit gradients at theta_f, and theta_r what theta_0 becomes on C,

    w     = the non-negative sum of u_i, i in C, that is nearest to theta_0 - theta_r
    E     = (theta_0 - theta_r) - sum of w_i u_i      what that training did that is no sum of its rows' gradients
    T'    = T - E                                     the target, the same misfit taken off it

and rows are matched to T' anew: rows that C lacks appear in it, rows that it should not have do not. A round is kept
where its training came nearer to theta_f than the one before, |theta_r - theta_f|; the first that does not ends it.
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
from whence.models.loading import located
from whence.models.runs import open_run
from whence.recovery.atoms import gram
from whence.recovery.comparison import Case, at_point
from whence.recovery.evidence import Target, length_of, sketch_of
from whence.recovery.membership import Seen, matched
from whence.recovery.pursuit import nnls
from whence.recovery.shadow_model import Recipe, Shadow, trained_shadow


@dataclass(frozen=True)
class Round:
    """One training on what was chosen."""

    shadow: Shadow
    left: float
    """|theta_r - theta_f| / |T| over the traced layers; of no training at all 1."""
    cosine: float
    """Of theta_0 - theta_r with T."""
    explained: float
    """Norm of the rows' part of theta_0 - theta_r over all of it."""


def relinearised(
    case: Case, seen: Seen, rows: Sequence[Row], recipe: Recipe, work: Path, *, rounds: int, seed: int = 0
) -> tuple[Seen, list[Round]]:
    """Evidence with the sketch of T' in place of T's, and what the trainings said.

    Args:
        case: The two models.
        seen: Of a corpus; its vectors at "final" and its short list are used.
        rows: The corpus' rows of the short list, in its order.
        recipe: What is known of the training; the first round finds the rest.
        work: Directory of the trainings, which are not made again.
        rounds: At most.
        seed: Of the trainings.
    """
    vectors = torch.nn.functional.normalize(seen.points["final"].vectors(seen.short))
    done: list[Round] = []
    for number in range(rounds):
        chosen = matched(seen)[1].topk(min(recipe.rows, len(seen.short))).indices.sort().values
        part = [rows[row] for row in chosen.tolist()]
        shadow = trained_shadow(case.base, part, case.difference, recipe, work / f"round-{number + 1}", seed=seed)
        recipe = replace(recipe, optimizer=shadow.recipe.optimizer, lr=shadow.recipe.lr)
        made, target = _moved(case, shadow, seen, vectors, chosen)
        if made.left >= (done[-1].left if done else 1.0):
            break
        done.append(made)
        seen = replace(seen, sketch=target)
    return seen, done


def _moved(
    case: Case, shadow: Shadow, seen: Seen, vectors: Float32[Tensor, "m k"], chosen: Int64[Tensor, " c"]
) -> tuple[Round, Float32[Tensor, " k"]]:
    """What a training did, and T'."""
    reached = located(open_run(shadow.path).checkpoints[-1].path)
    own = replace(case, final=reached, difference=weight_difference(case.base, reached))
    with at_point(case, 1.0) as model:
        layers = model.layers(case.settings.space.layers)
        target, moved = case.target(model, layers), own.target(model, layers)
        whole, sketch = sketch_of(target, model, case.settings), sketch_of(moved, model, case.settings)
    weights = nnls(gram(vectors[chosen], sketch)).weights
    explained = weights @ vectors[chosen]
    rest: Target = {name: moved[name] - target[name] for name in target}
    length = length_of(target, target)
    along = sum(float((moved[name] * part).sum()) for name, part in target.items())
    cosine = along / max(length * length_of(moved, moved), 1e-30)
    made = Round(shadow, length_of(rest, rest) / length, cosine, float(explained.norm() / sketch.norm()))
    return made, whole - (sketch - explained)
