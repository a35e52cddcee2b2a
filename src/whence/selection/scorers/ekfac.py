"""Influence by the curvature of the loss: how far taking a row out of a finished training moves a target's loss.

    score = 1/N sum over layers l of <v_l, (H_l + d_l)^-1 g_l>

with v the mean gradient of the target's queries (each one's mean loss over tokens), g that of the row's loss (the sum
over its tokens), H the Gauss-Newton matrix of the N rows' mean loss as K-FAC or EK-FAC has it, and d a tenth of the
mean of its eigenvalues. Larger is more helpful; the unit is nats: what leaving the row out would add to the target's
loss, if the training had come to a minimum. As none has, its size says less than its order.

A plain index serves as it is: where it is `sketched`, what the inverse makes of v is projected as a gradient is, and
compared with the vectors of the last checkpoint. One bit loses most of what curvature brings (docs/LOG.md), so that
rows' gradients are formed again unless told otherwise.

Cost: a pass over the rows for as many targets as 2 GiB hold three times, and for curvature that was not measured before
one (K-FAC) or two more (EK-FAC).

Sources: Koh and Liang 2017, https://arxiv.org/abs/1703.04730; Grosse et al. 2023, https://arxiv.org/abs/2308.03296.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.corpus.tokens import Encoded
from whence.errors import ManifestMismatchError, SettingError
from whence.gradients.corpus_scores import Directions, direction_scores, groups_that_fit, query_directions
from whence.gradients.space import GradientSpace
from whence.models.loading import LoadedModel, directory_digest
from whence.numerics import generator
from whence.runner import counting
from whence.second_order.eigen import DAMPING, Curvature, ekfac, ekfac_sums, kfac
from whence.second_order.factors import kfac_factors
from whence.second_order.fisher import Drawing
from whence.second_order.gauss_newton import damped_solution, gauss_newton_product
from whence.second_order.sampled_rows import sampled_rows
from whence.second_order.store import CurvatureStore, kind_of, open_curvature
from whence.selection.protocols import Target, View
from whence.selection.target_vectors import no_gradient
from whence.turns import one_at_a_time

Layers = Mapping[str, nn.Module]
"""Traced layers by name."""
COPIES = 3
"""Of a target's whole gradient that are held at once: as it is, solved, and divided by the number of rows."""


@dataclass(frozen=True, kw_only=True)
class EKFAC:
    """EK-FAC's inverse, or K-FAC's, of the last model's Gauss-Newton matrix over the rows that are scored."""

    seed: int = 0
    """Of the answers that the model draws."""
    kind: str = ""
    """"ekfac" or "kfac"; unless given as it was measured, or EK-FAC's where it is measured for this call."""
    damping: float = DAMPING
    empirical: bool = False
    """Take the rows' own answers in place of drawn ones."""
    refine: int = 0
    """Steps of conjugate gradients on exact Gauss-Newton products, for every target."""
    sample: int = 256
    """Rows that each of those products is taken over, at most; one more product is taken at the start."""
    sketched: bool = False
    """Read an index' vectors in place of forming the rows' gradients again."""
    curvature: str = ""
    """Directory of `whence curvature`; else it is measured for this call alone."""
    seconds_before: ClassVar[float] = 0.0
    """What measuring that took; no option."""

    def __post_init__(self):
        if self.kind:
            kind_of(self.kind)
        for name, least in (("refine", 0), ("sample", 1)):
            if (value := getattr(self, name)) < least:
                raise SettingError(f"{name} {value} of ekfac: at least {least} is expected")
        if not self.damping > 0:
            raise SettingError(f"damping {self.damping} of ekfac: a number above 0 is expected")

    @one_at_a_time
    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores of every row; -inf for a row without a supervised token."""
        model = view.model()
        index = getattr(view, "index", None)  # of an `IndexView`, whose import would bring every projection
        layers = model.layers() if index is None else index.layers(model)
        rows = list(view.encoded())
        numbers = range(len(rows)) if index is None else index.store.rankable().tolist()
        usable = [number for number in numbers if any(rows[number].supervised[1:])]
        some = [rows[number] for number in usable]
        digest = None if index is None else index.store.manifest.checkpoints[-1]["digest"]
        groups = [targets[group.start : group.stop]
                  for group in groups_that_fit(layers, len(targets), copies=COPIES)]  # fmt: skip
        for asked in groups:  # before what takes long
            _refuse_without_gradient(_gradients(model, layers, asked), asked)
        curvature = self._curvature(model, layers, some, view.tokens_per_batch, digest)
        layers = {name: layers[name] for name in curvature}
        out: list[Tensor] = []
        for asked in groups:
            directions = _gradients(model, layers, asked)
            directions = self._solved(model, layers, curvature, directions, some, view.tokens_per_batch)
            directions = {name: each / len(some) for name, each in directions.items()}
            if index is not None and self.sketched:
                out.append(_by_sketches(view, directions, rows))
                continue
            out.append(torch.full((len(asked), len(rows)), -torch.inf))
            with counting("Scoring by curvature", len(some)) as tick:
                out[-1][:, usable] = direction_scores(
                    model, layers, directions, some, reduction="sum", tokens_per_batch=view.tokens_per_batch, tick=tick
                )
        scores = torch.cat(out)
        return torch.where(scores.isfinite(), scores, -torch.inf)

    def _solved(
        self,
        model: LoadedModel,
        layers: Layers,
        curvature: Curvature,
        targets: Directions,
        rows: Sequence[Encoded],
        tokens_per_batch: int,
    ) -> Directions:
        """The damped inverse's products with targets."""
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

    def _curvature(
        self, model: LoadedModel, layers: Layers, rows: Sequence[Encoded], tokens_per_batch: int, digest: str | None
    ) -> Curvature:
        if self.curvature:
            store = _stored(self.curvature, digest or directory_digest(model.path), layers)
            object.__setattr__(self, "seconds_before", store.description.seconds)
            return store.curvature(kind_of(self.kind) if self.kind else None, model.device)
        tokens = torch.tensor([row.supervised_count for row in rows])
        rows = [rows[place] for place in sampled_rows(tokens, layers, seed=self.seed).tolist()]
        how: Drawing = {"seed": self.seed, "is_empirical": self.empirical, "tokens_per_batch": tokens_per_batch}
        curvature = kfac(kfac_factors(model, layers, rows, **how))
        if self.kind == "kfac":
            return curvature
        return ekfac(curvature, ekfac_sums(model, layers, curvature, rows, **how), len(rows))


def _gradients(model: LoadedModel, layers: Layers, targets: Sequence[Target]) -> Directions:
    """Gradients of targets' losses."""
    return query_directions(model, layers, [target.sequences() for target in targets], GradientSpace())


def _refuse_without_gradient(directions: Directions, targets: Sequence[Target]) -> None:
    """Refuse a target whose gradient is 0 or not finite: its scores would say nothing."""
    squares = torch.stack([each.flatten(1).square().sum(1).cpu() for each in directions.values()]).sum(0)
    for square, target in zip(squares.tolist(), targets, strict=True):
        if not 0 < square < torch.inf:
            raise no_gradient(target)


def _stored(path: str, digest: str, layers: Layers) -> CurvatureStore:
    """Curvature that was measured before.

    Raises:
        ManifestMismatchError: It is of another model, or of layers that are not traced.
    """
    store = open_curvature(path)
    if digest != store.measured.model_digest:
        raise ManifestMismatchError(
            f"{path}: curvature of another model, {store.measured.model} (digest {store.measured.model_digest[:12]}, "
            f"here {digest[:12]}). Measure this one: whence curvature INDEX -o ANOTHER"
        )
    if others := [name for name in store.measured.layers if name not in layers]:
        raise ManifestMismatchError(
            f"{path}: curvature of the layer {others[0]}, which is not traced here. Measure it again: whence curvature "
            "INDEX -o ANOTHER"
        )
    return store


def _by_sketches(view: Any, directions: Directions, rows: Sequence[Encoded]) -> Float32[Tensor, "s n"]:
    """The same inner products, from the vectors of an index' last checkpoint.

    Raises:
        SettingError: The vectors are not rows' gradients as they are.
    """
    space, store = view.index.space, view.index.store
    if space.view != "sgd" or space.normalise != "none":
        raise SettingError(
            f"{store.place.root}: its vectors are not plain gradients (--view {space.view}, --normalise "
            f"{space.normalise}), and curvature is of these. Leave sketched out, or index without those flags."
        )
    projection = view.index.projection(view.index.model())
    vectors = torch.zeros(len(view.weights), len(next(iter(directions.values()))), projection.width)
    for layer, matrices in directions.items():
        vectors[-1][:, projection.columns(layer)] += projection.flat(matrices, layer=layer).cpu()
    scores = view.scores(vectors / view.weights[-1], cosine=False)
    if space.reduction == "mean":  # rows count by their sums
        scores = scores * torch.tensor([max(1, row.supervised_count) for row in rows])
    return scores
