"""The parameters of two models side by side, from their directories: whole models, or an adapter and its base.

Names are matched, a tied head is one parameter, rows of vocabularies are aligned by their tokens, and a tensor that
only the adapter's file holds is paired with where it began. This module compares nothing; `difference` does.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from whence.errors import ModelError
from whence.models.loading import adapter_config, directory_digest, load_tokenizer, local_directory
from whence.models.weights import Weights, read_json, weights_of

ZERO_AT_FIRST = ("true", "gaussian", "eva")
"""Initialisations of an adapter that leave B at 0 and the base unchanged."""
ADAPTER = "base_model.model."
"""Prefix that peft puts before every name."""
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "alora_invocation_tokens")
"""Settings under which an adapter is no longer W + scale B A."""
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
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

    final: tuple[Weights, str]
    base: tuple[Weights, str] | None
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

    weights: Weights
    config: Mapping[str, Any]

    @property
    def path(self) -> str:
        return self.weights.path

    @property
    def vocabulary_size(self) -> int:
        """Rows of its embedding."""
        return self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size") or 0

    def is_vocabulary(self, name: str) -> bool:
        """Whether each row is a token's: an embedding, a head or its bias, none of which is in a numbered block."""
        return not re.search(r"\.\d+\.", name) and self.weights.shape(name)[:1] == (self.vocabulary_size,)

    @property
    def embedding(self) -> str | None:
        names = (name for name in self.weights.files if not HEADS.search(name) and self.is_vocabulary(name))
        return next((name for name in names if len(self.weights.shape(name)) == 2), None)

    @property
    def head(self) -> str | None:
        return next((name for name in self.weights.files if HEADS.search(name)), None)


def _model_files(directory: str) -> _ModelFiles:
    """A model's files, without the copy of the embedding that some of them hold for a tied head."""
    config = read_json(Path(directory) / "config.json")
    model = _ModelFiles(weights_of(directory, "model", "pytorch_model"), config)
    head, embedding = model.head, model.embedding
    if head is None or embedding is None or config.get("tie_word_embeddings") is False:
        return model
    # whatever the configuration says, transformers ties them only if they are equal
    if not torch.equal(model.weights.read(head), model.weights.read(embedding)):
        return model
    files = {name: file for name, file in model.weights.files.items() if name != head}
    return replace(model, weights=Weights(directory, files))


def weights_by_name(directory: str) -> Weights:
    """A whole model's tensors by their names in its files; a tied head is there once."""
    return _model_files(directory).weights


def pair_models(start: str, end: str, names: Iterable[str] | None) -> PairedParameters:
    """Parameters of two whole models, by the names in the final's files or by `names`."""
    before, after = _model_files(start), _model_files(end)
    _check_kinds(before, after)
    entries = list(after.weights.files if names is None else names)
    in_base, in_final = _matching_names(entries, before.weights.files), _matching_names(entries, after.weights.files)
    extra = set(before.weights.files) - set(in_base.values()) if names is None else set()
    for lacks, has, lacking in ((before, after, in_final.keys() - in_base), (after, before, extra)):
        if lacking or not in_final:
            raise ModelError(
                f"{has.path}: it holds {min(lacking, default='no weight of a known name')}, which {lacks.path} does "
                f"not: they are of different architectures. {REMEDY}"
            )
    notes = []
    if unmatched := [name for name in entries if name not in in_final]:
        notes.append(f"{len(unmatched)} parameters are stored in another form and left out: {listed(unmatched)}.")
    if not after.head and after.embedding:
        notes.append(f"The output head is tied to {after.embedding}: one entry holds what both uses moved.")
    rows = _aligned_rows(before, after, notes)
    pairs = {name: Pair((after.weights, in_final[name]), (before.weights, in_base[name])) for name in in_final}
    for name, pair in pairs.items():
        if rows and after.is_vocabulary(in_final[name]) and before.is_vocabulary(in_base[name]):
            pairs[name] = replace(pair, rows=rows)
    _check_shapes(pairs)
    stored = {key: name for name, key in in_final.items()}
    return PairedParameters(pairs, notes, stored.get(after.head or after.embedding or "", ""))


def _check_kinds(before: _ModelFiles, after: _ModelFiles) -> None:
    kinds = [model.config.get("model_type") for model in (before, after)]
    if kinds[0] != kinds[1]:
        raise ModelError(f"{after.path}: a {kinds[1]} model, but {before.path} is a {kinds[0]} model. {REMEDY}")
    for model in (before, after):
        if settings := model.config.get("quantization_config"):
            raise ModelError(
                f"{model.path}: quantised weights ({settings.get('quant_method', 'unknown method')}), whose rounding "
                "is larger than what a fine-tuning moves. Give the model in 16 or 32 bits."
            )


def _check_shapes(pairs: Mapping[str, Pair]) -> None:
    for name, pair in pairs.items():
        if pair.base is None:
            continue
        skipped = 1 if pair.rows else 0
        base = pair.base[0].shape(pair.base[1])
        if base[skipped:] != pair.shape[skipped:]:
            raise ModelError(
                f"{pair.final[0].path}: {name} has the shape {[*pair.shape]}, in {pair.base[0].path} it is {[*base]}. "
                f"{REMEDY}"
            )


def _matching_names(names: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """Stored names by name: the same name, or one with one leading component more or less, or the head's other name.

    >>> _matching_names(["transformer.wte.weight", "lm_head.weight"], ["wte.weight", "embed_out.weight"])
    {'transformer.wte.weight': 'wte.weight', 'lm_head.weight': 'embed_out.weight'}
    """
    longer = {name.partition(".")[2]: name for name in stored}
    heads = [name for name in stored if HEADS.search(name)]
    matches = {}
    for name in names:
        shorter = name.partition(".")[2]
        if name in stored:
            matches[name] = name
        elif shorter in stored or name in longer:
            matches[name] = shorter if shorter in stored else longer[name]
        elif HEADS.search(name) and heads:
            matches[name] = heads[0]
    return matches


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
    _check_shapes(pairs)
    notes.append(f"An adapter of {len(after.layers)} layers: what it does not hold is the base's and did not move.")
    heads = (name for name in pairs if re.search(r"\.(lm_head|embed_out)\.", name))
    return PairedParameters(pairs, notes, next(heads, None), (before, after))


def _initial_values(after: Weights, root: _ModelFiles, notes: list[str]) -> dict[str, tuple[Weights, str] | None]:
    """Where an adapter's tensors began: B at 0, whole modules and biases at the base's; of the rest it is unknown."""
    bases, unknown = {}, []
    for name in after.files:
        plain = name.removeprefix(ADAPTER).replace(".base_layer.", ".")
        match = _matching_names([plain], root.weights.files).get(plain)
        match = match or (root.embedding if HEADS.search(plain) else None)
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
