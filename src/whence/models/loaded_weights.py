"""A model's files under the names of the parameters that transformers loads from them.

On loading, transformers renames, joins and splits stored tensors: experts are stacked into one parameter, a joined
projection becomes three, an older name becomes today's. So the files of a base and of its fine-tune can have different
names, and neither need be a loaded parameter's. Here transformers' own conversion is applied to the names, on a model
without storage, and to a parameter's tensors when it is read.

A tied parameter goes by its first name in `named_parameters`, and its other names stand for it. Two stored tensors that
differ are not tied, whatever the configuration says: transformers does the same.

Cost: for each directory a model without storage, about a ms a module; memory is the tensors of one parameter.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whence.models.loading import model_without_storage
from whence.models.weights import Weights


@dataclass(frozen=True)
class Source:
    """The stored tensors that one parameter is made of."""

    stored: tuple[str, ...]
    """Their names in the files."""
    patterns: tuple[str, ...] = ()
    """The pattern of the converter that each of them matches."""
    converter: Any = None
    """transformers' `WeightConverter`; None: the one stored tensor is the parameter."""
    target: str = ""
    """The parameter by which transformers groups the converter's tensors."""

    def made_of(self, tensors: Iterable[Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Parameters by name that the stored tensors make, in their order."""
        if self.converter is None:
            return {self.target: next(iter(tensors))}
        converter = deepcopy(self.converter)
        for pattern, stored, tensor in zip(self.patterns, self.stored, tensors, strict=True):
            converter.add_tensor(self.target, stored, pattern, tensor)
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


@dataclass(frozen=True)
class LoadedWeights:
    """Parameters of a directory under their loaded names; each is read when asked for."""

    stored: Weights
    sources: Mapping[str, tuple[str, Source]]
    """What each parameter is made of, with the name that it has there, in the model's order."""
    names: Mapping[str, str]
    """From every name of a parameter, a tied one's other names too, to that in `sources`."""
    unplaced: tuple[str, ...]
    """Stored tensors that the loaded model has no place for."""
    copies: frozenset[str]
    """Stored tensors that are a tied parameter once more."""
    embedding: str | None
    """Name of the token embedding in `sources`."""
    head: str | None
    """Name of the output head's weight in `sources`: the embedding's if it is tied."""
    model: nn.Module = field(repr=False)
    """The model, without storage."""

    @property
    def path(self) -> str:
        """Directory of the files."""
        return self.stored.path

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        own_name, source = self.sources[self.names[name]]
        if source.converter is None:
            return self.stored.shape(source.stored[0])
        return tuple(self.model.get_parameter(own_name).shape)

    def read(self, name: str) -> Float[Tensor, "..."]:
        """A parameter as loaded, in the dtype in which it is stored.

        Raises:
            ModelError: A tensor is quantised, or its file is broken.
        """
        own_name, source = self.sources[self.names[name]]
        return source.made_of((self.stored.read(stored) for stored in source.stored), self.model)[own_name]


def loaded_weights(stored: Weights) -> LoadedWeights:
    """Stored tensors of a whole model as the parameters that transformers loads from them.

    Raises:
        ModelError: The directory's configuration is not that of a causal language model.
    """
    model = model_without_storage(stored.path)
    made, unplaced = sources_of(stored.files, model)
    loaded = LoadedWeights(stored, made, {name: name for name in made}, unplaced, frozenset(), None, None, model)
    sources: dict[str, tuple[str, Source]] = {}
    names: dict[str, str] = {}
    copies: set[str] = set()
    for tied in _tied_names(loaded):
        for own_name in (name for name in tied if name in made):
            if tied[0] in sources:
                copies.update(made[own_name][1].stored)
            else:
                sources[tied[0]] = made[own_name]
                names |= dict.fromkeys(tied, tied[0])
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    embedding, head = (names.get(f"{_module_name(model, end)}.weight") for end in ends)
    return replace(loaded, sources=sources, names=names, copies=frozenset(copies), embedding=embedding, head=head)


def sources_of(stored: Iterable[str], model: nn.Module) -> tuple[dict[str, tuple[str, Source]], tuple[str, ...]]:
    """What a model's parameters and buffers are made of, by name and with that name; and stored names without a place.

    Args:
        stored: Names in the files.
        model: A model of transformers, with or without storage.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    sources: dict[str, Source] = {}
    unplaced = []
    for key in sorted(stored, key=dot_natural_key):  # as transformers does: experts are stacked in this order
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)  # type: ignore[arg-type]
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)  # type: ignore[arg-type]
        if target not in state:
            unplaced.append(key)
        elif pattern is None:
            sources.setdefault(target, Source((key,), target=target))
        else:
            source = sources.setdefault(target, Source((), (), by_pattern[pattern], target))
            sources[target] = replace(source, stored=(*source.stored, key), patterns=(*source.patterns, pattern))
    return {name: (name, source) for source in sources.values() for name in _made_by(source, state)}, (*unplaced,)


def _made_by(source: Source, state: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of the parameters that a source makes: a converter can have several targets."""
    first, *others = source.converter.target_patterns if source.converter is not None else [source.target]
    yield source.target
    for other in others:
        if (name := source.target.replace(first, other, 1)) in state and name != source.target:
            yield name


def _tied_names(loaded: LoadedWeights) -> Iterator[list[str]]:
    """Names of each parameter, in the model's order; stored tensors that differ are not tied."""
    groups: dict[int, list[str]] = {}
    for name, weight in loaded.model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(name)
    for names in groups.values():
        first, *others = [name for name in names if name in loaded.names] or [names[0]]
        apart = [name for name in others if not torch.equal(loaded.read(first), loaded.read(name))]
        yield [name for name in names if name not in apart]
        yield from ([name] for name in apart)


def _module_name(model: nn.Module, module: nn.Module | None) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")
