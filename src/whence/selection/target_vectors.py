"""Vectors of targets in an index' own space: what every scorer that reads an index begins with."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.errors import SettingError
from whence.numerics import inverse_or_zero
from whence.selection.protocols import GradientView, Target, View


def indexed_view(view: View, name: str) -> GradientView:
    """A view that shows vectors.

    Raises:
        SettingError: It is of a corpus, which has none.
    """
    if not isinstance(view, GradientView):
        raise SettingError(
            f"--method {name} needs an index, not a corpus. Make one with: whence index MODEL CORPUS -o INDEX"
        )
    return view


def unit_vectors(view: GradientView, vectors: Float32[Tensor, "c s k"]) -> Float32[Tensor, "c s k"]:
    """Vectors divided by their norms."""
    return vectors * inverse_or_zero(view.norms(vectors))[:, :, None]


def target_vectors(view: GradientView, targets: Sequence[Target], *, normalised: bool) -> Float32[Tensor, "c s k"]:
    """Mean vector of each target's queries. A query without a finite gradient is left out of its target's mean.

    Raises:
        SettingError: No query of a target has a finite gradient.
    """
    queries = [query.encoded for target in targets for query in target.queries]
    vectors = view.query_vectors(queries)
    is_finite = vectors.isfinite().all(-1).all(0) & torch.tensor([query.supervised_count > 0 for query in queries])
    if normalised:
        vectors = unit_vectors(view, vectors)
    out, first = vectors.new_zeros(len(vectors), len(targets), vectors.shape[2]), 0
    for number, target in enumerate(targets):
        usable = torch.arange(first, first + len(target.queries))[is_finite[first : first + len(target.queries)]]
        if not len(usable):
            raise no_gradient(target)
        out[:, number] = vectors[:, usable].mean(1)
        first += len(target.queries)
    return out


def no_gradient(target: Target) -> SettingError:
    """The refusal of a target that no row can be compared with."""
    return SettingError(
        f"target {target.name!r}: none of its {len(target.queries)} examples has a finite gradient (an empty "
        "completion, or one cut away by --max-tokens, has none); mend them, or leave the task out"
    )
