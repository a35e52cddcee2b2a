"""The optimizer's view of a weight difference: what its steps did to the gradients, undone.

Rows are matched by their gradients, and T = theta_0 - theta_f is a sum of gradients under plain SGD alone.

    AdamW, undone    T_u = s * T, s = sqrt(v), v the second moment: each step was the gradient over sqrt(v), about
        moments      v of the final's own optimizer file, corrected for its start at 0
        rows         v of a layer's output row: the mean of g^2 over a sample of the corpus and over the row's inputs
    decay, removed   T_d = T - c theta_0, c = <T, theta_0> / |theta_0|^2 over the traced layers, where it is above 0:
                     decoupled decay takes a share of every weight away, whatever the gradients

Of s only the pattern counts: it is scaled to a mean of 1 over all entries. Whether undoing helps is measured in
docs/results/recovery.md: where the literature's toy gains much, a small language model did not.

Sources: AdamW, Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; undoing it on a target, ours.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Encoded, bucketed, collate
from whence.errors import ModelError, SettingError
from whence.gradients.capture import Captured, backward, example_gradients
from whence.models.loading import LoadedModel
from whence.models.moments import read_moments
from whence.recovery.evidence import Target

UNDO = ("none", "moments", "rows")
REMEDY = "--undo rows and --undo none need no optimizer file."
SAMPLE = 256
"""Rows of the corpus that `rows` takes its mean over."""

Scale = Mapping[str, Float32[Tensor, "o i"] | Float32[Tensor, "o 1"]]
"""s by traced layer."""


def scaled(target: Target, scale: Scale) -> dict[str, Float32[Tensor, "o i"]]:
    """S * T."""
    return {layer: part * scale[layer] for layer, part in target.items()}


def scale_of_moments(model: LoadedModel, layers: Mapping[str, nn.Module]) -> Scale:
    """From a checkpoint's own optimizer file.

    Raises:
        ModelError: It has none, or one that cannot be read.
    """
    found = read_moments(model, layers, remedy=REMEDY)
    return _to_mean_one(
        {name: (own.m2.float() / (1 - own.betas[1] ** own.step)).sqrt() + own.eps for name, own in found.items()},
        layers,
    )


def scale_of_rows(
    model: LoadedModel, layers: Mapping[str, nn.Module], rows: Sequence[Encoded], *, tokens_per_batch: int = 4096
) -> Scale:
    """From gradients of some rows, an estimate where no moments were kept.

    Raises:
        SettingError: No row has a supervised token.
    """
    usable = [row for row in rows if row.targets]
    if not usable:
        raise SettingError(f"none of {len(rows)} rows has a supervised token to estimate an optimizer's scaling from")
    squares = {name: torch.zeros(1) for name in layers}

    def take(seen: Captured) -> None:
        for a, g in zip(seen.a, seen.g, strict=True):
            own = example_gradients(a[None], g[None])[0].square().mean(1, keepdim=True)
            squares[seen.layer] = squares[seen.layer] + own.float().cpu()

    for batch in bucketed([len(row.ids) for row in usable], tokens_per_batch):
        backward(model, layers, collate([usable[place] for place in batch]), take, whole=True)
    return _to_mean_one({name: (sums / len(usable)).sqrt() for name, sums in squares.items()}, layers)


def _to_mean_one(scale: Scale, layers: Mapping[str, nn.Module]) -> Scale:
    entries = {name: layers[name].get_parameter("weight").numel() for name in scale}
    mean = sum(float(part.double().mean()) * entries[name] for name, part in scale.items()) / sum(entries.values())
    if not 0 < mean < float("inf"):
        raise ModelError("an optimizer's scaling that is 0 or not finite cannot be undone: choose --undo none")
    return {name: part / mean for name, part in scale.items()}


def without_decay(target: Target, start: Target) -> tuple[dict[str, Float32[Tensor, "o i"]], float]:
    """A target without what weight decay took, and c, the share of the weights that it took.

    Args:
        target: T.
        start: theta_0 of the same layers.
    """
    along = sum(float((part.double() * start[layer].double()).sum()) for layer, part in target.items())
    square = sum(float(start[layer].double().square().sum()) for layer in target)
    share = max(0.0, along / square) if square else 0.0
    return {layer: part - share * start[layer] for layer, part in target.items()}, share
