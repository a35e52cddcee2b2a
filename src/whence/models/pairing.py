"""The parameters of two models side by side, from their directories: whole models, or an adapter and its base.

Parameters have the names of the loaded model (`loaded_weights`), a tied head is one parameter, rows of vocabularies are
aligned by their tokens, and a tensor that only the adapter's file holds is paired with where it began. This module
compares nothing; `difference` does.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from whence.counts import number_of
from whence.errors import ModelError
from whence.models.loaded_weights import LoadedWeights, loaded_weights
from whence.models.loading import adapter_config, directory_digest, load_tokenizer
from whence.models.local_copies import local_directory
from whence.models.sizes import differing_sizes
from whence.models.weights import Weights, read_json, weights_of

ZERO_AT_FIRST = ("true", "gaussian", "eva")
"""Initialisations of an adapter that leave B at 0 and the base unchanged."""
ADAPTER = "base_model.model."
"""Prefix that peft puts before every name."""
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "alora_invocation_tokens")
"""Settings under which an adapter is no longer W + scale B A."""
REMEDY = "Give the model that the final one was fine-tuned from."

Rows = tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]
"""Rows of the base's and of the final's vocabulary that stand for the same token."""


@dataclass(frozen=True)
class LowRank:
    """theta_0 - theta_f of one adapted layer's weight, as `left @ right`."""

    left: Float32[Tensor, "o r"]
    right: Float32[Tensor, "r i"]

    def dense(self) -> Float32[Tensor, "o i"]:
        """The product [o i]. GPT-2's layers store their weight transposed, as [i o]."""
        return self.left @ self.right


@dataclass(frozen=True)
class Pair:
    """Where a parameter's two sides are stored; a base of None stands for zeros."""

    final: tuple[Weights | LoadedWeights, str]
    base: tuple[Weights | LoadedWeights, str] | None
    rows: Rows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the final's side."""
        return self.final[0].shape(self.final[1])

    def sides(self) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
        """Base and final as stored; of a vocabulary, the rows that both have, in one order."""
        final = self.final[0].read(self.final[1])
        base = torch.zeros_like(final) if self.base is None else self.base[0].read(self.base[1])
        return (base[self.rows[0]], final[self.rows[1]]) if self.rows else (base, final)

    def placed(self, tensor: Float32[Tensor, "*s"]) -> Float32[Tensor, "..."]:
        """Rows of `sides` at their places in the final; the other rows are 0."""
        if self.rows is None:
            return tensor
        return torch.zeros(self.shape).index_copy_(0, self.rows[1], tensor)


@dataclass(frozen=True)
class PairedParameters:
    """Parameters of two models side by side, before they are compared."""

    pairs: Mapping[str, Pair]
    notes: list[str]
    head: str | None
    """Name of the output head; None if an adapter leaves it alone, empty if it is not known."""
    adapters: tuple["Adapter | None", "Adapter | None"] = (None, None)


# -- whole models


@dataclass(frozen=True)
class _ModelFiles:
    """The files of a whole model: its weights and its configuration."""

    weights: LoadedWeights
    config: Mapping[str, Any]

    @property
    def path(self) -> str:
        return self.weights.path

    @property
    def vocabulary_size(self) -> int:
        """Rows of its embedding; 0 if it has none."""
        return self.weights.shape(self.weights.embedding)[0] if self.weights.embedding else 0

    def is_vocabulary(self, name: str) -> bool:
        """Whether each row is a token's: an embedding, a head or its bias, none of which is in a numbered block."""
        return not re.search(r"\.\d+\.", name) and self.weights.shape(name)[:1] == (self.vocabulary_size,)


def _model_files(directory: str) -> _ModelFiles:
    config = read_json(Path(directory) / "config.json")
    stored = weights_of(directory, "model", "pytorch_model")
    _refuse_quantised(directory, config)
    return _ModelFiles(loaded_weights(stored), config)


def weights_by_name(directory: str) -> Weights:
    """A whole model's tensors by their names in its files; a tied head is there once."""
    stored = weights_of(directory, "model", "pytorch_model")
    copies = loaded_weights(stored).copies
    return Weights(directory, {name: file for name, file in stored.files.items() if name not in copies})


def pair_models(start: str, end: str) -> PairedParameters:
    """Parameters of two whole models, by the names that they have when the models are loaded."""
    configs = [read_json(Path(directory) / "config.json") for directory in (start, end)]
    kinds = [config.get("model_type") for config in configs]
    if kinds[0] != kinds[1]:
        raise ModelError(f"{end}: a {kinds[1]} model, but {start} is a {kinds[0]} model. {REMEDY}")
    before, after = _model_files(start), _model_files(end)
    ours, theirs = after.weights.sources, before.weights.sources
    for lacks, has, lacking in ((before, after, ours.keys() - theirs), (after, before, theirs.keys() - ours)):
        if lacking and (sizes := differing_sizes(*configs)):
            raise ModelError(_other_sizes(start, end, sizes))
        if lacking or not ours:
            raise ModelError(
                f"{has.path}: it holds {min(lacking, default='no weight of a known name')}, which {lacks.path} does "
                f"not: they are of different architectures. {REMEDY}"
            )
    notes = [
        f"{model.path}: not compared, since the loaded model has no place for "
        f"{number_of(len(unplaced), 'stored tensor')}: {listed([*unplaced])}."
        for model in (before, after)
        if (unplaced := model.weights.unplaced)
    ]
    if after.weights.head and after.weights.head == after.weights.embedding:
        notes.append(f"The output head is tied to {after.weights.embedding}: one entry holds what both uses moved.")
    rows = _aligned_rows(before, after, notes)
    pairs = {name: Pair((after.weights, name), (before.weights, name)) for name in ours}
    for name, pair in pairs.items():
        if rows and after.is_vocabulary(name) and before.is_vocabulary(name):
            pairs[name] = replace(pair, rows=rows)
    _check_shapes(pairs, differing_sizes(*configs))
    return PairedParameters(pairs, notes, after.weights.head or "")


def _refuse_quantised(path: str, config: Mapping[str, Any]) -> None:
    if settings := config.get("quantization_config"):
        raise ModelError(
            f"{path}: quantised weights ({settings.get('quant_method', 'unknown method')}), whose rounding is larger "
            "than what a fine-tuning moves. Give the model in 16 or 32 bits."
        )


def _other_sizes(start: str, end: str, sizes: str) -> str:
    return f"{start} and {end} are models of different sizes ({sizes}), which have no weight difference. {REMEDY}"


def _check_shapes(pairs: Mapping[str, Pair], sizes: str = "") -> None:
    for name, pair in pairs.items():
        if pair.base is None:
            continue
        skipped = 1 if pair.rows else 0
        base = pair.base[0].shape(pair.base[1])
        if base[skipped:] != pair.shape[skipped:]:
            if sizes:
                raise ModelError(_other_sizes(pair.base[0].path, pair.final[0].path, sizes))
            raise ModelError(
                f"{pair.final[0].path}: {name} has the shape {[*pair.shape]}, in {pair.base[0].path} it is {[*base]}. "
                f"{REMEDY}"
            )


# -- vocabularies


def _aligned_rows(before: _ModelFiles, after: _ModelFiles, notes: list[str]) -> Rows | None:
    """Rows of the same token, by its string; rows past the tokenizer (padding) by number. None if all are in place."""
    tokens = [_token_strings(model.path) for model in (before, after)]
    if None in tokens:
        lacking = (before, after)[tokens.index(None)].path
        if before.vocabulary_size == after.vocabulary_size:
            notes.append(f"{lacking} has no readable tokenizer: both vocabularies are taken to have one order.")
            return None
        raise ModelError(
            f"the vocabularies have {before.vocabulary_size} and {after.vocabulary_size} rows, and {lacking} has no "
            "readable tokenizer to align them by. Copy its tokenizer's files there."
        )
    first, second = (
        {(names or {}).get(row, row): row for row in range(model.vocabulary_size)}
        for names, model in zip(tokens, (before, after), strict=True)
    )
    if first == second:
        return None
    shared = [(first[token], row) for token, row in second.items() if token in first]
    notes.append(
        f"The vocabularies differ ({before.vocabulary_size} rows and {after.vocabulary_size}): {len(shared)} rows are "
        f"aligned by their tokens, {after.vocabulary_size - len(shared)} of the final have no partner and are 0 in the "
        f"difference, {before.vocabulary_size - len(shared)} of the base are left out."
    )
    pairs = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _token_strings(directory: str) -> dict[int, str] | None:
    """Strings of a tokenizer's ids; None without a tokenizer, for which transformers would make up an empty one."""
    folder = Path(directory)
    places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    place = next((place for place in places if any(place.glob("tokenizer*")) or any(place.glob("vocab*"))), None)
    try:
        vocabulary = load_tokenizer(place, str(place), False).get_vocab() if place else None
    except ModelError:
        return None
    return None if vocabulary is None else {row: token for token, row in vocabulary.items()}


# -- adapters


@dataclass(frozen=True)
class Adapter:
    """The files of a plain LoRA: its factors and its configuration."""

    weights: Weights
    config: Mapping[str, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        end = ".lora_A.weight"
        return tuple(name[len(ADAPTER) : -len(end)] for name in self.weights.files if name.endswith(end))

    def update(self, layer: str) -> LowRank:
        """What it adds to a layer's weight, as the factors scale B and A."""
        a, b = (self.weights.read(f"{ADAPTER}{layer}.{factor}.weight").float() for factor in ("lora_A", "lora_B"))
        patterns = self.config.get("alpha_pattern") or {}
        alphas = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha, rank = next(alphas, self.config["lora_alpha"]), a.shape[0]
        return LowRank(b * (alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)), a)


def adapter_of(directory: str, config: Mapping[str, Any]) -> Adapter:
    """A plain LoRA's files.

    Raises:
        ModelError: The adapter is a variant that is not W + scale B A.
    """
    if variant := next((name for name in VARIANTS if config.get(name)), None):
        raise ModelError(f"{directory}: an adapter with {variant}; Whence knows W + scale B A. Merge it into its base.")
    return Adapter(weights_of(directory, "adapter_model"), config)


def pair_adapters(start: str, end: str, config: Mapping[str, Any]) -> PairedParameters:
    """An adapter's own parameters, paired with the bare base or with an earlier adapter on it."""
    earlier = adapter_config(start)
    root = local_directory(earlier["base_model_name_or_path"]) if earlier else start
    parent = local_directory(config["base_model_name_or_path"])
    if Path(root).resolve() != Path(parent).resolve() and directory_digest(root) != directory_digest(parent):
        raise ModelError(f"{end}: an adapter of {parent}, not of {root}. Give the base that it names.")
    after, notes = adapter_of(end, config), []
    before = adapter_of(start, earlier) if earlier else None
    if before:
        if unshared := sorted(before.weights.files.keys() ^ after.weights.files.keys()):
            raise ModelError(
                f"{start}, {end}: only one of the two adapters has {unshared[0]}. Give adapters of one kind."
            )
        bases = {name: (before.weights, name) for name in after.weights.files}
    else:
        if str(config.get("init_lora_weights", True)).lower() not in ZERO_AT_FIRST:
            raise ModelError(
                f"{end}: its init_lora_weights is {config['init_lora_weights']}, under which B does not begin at 0 or "
                "the base is changed too. Merge it and the first adapter into the base and give those two."
            )
        bases = _initial_values(after.weights, _model_files(root), notes)
    pairs = {_loaded_name(name, config): Pair((after.weights, name), base) for name, base in bases.items()}
    pairs = {name: pair if before else _of_shared_tokens(pair) for name, pair in pairs.items()}
    _check_shapes(pairs)
    notes.append(
        f"An adapter of {number_of(len(after.layers), 'layer')}: what it does not hold is the base's and did not move."
    )
    own = (name for name in pairs if ".base_layer." not in name)  # which peft saves beside, and does not train
    heads = (name for name in own if re.search(r"\.(lm_head|embed_out)\.", name))
    return PairedParameters(pairs, notes, next(heads, None), (before, after))


def _of_shared_tokens(pair: Pair) -> Pair:
    """A pair of vocabularies of two sizes, by the tokens of both: added ones stand behind the base's own."""
    if pair.base is None or not isinstance(root := pair.base[0], LoadedWeights):
        return pair
    sizes = root.shape(pair.base[1])[:1] + pair.shape[:1]
    if len({*sizes}) < 2 or pair.base[1] not in (root.embedding, root.head):
        return pair
    shared = torch.arange(min(sizes))
    return replace(pair, rows=(shared, shared))


def _initial_values(
    after: Weights, root: _ModelFiles, notes: list[str]
) -> dict[str, tuple[Weights | LoadedWeights, str] | None]:
    """Where an adapter's tensors began: B at 0, whole modules and biases at the base's; of the rest it is unknown."""
    bases, unknown = {}, []
    for name in after.files:
        plain = name.removeprefix(ADAPTER).replace(".base_layer.", ".")
        match = root.weights.names.get(plain)  # a tied head's is the embedding
        if ".lora_B." in name or name.endswith(".lora_embedding_A"):  # of an embedding, A begins at 0 instead of B
            bases[name] = None
        elif "lora_" in name or match is None:
            unknown.append(name.removeprefix(ADAPTER))
        else:
            bases[name] = (root.weights, match)
    if unknown:
        notes.append(f"Left out, as no file says where they began (A is drawn at random): {listed(unknown)}.")
    return bases


def _loaded_name(name: str, config: Mapping[str, Any]) -> str:
    """The name that peft gives to a tensor of an adapter's file when it loads it."""
    if "lora_" in name:
        return re.sub(r"\.(lora_(?:embedding_)?[AB])(?=\.|$)", r".\1.default", name)
    for module in config.get("modules_to_save") or ():
        changed = re.sub(rf"({re.escape(module)})\.", r"\1.modules_to_save.default.", name, count=1)
        if changed != name:
            return changed
    return name


def listed(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
