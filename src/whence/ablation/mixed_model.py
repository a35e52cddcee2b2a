"""A loaded model that becomes any mixture of a pool, one mixture after the other.

If fewer members change their weight than the new mixture has, only those are read, and their change is added. RegMean,
which is no sum, is solved anew for every mixture.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from whence.ablation.averages import RegMean, mean
from whence.ablation.merging import MergedModel, check_scale
from whence.ablation.mixtures import Mixture, checked_mixture
from whence.ablation.pool import Pool, date_in
from whence.errors import ManifestMismatchError, SettingError
from whence.models.loaded_weights import Source, sources_of
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
            start = self.pool.start()
            read = (lambda name: start.read(name).float()) if weights is None else self._merged(weights).tensor
            fill(self.model, start.files, read)
            self.moves = 0
        self.weights = weights
        return self.model

    def _merged(self, mixture: Mixture) -> MergedModel:
        return MergedModel.of(self.pool, mixture, self.scale, self.regmean)

    def _move(self, change: Mixture) -> None:
        """Add scale * change_u theta_u; the changes sum to 0, so that theta_0 drops out."""
        start = self.pool.start()
        members = {partition: self.pool.member(partition) for partition in change}

        def moved(name: str) -> Tensor:
            parent = start.read(name).float()
            stored = {partition: members[partition].read(name, parent) for partition in change}
            return mean({partition: parent if x is None else x for partition, x in stored.items()}, change)

        for parameters, source in placed_sources(self.model, start.files):  # whose conversions are linear
            made = source.made_of((moved(name) for name in source.stored), self.model.base)
            for name, parameter in parameters.items():
                parameter.add_(made[name].to(parameter.device), alpha=self.scale)


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


def fill(model: LoadedModel, stored: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Copy tensors, by their names in a model's files, into the model; a tied head follows its embedding.

    Raises:
        SettingError: The model has no place for one.
    """
    for parameters, source in placed_sources(model, stored):
        made = source.made_of((read(name) for name in source.stored), model.base)
        for name, parameter in parameters.items():
            parameter.copy_(made[name])


def placed_sources(model: LoadedModel, stored: Iterable[str]) -> Iterator[tuple[dict[str, Tensor], Source]]:
    """What a loaded model's parameters and buffers are made of, with those that each source makes.

    Raises:
        SettingError: The model has no place for a stored tensor.
    """
    sources, unplaced = sources_of(stored, model.base)
    if unplaced:
        raise SettingError(f"{model.path}: the loaded model has no parameter {unplaced[0]}")
    named = dict(model.base.named_parameters(remove_duplicate=False)) | dict(model.base.named_buffers())
    by_target: dict[str, tuple[dict[str, Tensor], Source]] = {}
    for name, source in sources.values():
        by_target.setdefault(source.target, ({}, source))[0][name] = named[name].data
    yield from by_target.values()
