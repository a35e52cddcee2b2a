"""What a fine-tuning did to the weights: theta_0 - theta_f, read from two directories one tensor at a time.

The sign is base minus final. A step of gradient descent takes the gradient away, so theta_0 - theta_f is a positive sum
of the gradients of the rows trained on, and those rows' inner products with it are positive.

Stored weights are rounded. Where a value is re-rounded it moves by up to half a step (one unit in the last place of the
stored dtype) in either direction, with the variance step^2 / 12, so

    noise^2 = sum of step^2 / 12 over the entries that changed, for each side that was rounded.

The final is rounded when it is saved. The base is as a rule the very file that the training began from, so exact. An
entry that did not change holds no noise: 0 says only that it moved by less than half a step. A float32 model cast to
bfloat16 has |difference| = noise; real moves within one 16-bit format are a whole step or more.

A base that is no parent is told by the cosine of theta_0 and theta_f, the median over the matrices that changed: close
to 1 after a fine-tuning, 0 between unrelated models (whose |theta_0 - theta_f| is about sqrt(2) |theta_0|). Gains of
norms start at 1 and biases at 0 in any model, so they cannot tell. That the final was merged, or trained on something
else than text, cannot be told from weights.

Of an adapter the factors are compared. LoRA's B begins at 0, so its difference is -B; where A began is not on file.

Cost: both models' files are read once, and again when an entry is asked for; memory is a few tensors. Weights fused or
split on loading (experts of mixtures) stay in the form of the files.

Source: SELECT, Morris et al. 2025, https://arxiv.org/abs/2506.15553, whose code casts and compares the head alone.
"""

import math
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from whence.checkpoint import open_run
from whence.errors import ModelError
from whence.model import adapter_config, directory_digest, load_tokenizer, located
from whence.weights import Weights, read_json, weights_of

SIGNAL = math.sqrt(2)
"""From this norm / noise on, what moved is at least as large as the noise: |difference|^2 = |move|^2 + noise^2."""
UNLIKELY = 0.5
"""A base below this median cosine is hardly the final's parent."""
ZERO_AT_FIRST = ("true", "gaussian", "eva")
"""Ways to begin an adapter that leave B at 0 and the base as it is."""
ADAPTER = "base_model.model."
"""What peft puts before every name."""
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "alora_invocation_tokens")
"""Settings under which an adapter is no longer W + scale B A."""
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
REMEDY = "Give the model that the final one was fine-tuned from."

Change = Callable[[str, Tensor], Tensor]
_Rows = tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]
"""Rows of the base's and of the final's vocabulary that stand for the same token."""


@dataclass(frozen=True)
class LayerDifference:
    """How one parameter moved. Rows without a partner in the other vocabulary count nowhere."""

    name: str
    shape: tuple[int, ...]
    norm: float
    """|theta_0 - theta_f|."""
    relative: float | None
    """norm / |theta_0|; None where theta_0 is 0, as LoRA's B."""
    unchanged: float
    """Share of entries whose two stored values are the same."""
    noise: float
    """Norm that rounding alone would give the entries that changed; see the module's text."""
    cosine: float | None
    """Of theta_0 and theta_f, for matrices that are not 0."""

    @property
    def signal(self) -> float:
        """Norm over noise; 0 where nothing changed."""
        return 0.0 if self.norm == 0 else self.norm / self.noise if self.noise else math.inf


@dataclass(frozen=True)
class LowRank:
    """theta_0 - theta_f of one adapted layer's weight, as `left @ right`."""

    left: Float32[Tensor, "o r"]
    right: Float32[Tensor, "r i"]

    def dense(self) -> Float32[Tensor, "o i"]:
        """The product. GPT-2's layers keep their weight the other way round, as [i o]."""
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class WeightDifference(Mapping[str, Tensor]):
    """theta_0 - theta_f by parameter, in fp32, laid out as the parameter; each entry is computed when asked for."""

    base: str
    """Directories that were read."""
    final: str
    report: tuple[LayerDifference, ...]
    """Every entry as stored; `mapped` does not change it."""
    notes: tuple[str, ...]
    """What a reader of scores has to know, one sentence each."""
    cosine: float | None
    """Median over the matrices that changed; None without any, as for a LoRA adapter."""
    is_unlikely_parent: bool
    """That cosine is below `UNLIKELY`."""
    _pairs: Mapping[str, "_Pair"] = field(repr=False)
    _adapters: tuple["_Adapter | None", "_Adapter | None"] = field(repr=False)
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

        To undo an optimizer's preconditioner, say, or its weight decay, which `base_weight` and `final_weight` serve.
        """
        return replace(self, _changes=(*self._changes, change))

    def base_weight(self, name: str) -> Float32[Tensor, "..."]:
        """theta_0 of an entry, with its rows in the final's order; 0 in rows that the base has not."""
        pair = self._pairs[name]
        return pair.placed(pair.sides()[0].float())

    def final_weight(self, name: str) -> Float32[Tensor, "..."]:
        """theta_f of an entry, whole."""
        weights, stored = self._pairs[name].final
        return weights.read(stored).float()

    @property
    def adapted(self) -> tuple[str, ...]:
        """Layers with a LoRA, as `LoadedModel.base.get_submodule` knows them; none for whole models."""
        return self._adapters[1].layers if self._adapters[1] else ()

    def low_rank(self, layer: str) -> LowRank:
        """Difference of an adapted layer's effective weight W + scale B A, exact; `mapped` does not change it."""
        base, final = (adapter.update(layer) if adapter else None for adapter in self._adapters)
        if final is None:
            raise KeyError(layer)
        none = torch.zeros_like(final.left)
        update = LowRank(_base_minus_final(none, final.left), final.right)
        if base is None:
            return update
        left = _base_minus_final(base.left, torch.zeros_like(base.left))
        return LowRank(torch.cat([left, update.left], 1), torch.cat([base.right, update.right]))

    def norm(self) -> float:
        """Of all entries together, after `mapped`."""
        return math.hypot(*(_norm(self[name]) for name in self))

    def rows(self) -> list[dict[str, Any]]:
        """The report as plain values, an entry each, with whether `layers` chooses it."""
        return [
            asdict(layer) | {"signal": layer.signal, "carries_signal": layer.signal >= SIGNAL} for layer in self.report
        ]


def weight_difference(
    base: str | Path, final: str | Path, *, names: Collection[str] | None = None, base_is_exact: bool = True
) -> WeightDifference:
    """Compare a fine-tuned model with the one it began as.

    Args:
        base: Directory, Trainer's run (its last checkpoint) or Hub name; of an adapter where both are on one base.
        final: The same.
        names: Of the loaded final's parameters, where its files name them otherwise; parameters of others are left
            out. None: those of the files, which for an adapter are turned into what peft makes of them.
        base_is_exact: The base's file is what the training began from. False where it is a rounded copy, as between
            two 16-bit checkpoints of one training in 32 bits: its rounding then counts as noise too.

    Raises:
        ModelError: Unreadable or quantised weights, different architectures or shapes, vocabularies that differ
            without tokenizers to align them by, an adapter of another base, or no difference at all.
    """
    start, end = (located(open_run(path).checkpoints[-1].path) for path in (base, final))
    adapter = adapter_config(end)
    if adapter is None and adapter_config(start):
        raise ModelError(
            f"{start}: an adapter, but {end} is a whole model. Give the adapter's base, or merge it first."
        )
    found = _of_adapters(start, end, adapter) if adapter else _of_models(start, end, names)
    report, are_casts = [], []
    for name, pair in found.pairs.items():
        layer, is_cast = _compared(name, pair, base_is_exact)
        report.append(layer)
        are_casts.append(is_cast)
    if all(are_casts):
        how = "the same weights" if not any(layer.norm for layer in report) else "the same weights, rounded otherwise"
        raise ModelError(f"{end}: {how} as {start}: there is nothing to find. Give the model before the fine-tuning.")
    moved = [layer for layer in report if layer.cosine is not None and layer.norm > 0]
    cosine = statistics.median(layer.cosine for layer in moved if layer.cosine is not None) if moved else None
    is_unlikely = cosine is not None and cosine < UNLIKELY
    notes = found.notes + _notes(report, found)
    if is_unlikely:
        relative = statistics.median(layer.relative for layer in moved if layer.relative is not None)
        notes.append(
            f"{start} is hardly what {end} was fine-tuned from: the median cosine of their matrices is {cosine:.2f}, "
            f"the relative norm of the difference {relative:.2f} (after a fine-tuning near 1 and far below 1, "
            "between unrelated models near 0 and 1.4)."
        )
    return WeightDifference(start, end, tuple(report), tuple(notes), cosine, is_unlikely, found.pairs, found.adapters)


def _base_minus_final(base: Float[Tensor, "*s"], final: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The sign of this module: training rows have positive inner products with it."""
    return base - final


def rounding_step(weights: Float[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
    """Distance from each value to the next larger one of its dtype.

    >>> rounding_step(torch.tensor([1.0, 1.5, 2.0, -0.75], dtype=torch.bfloat16)) * 256
    tensor([2., 2., 4., 1.])
    """
    limits = torch.finfo(weights.dtype)
    exponents = torch.frexp(weights.float()).exponent - 1
    smallest = limits.smallest_normal * limits.eps  # of subnormal numbers, and of 0
    steps = torch.exp2(exponents.float()) * limits.eps
    return steps.clamp_min(smallest).masked_fill(weights == 0, smallest)


def _compared(name: str, pair: "_Pair", base_is_exact: bool) -> tuple[LayerDifference, bool]:
    """One entry's numbers, and whether one side is the other, cast to its dtype."""
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


def _notes(report: list[LayerDifference], found: "_Found") -> list[str]:
    notes = []
    still = [layer.name for layer in report if layer.norm == 0]
    weak = [layer.name for layer in report if 0 < layer.signal < SIGNAL]
    if still:
        notes.append(f"{len(still)} of {len(report)} entries did not change at all (frozen): {_some(still)}.")
    if weak:
        notes.append(f"{len(weak)} of {len(report)} entries moved no more than rounding does: {_some(weak)}.")
    if found.head is None or found.head in still + weak:
        notes.append("The output head did not move: scores of the head alone would say nothing.")
    moved = [layer for layer in report if layer.norm > 0]
    total = sum(math.prod(layer.shape) for layer in moved)
    unchanged = sum(layer.unchanged * math.prod(layer.shape) for layer in moved) / total
    if unchanged > 0.5:
        notes.append(f"{unchanged:.0%} of the moved layers' entries did not change: moves under half a step are lost.")
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True)
class _Pair:
    """Where a parameter's two sides are stored; a base of None is 0."""

    final: tuple[Weights, str]
    base: tuple[Weights, str] | None
    rows: _Rows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.final[0].shape(self.final[1])

    def sides(self) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
        """Base and final as stored; of a vocabulary the rows that both have, in one order."""
        final = self.final[0].read(self.final[1])
        base = torch.zeros_like(final) if self.base is None else self.base[0].read(self.base[1])
        return (base[self.rows[0]], final[self.rows[1]]) if self.rows else (base, final)

    def placed(self, tensor: Float32[Tensor, "*s"]) -> Float32[Tensor, "..."]:
        """Rows of `sides` at their places in the final; the others are 0."""
        if self.rows is None:
            return tensor
        return torch.zeros(self.shape).index_copy_(0, self.rows[1], tensor)


@dataclass(frozen=True)
class _Found:
    """Entries of a difference, before they are compared."""

    pairs: Mapping[str, _Pair]
    notes: list[str]
    head: str | None
    """Entry of the output head; None where an adapter leaves it alone, empty where it is not known."""
    adapters: tuple["_Adapter | None", "_Adapter | None"] = (None, None)


# -- whole models


@dataclass(frozen=True)
class _Model:
    """A whole model's directory."""

    weights: Weights
    config: Mapping[str, Any]

    @property
    def path(self) -> str:
        return self.weights.path

    @property
    def words(self) -> int:
        """Rows of its embedding."""
        return self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size") or 0

    def is_vocabulary(self, name: str) -> bool:
        """A row is a token's: an embedding, a head or a head's bias, none of which is in a numbered block."""
        return not re.search(r"\.\d+\.", name) and self.weights.shape(name)[:1] == (self.words,)

    @property
    def embedding(self) -> str | None:
        names = (name for name in self.weights.files if not HEADS.search(name) and self.is_vocabulary(name))
        return next((name for name in names if len(self.weights.shape(name)) == 2), None)

    @property
    def head(self) -> str | None:
        return next((name for name in self.weights.files if HEADS.search(name)), None)


def _model(directory: str) -> _Model:
    """A model without the copy of its embedding that some files hold for a tied head."""
    config = read_json(Path(directory) / "config.json")
    model = _Model(weights_of(directory, "model", "pytorch_model"), config)
    head, embedding = model.head, model.embedding
    if head is None or embedding is None or config.get("tie_word_embeddings") is False:
        return model
    # transformers ties them, whatever the configuration says, only where they are equal
    if not torch.equal(model.weights.read(head), model.weights.read(embedding)):
        return model
    files = {name: file for name, file in model.weights.files.items() if name != head}
    return replace(model, weights=Weights(directory, files))


def _of_models(start: str, end: str, names: Iterable[str] | None) -> _Found:
    before, after = _model(start), _model(end)
    _check_kinds(before, after)
    wanted = list(after.weights.files if names is None else names)
    in_base, in_final = _matched(wanted, before.weights.files), _matched(wanted, after.weights.files)
    extra = set(before.weights.files) - set(in_base.values()) if names is None else set()
    for lacks, has, lacking in ((before, after, in_final.keys() - in_base), (after, before, extra)):
        if lacking or not in_final:
            raise ModelError(
                f"{has.path}: it holds {min(lacking, default='no weight of a known name')}, which {lacks.path} does "
                f"not: they are of different architectures. {REMEDY}"
            )
    notes = []
    if other := [name for name in wanted if name not in in_final]:
        notes.append(f"{len(other)} parameters are stored in another form and left out: {_some(other)}.")
    if not after.head and after.embedding:
        notes.append(f"The output head is tied to {after.embedding}: one entry holds what both uses moved.")
    rows = _aligned(before, after, notes)
    pairs = {name: _Pair((after.weights, in_final[name]), (before.weights, in_base[name])) for name in in_final}
    for name, pair in pairs.items():
        if rows and after.is_vocabulary(in_final[name]) and before.is_vocabulary(in_base[name]):
            pairs[name] = replace(pair, rows=rows)
    _check_shapes(pairs)
    stored = {key: name for name, key in in_final.items()}
    return _Found(pairs, notes, stored.get(after.head or after.embedding or "", ""))


def _check_kinds(before: _Model, after: _Model) -> None:
    kinds = [model.config.get("model_type") for model in (before, after)]
    if kinds[0] != kinds[1]:
        raise ModelError(f"{after.path}: a {kinds[1]} model, but {before.path} is a {kinds[0]} model. {REMEDY}")
    for model in (before, after):
        if settings := model.config.get("quantization_config"):
            raise ModelError(
                f"{model.path}: quantised weights ({settings.get('quant_method', 'unknown method')}), whose rounding "
                "is larger than what a fine-tuning moves. Give the model in 16 or 32 bits."
            )


def _check_shapes(pairs: Mapping[str, _Pair]) -> None:
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


def _matched(wanted: Iterable[str], found: Collection[str]) -> dict[str, str]:
    """Names in a file of wanted names: the same, or with one leading part more or less, or the head's other name.

    >>> _matched(["transformer.wte.weight", "lm_head.weight"], ["wte.weight", "embed_out.weight"])
    {'transformer.wte.weight': 'wte.weight', 'lm_head.weight': 'embed_out.weight'}
    """
    longer = {name.partition(".")[2]: name for name in found}
    heads = [name for name in found if HEADS.search(name)]
    matches = {}
    for name in wanted:
        shorter = name.partition(".")[2]
        if name in found:
            matches[name] = name
        elif shorter in found or name in longer:
            matches[name] = shorter if shorter in found else longer[name]
        elif HEADS.search(name) and heads:
            matches[name] = heads[0]
    return matches


# -- vocabularies


def _aligned(before: _Model, after: _Model, notes: list[str]) -> _Rows | None:
    """Rows of the same token, by its string; rows past the tokenizer (padding) by their number. None: all in place."""
    tokens = [_tokens(model.path) for model in (before, after)]
    if None in tokens:
        lacking = (before, after)[tokens.index(None)].path
        if before.words == after.words:
            notes.append(f"{lacking} has no readable tokenizer: both vocabularies are taken to have one order.")
            return None
        raise ModelError(
            f"the vocabularies have {before.words} and {after.words} rows, and {lacking} has no readable tokenizer to "
            "align them by. Copy its tokenizer's files there."
        )
    first, second = (
        {(names or {}).get(row, row): row for row in range(model.words)}
        for names, model in zip(tokens, (before, after), strict=True)
    )
    if first == second:
        return None
    shared = [(first[token], row) for token, row in second.items() if token in first]
    notes.append(
        f"The vocabularies differ ({before.words} rows and {after.words}): {len(shared)} rows are aligned by their "
        f"tokens, {after.words - len(shared)} of the final have no partner and are 0 in the difference, "
        f"{before.words - len(shared)} of the base are left out."
    )
    pairs = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _tokens(directory: str) -> dict[int, str] | None:
    """Strings of a tokenizer's ids; None where there is none, for which transformers would make up an empty one."""
    here = Path(directory)
    places = (here, here.parent) if here.name.startswith("checkpoint-") else (here,)
    place = next((place for place in places if any(place.glob("tokenizer*")) or any(place.glob("vocab*"))), None)
    try:
        vocabulary = load_tokenizer(place, str(place), False).get_vocab() if place else None
    except ModelError:
        return None
    return None if vocabulary is None else {row: token for token, row in vocabulary.items()}


# -- adapters


@dataclass(frozen=True)
class _Adapter:
    """A plain LoRA's directory."""

    weights: Weights
    config: Mapping[str, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        end = ".lora_A.weight"
        return tuple(name[len(ADAPTER) : -len(end)] for name in self.weights.files if name.endswith(end))

    def update(self, layer: str) -> LowRank:
        """What it adds to a layer's weight: scale B, and A."""
        a, b = (self.weights.read(f"{ADAPTER}{layer}.{part}.weight").float() for part in ("lora_A", "lora_B"))
        patterns = self.config.get("alpha_pattern") or {}
        fitting = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha, rank = next(fitting, self.config["lora_alpha"]), a.shape[0]
        return LowRank(b * (alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)), a)


def _adapter(directory: str, config: Mapping[str, Any]) -> _Adapter:
    if variant := next((name for name in VARIANTS if config.get(name)), None):
        raise ModelError(f"{directory}: an adapter with {variant}; Whence knows W + scale B A. Merge it into its base.")
    return _Adapter(weights_of(directory, "adapter_model"), config)


def _of_adapters(start: str, end: str, config: Mapping[str, Any]) -> _Found:
    """Entries of an adapter's own parameters, against the bare base or against an earlier adapter on it."""
    earlier = adapter_config(start)
    root = located(earlier["base_model_name_or_path"]) if earlier else start
    parent = located(config["base_model_name_or_path"])
    if Path(root).resolve() != Path(parent).resolve() and directory_digest(root) != directory_digest(parent):
        raise ModelError(f"{end}: an adapter of {parent}, not of {root}. Give the base that it names.")
    after, notes = _adapter(end, config), []
    before = _adapter(start, earlier) if earlier else None
    if before:
        if other := sorted(before.weights.files.keys() ^ after.weights.files.keys()):
            raise ModelError(f"{start}, {end}: only one of the two adapters has {other[0]}. Give adapters of one kind.")
        bases = {name: (before.weights, name) for name in after.weights.files}
    else:
        if str(config.get("init_lora_weights", True)).lower() not in ZERO_AT_FIRST:
            raise ModelError(
                f"{end}: its init_lora_weights is {config['init_lora_weights']}, under which B does not begin at 0 or "
                "the base is changed too. Merge it and the first adapter into the base and give those two."
            )
        bases = _beginnings(after.weights, _model(root), notes)
    pairs = {_parameter(name, config): _Pair((after.weights, name), base) for name, base in bases.items()}
    _check_shapes(pairs)
    notes.append(f"An adapter of {len(after.layers)} layers: what it does not hold is the base's and did not move.")
    heads = (name for name in pairs if re.search(r"\.(lm_head|embed_out)\.", name))
    return _Found(pairs, notes, next(heads, None), (before, after))


def _beginnings(after: Weights, root: _Model, notes: list[str]) -> dict[str, tuple[Weights, str] | None]:
    """Where an adapter's tensors began: B at 0, whole modules and biases at the base's, the rest is unknown."""
    bases, unknown = {}, []
    for name in after.files:
        own = name.removeprefix(ADAPTER).replace(".base_layer.", ".")
        match = _matched([own], root.weights.files).get(own) or (root.embedding if HEADS.search(own) else None)
        if ".lora_B." in name or name.endswith(".lora_embedding_A"):  # an embedding's A begins at 0, not its B
            bases[name] = None
        elif "lora_" in name or match is None:
            unknown.append(name.removeprefix(ADAPTER))
        else:
            bases[name] = (root.weights, match)
    if unknown:
        notes.append(f"Left out, as no file says where they began (A is drawn at random): {_some(unknown)}.")
    return bases


def _parameter(name: str, config: Mapping[str, Any]) -> str:
    """What peft calls a tensor of an adapter's file once it is loaded."""
    if "lora_" in name:
        return re.sub(r"\.(lora_(?:embedding_)?[AB])(?=\.|$)", r".\1.default", name)
    for module in config.get("modules_to_save") or ():
        changed = re.sub(rf"({re.escape(module)})\.", r"\1.modules_to_save.default.", name, count=1)
        if changed != name:
            return changed
    return name
