"""Adam's moments of a checkpoint, under the names of the layers that they belong to.

A Trainer writes `optimizer.pt`, which numbers parameters in the order of the optimizer's groups: those with weight
decay first, then those without, each in the order of `named_parameters()`. The rule by which transformers decays
parameters has changed: the rule that fits a file's counts and shapes is used, and a file that no rule fits is refused.
FSDP's `optimizer.bin`, and the file of an optimizer that was made from named parameters, hold the names.

The number of steps, betas and eps are read from the file too, never assumed. A weight that is tied to another has one
pair of moments, for both its uses together.

Files are read as tensors only (`weights_only`), and mapped, so that only the traced layers are fetched from the disk.
Moments of 8 bits (bitsandbytes) are the codes' values times the largest of each block of 256, as its optimizer reads
them; the tests' files of bitsandbytes are built by hand, none is written by it. Not readable are sharded or DeepSpeed
checkpoints, and optimizers other than Adam and AdamW.

Source: transformers' `Trainer.create_optimizer` and `get_decay_parameter_names` for the order; bitsandbytes 0.50,
`optim/optimizer.py` and `functional.dequantize_blockwise`, and Dettmers et al. 2022, https://arxiv.org/abs/2110.02861,
for moments of 8 bits.
"""

import hashlib
import itertools
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from whence.errors import ModelError
from whence.models.loading import LoadedModel, layer_shape
from whence.models.saved_files import check_file

FILES = ("optimizer.pt", "optimizer.bin")
"""Names of the optimizer's file: a Trainer's, and FSDP's."""
OTHER_LAYOUTS = ("optimizer_0", "global_step*", "rank*-of-*-optimizer.pt", "zero_to_fp32.py")
"""Patterns of the files that sharded and DeepSpeed checkpoints hold instead."""
KEYS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))
"""Names of the two moments in torch and in bitsandbytes."""
WRAPPED = "__bnb_optimizer_quant_state__"
"""Key under which newer bitsandbytes puts a parameter's tensors, also those of 32 bits."""
BLOCK = 256
"""Moments of 8 bits that share one scale."""
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
"""Components that FSDP, activation checkpointing and torch.compile add to a name."""
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
REMEDY = "--view sgd needs no optimizer file."
"""Remedy for an index whose checkpoint has no such file; other readers give their own."""


@dataclass(frozen=True)
class Moments:
    """Moments of one layer's weight, laid out as its gradient, with the settings that AdamW used.

    The tensors are the file's own pages, so whatever must outlive a change of the file is copied, as `adam` does.
    """

    m1: Float32[Tensor, "o i"]
    """Running mean of the gradients, not corrected for its start at 0."""
    m2: Float32[Tensor, "o i"]
    """Running mean of their squares, likewise."""
    step: int
    """Number of steps done."""
    betas: tuple[float, float]
    eps: float


def optimizer_file(directory: str | Path) -> Path:
    """The file that holds a checkpoint's moments.

    Raises:
        ModelError: There is none; the message explains why.
        ChecksumError: `whence train` wrote it, and it is damaged.
    """
    for name in FILES:
        if (file := Path(directory) / name).is_file():
            check_file(file)
            return file
    others = [item.name for pattern in OTHER_LAYOUTS for item in Path(directory).glob(pattern)]
    if others:
        explanation = (
            f"its {others[0]} is a sharded checkpoint, which Whence does not read. With FSDP, train with "
            "fsdp_state_dict_type FULL_STATE_DICT"
        )
    elif Path(directory).is_dir():
        explanation = "a Trainer writes it into every checkpoint unless save_only_model is set. Train without that"
    else:
        explanation = "it is no local directory, and models on the Hub come without. Index a training's own directory"
    raise ModelError(
        f"{directory}: there is no {' or '.join(FILES)} in it, where Adam's moments are kept; {explanation}."
    )


def moments_digest(directory: str | Path) -> str:
    """sha256 of a checkpoint's optimizer file."""
    with _with_remedy(REMEDY), optimizer_file(directory).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_moments(model: LoadedModel, layers: Mapping[str, nn.Module], *, remedy: str = REMEDY) -> dict[str, Moments]:
    """Moments of a checkpoint's layers.

    Args:
        model: The checkpoint's model, loaded from its directory.
        layers: Traced layers by name; the weight of each was trained.
        remedy: How to do without moments, for the message if there is no file or it cannot be read.

    Raises:
        ModelError: There is no file, it does not hold Adam's moments, or it is of another model; the message names the
            parameter.
    """
    with _with_remedy(remedy):
        file = optimizer_file(model.path)
        entries = _entries_by_name(_read_optimizer(file), model, file)
        names = _parameter_names(model)
        return {name: _moments(name, layer, names[id(layer.weight)], entries, file) for name, layer in layers.items()}


@dataclass(frozen=True)
class ParameterMoments:
    """Moments of one trained parameter, as the optimizer's file has them."""

    m1: Tensor
    """Running mean of the gradients, of the parameter's shape, not corrected for its start at 0."""
    m2: Tensor
    """Running mean of their squares, likewise."""
    step: int
    betas: tuple[float, float]
    eps: float


def parameter_moments(model: LoadedModel, names: Iterable[str], *, remedy: str) -> dict[str, ParameterMoments]:
    """Moments of a checkpoint's parameters, whatever layer they are of; for the errors see `read_moments`.

    Args:
        model: The checkpoint's model, loaded from its directory.
        names: Names of trained parameters.
        remedy: How to do without moments, for the message if there is no file or it cannot be read.
    """
    with _with_remedy(remedy):
        file = optimizer_file(model.path)
        entries, aliases = _entries_by_name(_read_optimizer(file), model, file), _parameter_names(model)
        out: dict[str, ParameterMoments] = {}
        for name in names:
            parameter = model.model.get_parameter(name)
            plain = aliases[id(parameter)]
            entry = next((entries[alias] for alias in plain if alias in entries), None)
            if entry is None:
                raise ModelError(f"{file}: it has no moments of {plain[0]}, which is taken to be trained.")
            m1, m2 = _pair(entry, plain[0], parameter, file)
            first, second = (float(beta) for beta in entry.group["betas"])
            out[name] = ParameterMoments(
                m1.float(), m2.float(), int(entry.state["step"]), (first, second), float(entry.group["eps"])
            )
        return out


@contextmanager
def _with_remedy(remedy: str) -> Iterator[None]:
    """Add to errors how to do without moments."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error} {remedy}") from None


@dataclass(frozen=True)
class _Entry:
    """One parameter's state in the file, and its group's settings."""

    state: Mapping[str, Any]
    group: Mapping[str, Any]


def _read_optimizer(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file}: it holds more than tensors and numbers, and Whence never unpickles such ({reason})."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{file}: not a readable optimizer file ({reason}). Copy it again.") from None
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        kind = (
            f"the entries {', '.join(map(str, content))}"[:200] if isinstance(content, dict) else type(content).__name__
        )
        raise ModelError(f"{file}: an optimizer's `state` and `param_groups` are expected, found {kind}.")
    state = content["state"]
    unwrapped = {key: {**entry, **entry.get(WRAPPED, {})} for key, entry in state.items() if isinstance(entry, dict)}
    return content | {"state": {**state, **unwrapped}}


def _can_be_mapped(file: Path) -> bool:
    """Whether a file is in the zip format, as all but very old ones are."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _moments(layer: str, module: nn.Module, names: Sequence[str], entries: Mapping[str, _Entry], file: Path) -> Moments:
    entry = next((entries[name] for name in names if name in entries), None)
    if not entries:
        raise ModelError(f"{file}: it holds nothing of any parameter, where Adam and AdamW keep moments.")
    if entry is None:
        raise ModelError(
            f"{file}: it has no moments of {names[0]}, so that weight was not trained. Leave the layer out with "
            f"--layers: {layer}."
        )
    weight = module.weight
    assert isinstance(weight, Tensor), "layers are chosen by their weight"
    pair = _pair(entry, names[0], weight, file)
    # Conv1D keeps its weight as [i o], and so does its optimizer; the shape cannot tell where i = o
    m1, m2 = (moment.float() if isinstance(module, nn.Linear) else moment.float().T for moment in pair)
    assert m1.shape == layer_shape(module), f"{layer}: {m1.shape}"
    first, second = (float(beta) for beta in entry.group["betas"])
    return Moments(m1, m2, int(entry.state["step"]), (first, second), float(entry.group["eps"]))


def _pair(entry: _Entry, name: str, weight: Tensor, file: Path) -> list[Tensor]:
    """The two moments of a parameter, of its shape.

    Raises:
        ModelError: They are not those of Adam or AdamW, or are of another model.
    """
    keys = next((keys for keys in KEYS if set(keys) <= entry.state.keys()), None)
    if keys is None or not {"betas", "eps"} <= entry.group.keys() or "step" not in entry.state:
        contents = ", ".join(map(str, entry.state)) or "nothing"
        raise ModelError(
            f"{file}: of {name} it holds {contents}; step, exp_avg and exp_avg_sq are expected, as Adam and AdamW "
            "keep them."
        )
    pair = [_dequantised(entry.state, key, name, file) for key in keys]
    if entry.group.get("amsgrad") or entry.group.get("maximize"):
        raise ModelError(f"{file}: an optimizer with amsgrad or maximize takes other steps than Adam's.")
    for moment in pair:
        if moment.shape != weight.shape:
            raise ModelError(
                f"{file}: it is the optimizer's file of a model of other sizes: of {name} it holds "
                f"{[*moment.shape]}, where the model has {[*weight.shape]}. Put the file of this checkpoint's own "
                "training there."
            )
    return pair


def _dequantised(state: Mapping[str, Any], key: str, name: str, file: Path) -> Tensor:
    """A moment as numbers: one of 8 bits is the value of its code times the scale of its block."""
    stored = state[key]
    if stored.dtype != torch.uint8:
        return stored
    values, scales = (state.get(f"{kind}{key.removeprefix('state')}") for kind in ("qmap", "absmax"))
    if values is None or scales is None or values.numel() != 256 or scales.numel() != -(-stored.numel() // BLOCK):
        raise ModelError(
            f"{file}: the moments of {name} are in 8 bits (bitsandbytes), without the scales of blocks of {BLOCK} that "
            "Whence reads. Train with a 32-bit AdamW, such as --optim adamw_torch."
        )
    numbers = values.float()[stored.flatten().long()] * scales.float().repeat_interleave(BLOCK)[: stored.numel()]
    return numbers.view(stored.shape)


# -- names


def _parameter_names(model: LoadedModel) -> dict[int, list[str]]:
    """Every name of each parameter, without wrappers, by the parameter's `id`; tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return names


def plain_name(name: str) -> str:
    """A parameter's name without the components that wrappers and an adapter's name add.

    >>> plain_name("module._fsdp_wrapped_module.model.q_proj.lora_A.default.weight")
    'model.q_proj.lora_A.weight'
    """
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while words and words[0] == "module":  # of data-parallel wrappers; further in, it may be a layer's own name
        words = words[1:]
    named = {n + 1 for n, word in enumerate(words) if word.startswith("lora_") or word == "modules_to_save"}
    return ".".join(word for n, word in enumerate(words) if n not in named or word == "weight")


def _entries_by_name(content: dict[str, Any], model: LoadedModel, file: Path) -> dict[str, _Entry]:
    """The file's entries by plain name, for any keys that the file itself uses."""
    state, groups = content["state"], content["param_groups"]
    numbers = [list(group["params"]) for group in groups]
    if any(isinstance(key, str) for group in numbers for key in group):
        names = [[plain_name(key) for key in group] for group in numbers]
    elif all("param_names" in group for group in groups):
        names = [[plain_name(name) for name in group["param_names"]] for group in groups]
    else:
        names = _names_by_order(state, numbers, model, file)
    return {
        name: _Entry(state[key], group)
        for group, keys, named in zip(groups, numbers, names, strict=True)
        for key, name in zip(keys, named, strict=True)
        if key in state
    }


def _names_by_order(
    state: Mapping[Any, Mapping[str, Any]], numbers: list[list[int]], model: LoadedModel, file: Path
) -> list[list[str]]:
    """Names of parameters that the file only numbers, in the first order that fits its counts and shapes."""
    counts, tried, problem = [len(group) for group in numbers], [], ""
    for order in _orders(model):
        groups = iter(order)
        # an adapter has no parameter without decay; the file has an empty group for those
        filled = [next(groups, []) if count else [] for count in counts]
        tried.append(" + ".join(str(len(group)) for group in order))
        if [len(group) for group in filled] != counts or next(groups, None) is not None:
            continue
        mismatch = next(_shape_mismatches(state, numbers, filled, model), None)
        if mismatch is None:
            return [[plain_name(name) for name in group] for group in filled]
        problem = problem or mismatch
    if problem:
        raise ModelError(
            f"{file}: it is the optimizer's file of another model, or of parameters in another order: {problem}. Put "
            "the file of this checkpoint's own training there."
        )
    raise ModelError(
        f"{file}: its groups hold {' + '.join(map(str, counts))} parameters; of this model "
        f"{' or '.join(dict.fromkeys(tried))} are expected, by what a Trainer trains. Whose they are cannot be told "
        "where other parameters were trained or grouped: make the optimizer from named_parameters(), whose names "
        f"torch then writes beside them."
    )


def _shape_mismatches(
    state: Mapping[Any, Mapping[str, Any]], numbers: list[list[int]], names: list[list[str]], model: LoadedModel
) -> Iterator[str]:
    """Parameters whose moments have another shape, one sentence each."""
    for key, name in zip(itertools.chain(*numbers), itertools.chain(*names), strict=True):
        expected = model.model.get_parameter(name).shape
        for keys in KEYS:
            moment = state.get(key, {}).get(keys[0])
            if isinstance(moment, Tensor) and moment.dtype != torch.uint8 and moment.shape != expected:
                yield f"its entry {key} has the shape {[*moment.shape]}, where {name} has {[*expected]}"


def _orders(model: LoadedModel) -> Iterator[list[list[str]]]:
    """Groups of names as optimizers order them, the installed Trainer's first; empty groups are left out."""
    for names in _trained_names(model):
        for decays in (_decays, _decays_before_4_50):
            groups = [[name for name in names if decays(model.model, name) is decayed] for decayed in (True, False)]
            yield [group for group in groups if group]
        yield [names]


def _trained_names(model: LoadedModel) -> Iterator[list[str]]:
    """Names of the trained parameters in their order: for an adapter, those that peft thaws, then only its LoRA."""
    names = [name for name, _ in model.model.named_parameters()]
    if not model.has_adapter:
        yield names
        return
    lora = [name for name in names if "lora_" in name]
    bias = next(iter(model.model.peft_config.values())).bias  # type: ignore[union-attr,operator]
    owners = {name.rpartition(".lora_")[0] for name in lora}
    yield [
        name
        for name in names
        if "lora_" in name
        or ".modules_to_save." in name
        or ".trainable_tokens_" in name
        or (bias == "all" and "bias" in name)
        or (bias == "lora_only" and name.endswith(".base_layer.bias") and name.rpartition(".base_layer")[0] in owners)
    ]
    yield lora


Decays = Callable[[nn.Module, str], bool]


def _decays(model: nn.Module, name: str) -> bool:
    """Whether a Trainer of transformers 4.50 and later decays a parameter."""
    return not _is_in_layer_norm(model, name) and not NO_DECAY.search(name.lower())


def _decays_before_4_50(model: nn.Module, name: str) -> bool:
    """The same for earlier versions, which looked only at the norm's class and for `bias`."""
    return not _is_in_layer_norm(model, name) and "bias" not in name


def _is_in_layer_norm(model: nn.Module, name: str) -> bool:
    words = name.split(".")[:-1]
    owners = (model.get_submodule(".".join(words[: n + 1])) for n in range(len(words)))
    return any(isinstance(owner, nn.LayerNorm) for owner in owners)
