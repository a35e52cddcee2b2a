"""A loaded model that becomes any mixture of a pool, one mixture after the other.

If fewer members change their weight than the new mixture has, only those are read, and their change is added. RegMean,
which is no sum, is solved anew for every mixture.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from whence.ablation.averages import RegMean
from whence.ablation.merging import check_scale, merged_tensors
from whence.ablation.mixtures import Mixture, checked_mixture
from whence.ablation.pool import Pool, date_in
from whence.errors import ManifestMismatchError, SettingError
from whence.models.loading import LoadedModel, load_model, tokenizer_digest

MOST_MOVES = 16
"""Mixtures reached by changes alone before one is summed anew, so that rounding does not add up."""


@dataclass
class MixedModel:
    """A model whose weights are those of any mixture of a pool, one after the other."""

    pool: Pool
    model: LoadedModel
    scale: float = 1.0
    regmean: RegMean | None = None
    weights: dict[str, float] | None = field(default=None, init=False)
    """Mixture that the model is now; None: it is the parent."""
    moves: int = field(default=0, init=False)
    """Mixtures reached by changes alone since the last sum."""

    def become(self, mixture: Mixture | None) -> LoadedModel:
        """The model with a mixture's weights; None: with the parent's."""
        weights = None if mixture is None else checked_mixture(mixture, self.pool.members)
        if weights == self.weights:
            return self.model
        change = {} if weights is None or self.weights is None else _change(self.weights, weights)
        if weights and change and not self.regmean and len(change) < len(weights) and self.moves < MOST_MOVES:
            self._move(change)
            self.moves += 1
        else:
            fill(self.model, self._parent() if weights is None else self._sum(weights))
            self.moves = 0
        self.weights = weights
        return self.model

    def _sum(self, mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
        return merged_tensors(self.pool, mixture, scale=self.scale, regmean=self.regmean)

    def _parent(self) -> Iterator[tuple[str, Tensor]]:
        start = self.pool.start()
        return ((name, start.read(name).float()) for name in start.files)

    def _move(self, change: Mixture) -> None:
        """Add scale * change_u theta_u; the changes sum to 0, so that theta_0 drops out."""
        start, parameter = self.pool.start(), parameter_lookup(self.model)
        members = {partition: self.pool.member(partition) for partition in change}
        for name in start.files:
            parent = start.read(name).float()
            for partition, by in change.items():
                stored = members[partition].read(name, parent)
                weight = parameter(name)
                weight.add_((parent if stored is None else stored).to(weight.device), alpha=self.scale * by)


def _change(before: Mixture, after: Mixture) -> dict[str, float]:
    changes = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}
    return {name: change for name, change in changes.items() if change}


def mixed_model(pool: Pool, *, scale: float = 1.0, regmean: RegMean | None = None) -> MixedModel:
    """The parent, loaded in fp32, to become mixtures.

    Raises:
        SettingError: The scale is not a finite number.
        ManifestMismatchError: The parent's tokenizer is not the one that members were trained with.
    """
    check_scale(scale)
    model = load_model(pool.parent, dtype="float32", date=date_in(pool))
    if pool.words is not None and tokenizer_digest(model.tokenizer) != pool.words:
        raise ManifestMismatchError(
            f"{pool.parent}: its tokenizer is not the one that the members of {pool.place.root} were trained with. "
            "Put the old one back."
        )
    return MixedModel(pool, model, scale, regmean)


def fill(model: LoadedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors, by their names in a model's files, into the model; a tied head follows its embedding.

    Raises:
        SettingError: The model has no such parameter.
    """
    parameter = parameter_lookup(model)
    for name, tensor in tensors:
        parameter(name).copy_(tensor)


def parameter_lookup(model: LoadedModel) -> Callable[[str], Tensor]:
    """A function from a parameter's name in a model's files to the loaded parameter."""
    named = dict(model.model.named_parameters(remove_duplicate=False)) | dict(model.model.named_buffers())

    def parameter(name: str) -> Tensor:
        spelling = next((candidate for candidate in _spellings(name) if candidate in named), None)
        if spelling is None:
            raise SettingError(f"{model.path}: the loaded model has no parameter {name}")
        return named[spelling].data

    return parameter


def _spellings(name: str) -> Iterator[str]:
    """The name itself, then without and with the prefix that some files leave out."""
    yield name
    yield name.partition(".")[2]
    yield from (f"{prefix}.{name}" for prefix in ("model", "transformer", "gpt_neox"))
