"""What a fine-tuning did to the weights: theta_0 - theta_f, read from two directories one tensor at a time.

The sign is base minus final. A step of gradient descent subtracts the gradient, so theta_0 - theta_f is a positive sum
of the gradients of the rows trained on, and those rows' inner products with it are positive.

Stored weights are rounded. A value that is rounded again moves by up to half a step (one unit in the last place of the
stored dtype) in either direction, with the variance step^2 / 12, so

    noise^2 = sum of step^2 / 12 over the entries that changed, for each side that was rounded.

The final is rounded when it is saved. The base is usually the very file that the training began from, so it is exact.
An entry that did not change holds no noise: 0 says only that it moved by less than half a step. A float32 model cast to
bfloat16 has |difference| = noise; real moves within one 16-bit format are a whole step or more.

A base that is not the parent shows in the cosine of theta_0 and theta_f, the median over the matrices that changed: it
is close to 1 after a fine-tuning and 0 between unrelated models (whose |theta_0 - theta_f| is about sqrt(2) |theta_0|).
Gains of norms start at 1 and biases at 0 in any model, so they show nothing. Weights do not show whether the final was
merged, or trained on something other than text.

For an adapter, the factors are compared. LoRA's B begins at 0, so its difference is -B; no file says where A began.

Entries are the parameters of the loaded model, under its names, whatever the files call them and however transformers
joins or splits them on loading (`loaded_weights`).

Cost: both models' files are read once, and again when an entry is asked for; memory is a few tensors.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553, whose code casts and compares the head alone.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from whence.brief import brief
from whence.counts import number_of
from whence.errors import ModelError
from whence.models.loading import adapter_config
from whence.models.local_copies import local_directory
from whence.models.pairing import Adapter, LowRank, Pair, PairedParameters, listed, pair_adapters, pair_models
from whence.models.runs import open_run

SIGNAL = math.sqrt(2)
"""From this norm / noise on, the move is at least as large as the noise: |difference|^2 = |move|^2 + noise^2."""
UNLIKELY = 0.5
"""A base below this median cosine is hardly the final's parent."""

Change = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class LayerDifference:
    """How one parameter moved. Rows without a partner in the other vocabulary do not count."""

    name: str
    shape: tuple[int, ...]
    norm: float
    """|theta_0 - theta_f|."""
    relative: float | None
    """norm / |theta_0|; None if theta_0 is 0, as for LoRA's B."""
    unchanged: float
    """Share of entries whose two stored values are the same."""
    noise: float
    """Norm that rounding alone would give the entries that changed; see the module's text."""
    cosine: float | None
    """Cosine of theta_0 and theta_f, for matrices that are not 0."""

    @property
    def signal(self) -> float:
        """Norm over noise; 0 if nothing changed."""
        return 0.0 if self.norm == 0 else self.norm / self.noise if self.noise else math.inf


@dataclass(frozen=True, eq=False)
class WeightDifference(Mapping[str, Tensor]):
    """theta_0 - theta_f by parameter, in fp32, laid out as the parameter; each entry is computed when asked for."""

    __repr__ = brief

    base: str
    """Directory of the base; `final` is that of the final."""
    final: str
    report: tuple[LayerDifference, ...]
    """Every entry as stored; `mapped` does not change it."""
    notes: tuple[str, ...]
    """What a reader of scores has to know, as sentences."""
    cosine: float | None
    """Median over the matrices that changed; None if there are none, as for a LoRA adapter."""
    is_unlikely_parent: bool
    """Whether that cosine is below `UNLIKELY`."""
    _pairs: Mapping[str, "Pair"] = field(repr=False)
    _adapters: tuple["Adapter | None", "Adapter | None"] = field(repr=False)
    _changes: tuple[Change, ...] = field(default=(), repr=False)

    def __getitem__(self, name: str) -> Float32[Tensor, "..."]:
        pair = self._pairs[name]
        tensor = pair.placed(_base_minus_final(*(side.float() for side in pair.sides())))
        for change in self._changes:
            tensor = change(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def layers(self, threshold: float = SIGNAL) -> tuple[LayerDifference, ...]:
        """Entries that carry signal: norm / noise of `threshold` or more."""
        return tuple(layer for layer in self.report if layer.signal >= threshold)

    def mapped(self, change: Change) -> "WeightDifference":
        """The difference with `change(name, tensor)` in place of each entry, after any earlier change.

        This can undo an optimizer's preconditioner, or its weight decay with `base_weight` and `final_weight`.
        """
        return replace(self, _changes=(*self._changes, change))

    def base_weight(self, name: str) -> Float32[Tensor, "..."]:
        """theta_0 of an entry, with its rows in the final's order; 0 in rows that the base does not have."""
        pair = self._pairs[name]
        return pair.placed(pair.sides()[0].float())

    def final_weight(self, name: str) -> Float32[Tensor, "..."]:
        """theta_f of an entry, whole."""
        weights, stored = self._pairs[name].final
        return weights.read(stored).float()

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of layers with a LoRA, as in `LoadedModel.base.get_submodule`; none for whole models."""
        return self._adapters[1].layers if self._adapters[1] else ()

    def low_rank(self, layer: str) -> LowRank:
        """Exact difference of an adapted layer's effective weight W + scale B A; `mapped` does not change it."""
        base, final = (adapter.update(layer) if adapter else None for adapter in self._adapters)
        if final is None:
            raise KeyError(layer)
        zeros = torch.zeros_like(final.left)
        update = LowRank(_base_minus_final(zeros, final.left), final.right)
        if base is None:
            return update
        left = _base_minus_final(base.left, torch.zeros_like(base.left))
        return LowRank(torch.cat([left, update.left], 1), torch.cat([base.right, update.right]))

    def norm(self) -> float:
        """Norm of all entries together, after `mapped`."""
        return math.hypot(*(_norm(self[name]) for name in self))

    def rows(self) -> list[dict[str, Any]]:
        """The report as plain values, one row per entry, with whether `layers` chooses the entry."""
        return [
            asdict(layer) | {"signal": layer.signal, "carries_signal": layer.signal >= SIGNAL} for layer in self.report
        ]


def weight_difference(base: str | Path, final: str | Path, *, base_is_exact: bool = True) -> WeightDifference:
    """Compare a fine-tuned model with the model that it began as.

    Args:
        base: Directory, Trainer's run (its last checkpoint) or Hub name; an earlier adapter if both have one base.
        final: The same for the fine-tuned model.
        base_is_exact: Whether the training began from the base's very file. False if that is a rounded copy, as between
            two 16-bit checkpoints of one training in 32 bits: its rounding then counts as noise too.

    Raises:
        ModelError: Weights are unreadable or quantised, architectures or shapes differ, vocabularies differ without
            tokenizers to align them by, an adapter has another base, or there is no difference at all.
    """
    start, end = (local_directory(open_run(path).checkpoints[-1].path) for path in (base, final))
    adapter = adapter_config(end)
    if adapter is None and adapter_config(start):
        raise ModelError(
            f"{start}: an adapter, but {end} is a whole model. Give the adapter's base, or merge it first."
        )
    paired = pair_adapters(start, end, adapter) if adapter else pair_models(start, end)
    report, are_casts = [], []
    for name, pair in paired.pairs.items():
        layer, is_cast = _layer_difference(name, pair, base_is_exact)
        report.append(layer)
        are_casts.append(is_cast)
    if all(are_casts):
        how = "the same weights" if not any(layer.norm for layer in report) else "the same weights, rounded otherwise"
        raise ModelError(f"{end}: {how} as {start}: there is nothing to find. Give the model before the fine-tuning.")
    moved = [layer for layer in report if layer.cosine is not None and layer.norm > 0]
    cosine = statistics.median(layer.cosine for layer in moved if layer.cosine is not None) if moved else None
    is_unlikely = cosine is not None and cosine < UNLIKELY
    notes = paired.notes + _notes(report, paired)
    if is_unlikely:
        relative = statistics.median(layer.relative for layer in moved if layer.relative is not None)
        notes.append(
            f"{start} is hardly what {end} was fine-tuned from: the median cosine of their matrices is {cosine:.2f}, "
            f"the relative norm of the difference {relative:.2f} (after a fine-tuning near 1 and far below 1, "
            "between unrelated models near 0 and 1.4)."
        )
    return WeightDifference(start, end, tuple(report), tuple(notes), cosine, is_unlikely, paired.pairs, paired.adapters)


def _base_minus_final(base: Float[Tensor, "*s"], final: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The only place that fixes the sign: training rows have positive inner products with the result."""
    return base - final


def rounding_step(weights: Float[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
    """Distance from each value to the next larger one of its dtype.

    >>> rounding_step(torch.tensor([1.0, 1.5, 2.0, -0.75], dtype=torch.bfloat16)) * 256
    tensor([2., 2., 4., 1.])
    """
    limits = torch.finfo(weights.dtype)
    exponents = torch.frexp(weights.float()).exponent - 1
    smallest = limits.smallest_normal * limits.eps  # the step of subnormal numbers, and of 0
    steps = torch.exp2(exponents.float()) * limits.eps
    return steps.clamp_min(smallest).masked_fill(weights == 0, smallest)


def _layer_difference(name: str, pair: Pair, base_is_exact: bool) -> tuple[LayerDifference, bool]:
    """One entry's numbers, and whether one side is the other side cast to its dtype."""
    base, final = pair.sides()
    is_cast = torch.equal(base.to(final.dtype), final) or torch.equal(final.to(base.dtype), base)
    theta_0, theta_f = base.float(), final.float()
    difference = _base_minus_final(theta_0, theta_f)
    norm, before, after = _norm(difference), _norm(theta_0), _norm(theta_f)
    if not math.isfinite(norm):
        raise ModelError(f"{pair.final[0].path}: {name} or its base holds numbers that are not finite. Copy it again.")
    changed = difference != 0
    rounded = [final] if base_is_exact or pair.base is None else [base, final]
    noise = math.hypot(*(_norm(rounding_step(side)[changed]) for side in rounded)) / math.sqrt(12)
    is_matrix = final.ndim > 1 and before > 0 and after > 0
    layer = LayerDifference(
        name,
        pair.shape,
        norm,
        relative=norm / before if before else None,
        unchanged=1.0 - int(changed.count_nonzero()) / max(changed.numel(), 1),
        noise=noise,
        cosine=(before**2 + after**2 - norm**2) / (2 * before * after) if is_matrix else None,
    )
    return layer, is_cast


def _norm(tensor: Float[Tensor, "..."]) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _notes(report: list[LayerDifference], paired: PairedParameters) -> list[str]:
    notes = []
    frozen = [layer.name for layer in report if layer.norm == 0]
    noisy = [layer.name for layer in report if 0 < layer.signal < SIGNAL]
    if frozen:
        notes.append(
            f"{len(frozen)} of {number_of(len(report), 'entry', 'entries')} did not change at all (frozen): "
            f"{listed(frozen)}."
        )
    if noisy:
        notes.append(
            f"{len(noisy)} of {number_of(len(report), 'entry', 'entries')} moved no more than rounding does: "
            f"{listed(noisy)}."
        )
    if paired.head is None or paired.head in frozen + noisy:
        notes.append("The output head did not move: scores of the head alone would say nothing.")
    moved = [layer for layer in report if layer.norm > 0]
    total = sum(math.prod(layer.shape) for layer in moved)
    unchanged = sum(layer.unchanged * math.prod(layer.shape) for layer in moved) / total
    if unchanged > 0.5:
        notes.append(f"{unchanged:.0%} of the moved layers' entries did not change: moves under half a step are lost.")
    return notes
