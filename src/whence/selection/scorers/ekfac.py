"""Influence by the curvature of the loss: how far taking a row out of a finished training moves a target's loss.

    score = 1/N sum over layers l of <v_l, (H_l + d_l)^-1 g_l>

with v the mean gradient of the target's queries (each one's mean loss over tokens), g that of the row's loss (the sum
over its tokens), H the Gauss-Newton matrix of the N rows' mean loss as K-FAC or EK-FAC has it, and d a tenth of the
mean of its eigenvalues. Larger is more helpful; the unit is nats: what leaving the row out would add to the target's
loss, if the training had come to a minimum. As none has, its size says less than its order.

A plain index serves as it is: where it is `sketched`, what the inverse makes of v is projected as a gradient is, and
compared with the vectors of the last checkpoint. One bit loses most of what curvature brings (docs/LOG.md), so that
rows' gradients are formed again unless told otherwise.

Cost: a pass over the rows that are scored (`of_lists`: a few) for as many targets as 2 GiB hold three times, and for
curvature that was not measured before one (K-FAC) or two (EK-FAC) over as many as it needs (`sampled_rows`).

Sources: Koh and Liang 2017, https://arxiv.org/abs/1703.04730; Grosse et al. 2023, https://arxiv.org/abs/2308.03296.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from whence.corpus.tokens import Encoded
from whence.errors import ManifestMismatchError, SettingError
from whence.gradients.corpus_scores import Directions, direction_scores, groups_that_fit, query_directions
from whence.gradients.space import GradientSpace
from whence.indexing.parts import encoded_row
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
    """EK-FAC's inverse, or K-FAC's, of the last model's Gauss-Newton matrix over some of the rows (`sampled_rows`)."""

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
    copies: ClassVar[int] = COPIES
    """What `COPIES` says; no option."""
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
        rows = _Rows.of(view)
        parts = list[Tensor]()
        for directions in self._directions(view, targets, rows):
            if rows.index is not None and self.sketched:
                parts.append(_by_sketches(view, directions))
                continue
            parts.append(torch.full((len(next(iter(directions.values()))), view.rows), -torch.inf))
            with counting("Scoring by curvature", len(rows.numbers)) as tick:
                parts[-1][:, rows.numbers] = _scores(view, directions, rows.encoded(rows.numbers), tick)
        scores = torch.cat(parts)
        return torch.where(scores.isfinite(), scores, -torch.inf)

    @one_at_a_time
    def of_lists(
        self, view: View, targets: Sequence[Target], lists: Sequence[Sequence[int]]
    ) -> list[Float32[Tensor, " m"]]:
        """Scores of some rows for each target, in nats, larger is more helpful; no other row is read but for curvature.

        Args:
            view: What holds the rows.
            targets: What is asked about.
            lists: For each target numbers of rows that can be scored.
        """
        rows, out = _Rows.of(view), list[Tensor]()
        with counting("Scoring by curvature", sum(map(len, lists))) as tick:
            for directions in self._directions(view, targets, rows):
                for number in range(len(next(iter(directions.values())))):
                    own = {name: each[number : number + 1] for name, each in directions.items()}
                    scores = _scores(view, own, rows.encoded(lists[len(out)]), tick)[0]
                    out.append(torch.where(scores.isfinite(), scores, -torch.inf))
        return out

    def _directions(self, view: View, targets: Sequence[Target], rows: "_Rows") -> Iterator[Directions]:
        """What the inverse makes of the targets' gradients, over the number of rows; as many targets as fit at once."""
        model = view.model()
        layers = model.layers() if rows.index is None else rows.index.layers(model)
        digest = None if rows.index is None else rows.index.store.manifest.checkpoints[-1]["digest"]
        groups = [targets[group.start : group.stop]
                  for group in groups_that_fit(layers, len(targets), copies=COPIES)]  # fmt: skip
        for asked in groups:  # before what takes long
            _refuse_without_gradient(_gradients(model, layers, asked), asked)
        curvature = self._curvature(model, layers, rows, view.tokens_per_batch, digest)
        layers = {name: layers[name] for name in curvature}
        for asked in groups:
            directions = _gradients(model, layers, asked)
            directions = self._solved(model, layers, curvature, directions, rows, view.tokens_per_batch)
            directions = {name: each / len(rows.numbers) for name, each in directions.items()}  # the others are freed
            yield directions

    def _solved(
        self,
        model: LoadedModel,
        layers: Layers,
        curvature: Curvature,
        targets: Directions,
        rows: "_Rows",
        tokens_per_batch: int,
    ) -> Directions:
        """The damped inverse's products with targets."""
        if not self.refine:
            return {name: curvature[name].power(each, -1.0, damping=self.damping) for name, each in targets.items()}
        order = torch.randperm(len(rows.numbers), generator=generator(self.seed, "gauss-newton"))
        some = rows.encoded([rows.numbers[place] for place in order[: self.sample].tolist()])
        product = partial(gauss_newton_product, model, layers, some, tokens_per_batch=tokens_per_batch)
        solved = []
        with counting("Refining", len(next(iter(targets.values())))) as tick:
            for number in range(len(next(iter(targets.values())))):
                target = {name: each[number] for name, each in targets.items()}
                solved.append(damped_solution(product, curvature, target, steps=self.refine, damping=self.damping))
                tick(1, 0)
        return {name: torch.stack([one[name] for one in solved]) for name in targets}

    def _curvature(
        self, model: LoadedModel, layers: Layers, rows: "_Rows", tokens_per_batch: int, digest: str | None
    ) -> Curvature:
        if self.curvature:
            store = _stored(self.curvature, digest or directory_digest(model.path), layers)
            object.__setattr__(self, "seconds_before", store.description.seconds)
            return store.curvature(kind_of(self.kind) if self.kind else None, model.device)
        places = sampled_rows(rows.supervised, layers, seed=self.seed).tolist()
        some = rows.encoded([rows.numbers[place] for place in places])
        how: Drawing = {"seed": self.seed, "is_empirical": self.empirical, "tokens_per_batch": tokens_per_batch}
        curvature = kfac(kfac_factors(model, layers, some, **how))
        if self.kind == "kfac":
            return curvature
        return ekfac(curvature, ekfac_sums(model, layers, curvature, some, **how), len(some))


@dataclass(frozen=True)
class _Rows:
    """The rows of a view that can be scored."""

    index: Any
    """Whose rows they are; None: of a corpus."""
    numbers: list[int]
    supervised: Int64[Tensor, " m"]
    """Supervised tokens of each."""
    encoded: Callable[[Sequence[int]], list[Encoded]]
    """Some of them as token ids, by their numbers."""

    @staticmethod
    def of(view: View) -> "_Rows":
        """Of an index the rows that have a gradient, which are read where they are needed."""
        index = getattr(view, "index", None)  # of an `IndexView`, whose import would bring every projection
        if index is not None:
            rankable, longest = index.store.rankable(), index.store.manifest.settings["max_tokens"]

            def encoded(numbers: Sequence[int]) -> list[Encoded]:
                tokenizer = view.model().tokenizer
                return [encoded_row(row, tokenizer, longest) for row in index.store.read_rows(numbers)]

            return _Rows(index, rankable.tolist(), index.store.supervised_tokens()[rankable], encoded)
        rows = list(view.encoded())
        numbers = [number for number, row in enumerate(rows) if any(row.supervised[1:])]
        tokens = torch.tensor([rows[number].supervised_count for number in numbers], dtype=torch.int64)
        return _Rows(None, numbers, tokens, lambda some: [rows[number] for number in some])


def _scores(
    view: View, directions: Directions, rows: Sequence[Encoded], tick: Callable[[int, int], None]
) -> Float32[Tensor, "s m"]:
    """Inner products of the gradients of rows' losses, each the sum over its tokens, with directions."""
    model = view.model()
    traced = model.layers() if (index := getattr(view, "index", None)) is None else index.layers(model)
    return direction_scores(
        model, {name: traced[name] for name in directions}, directions, rows,
        reduction="sum", tokens_per_batch=view.tokens_per_batch, tick=tick,
    )  # fmt: skip


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


def _by_sketches(view: Any, directions: Directions) -> Float32[Tensor, "s n"]:
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
        scores = scores * store.supervised_tokens().clamp(min=1)
    return scores
