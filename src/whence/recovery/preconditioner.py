"""The preconditioner of an optimizer, undone on a weight difference.

Rows are matched by their gradients, but T = theta_0 - theta_f is a sum of gradients only under plain SGD.

    AdamW, undone    T_u = s * T, s = sqrt(v), v the second moment: each step was the gradient over sqrt(v), about
        moments      v of the final's own optimizer file, corrected for its start at 0
        rows         v of a layer's output row: the mean of g^2 over a sample of the corpus and over the row's inputs
    decay, removed   T_d = T - c theta_0, c = <T, theta_0> / |theta_0|^2 over the traced layers, where it is above 0:
                     decoupled decay takes a share of every weight away, whatever the gradients

Only the pattern of s counts: it is scaled to a mean of 1 over all entries. Whether undoing helps is measured in
docs/results/recovery.md: where the literature's toy gains much, a small language model did not.

Sources: AdamW, Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; undoing it on a weight difference, ours.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Encoded, bucketed, collate
from whence.counts import number_of
from whence.errors import ModelError, SettingError
from whence.gradients.capture import Captured, backward, example_gradients
from whence.models.loading import LoadedModel
from whence.models.moments import read_moments
from whence.recovery.evidence import LayerDirection

REMEDY = "--undo rows and --undo none need no optimizer file."
SAMPLE_ROWS = 256
"""Rows of the corpus in the mean of "rows"."""

Scale = Mapping[str, Float32[Tensor, "o i"] | Float32[Tensor, "o 1"]]
"""s by traced layer."""


def scaled(direction: LayerDirection, scale: Scale) -> dict[str, Float32[Tensor, "o i"]]:
    """T_u = s * T."""
    return {layer: matrix * scale[layer] for layer, matrix in direction.items()}


def scale_of_moments(model: LoadedModel, layers: Mapping[str, nn.Module]) -> Scale:
    """The scale s from a checkpoint's own optimizer file.

    Raises:
        ModelError: It has none, or one that cannot be read.
    """
    moments = read_moments(model, layers, remedy=REMEDY)
    return _to_mean_one(
        {
            name: (state.m2.float() / (1 - state.betas[1] ** state.step)).sqrt() + state.eps
            for name, state in moments.items()
        },
        layers,
    )


def scale_of_rows(
    model: LoadedModel, layers: Mapping[str, nn.Module], rows: Sequence[Encoded], *, tokens_per_batch: int = 4096
) -> Scale:
    """An estimate of the scale s from gradients of some rows, for where no moments were stored.

    Raises:
        SettingError: No row has a supervised token.
    """
    usable = [row for row in rows if row.supervised_count]
    if not usable:
        raise SettingError(
            f"none of {number_of(len(rows), 'row')} has a supervised token to estimate an optimizer's scaling from"
        )
    squares = {name: torch.zeros(1) for name in layers}

    def take(captured: Captured) -> None:
        for a, g in zip(captured.a, captured.g, strict=True):
            mean_square = example_gradients(a[None], g[None])[0].square().mean(1, keepdim=True)
            squares[captured.layer] = squares[captured.layer] + mean_square.float().cpu()

    for batch in bucketed([len(row.ids) for row in usable], tokens_per_batch):
        backward(model, layers, collate([usable[place] for place in batch]), take, whole=True)
    return _to_mean_one({name: (sums / len(usable)).sqrt() for name, sums in squares.items()}, layers)


def _to_mean_one(scale: Scale, layers: Mapping[str, nn.Module]) -> Scale:
    entries = {name: layers[name].get_parameter("weight").numel() for name in scale}
    mean = sum(float(s.double().mean()) * entries[name] for name, s in scale.items()) / sum(entries.values())
    if not 0 < mean < float("inf"):
        raise ModelError("an optimizer's scaling that is 0 or not finite cannot be undone: choose --undo none")
    return {name: s / mean for name, s in scale.items()}


def without_decay(direction: LayerDirection, start: LayerDirection) -> tuple[dict[str, Float32[Tensor, "o i"]], float]:
    """T without what weight decay took, and c, the share of the weights that it took.

    Args:
        direction: T.
        start: theta_0 of the same layers.
    """
    along = sum(float((matrix.double() * start[layer].double()).sum()) for layer, matrix in direction.items())
    square = sum(float(start[layer].double().square().sum()) for layer in direction)
    share = max(0.0, along / square) if square else 0.0
    return {layer: matrix - share * start[layer] for layer, matrix in direction.items()}, share
