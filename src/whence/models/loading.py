"""Load a causal language model, its LoRA adapter and its tokenizer, and choose the layers to trace.

The weights are frozen on loading: Whence never needs a weight's gradient, only the pair `(a, g)` of each traced
layer, and leaving the weight products out is what makes an index cheaper than a training step.

By default a LoRA adapter's A and B are traced. Without an adapter it is every linear layer of the blocks (`nn.Linear`
and the `Conv1D` of GPT-2), but not the output head, whose gradient is as large as the vocabulary; `--layers` can add
it. Embeddings, norms, biases and experts fused into one three-dimensional parameter are not linear layers and are left
out, and so are layers that no text reaches (a vision tower); `traced_fraction` says how much of the model remains.
"""

import hashlib
import json
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from whence.brief import brief
from whence.corpus.templates import prepare, supervise
from whence.counts import number_of
from whence.errors import ModelError, SettingError
from whence.models.adapter_loading import with_adapter
from whence.models.auto_classes import auto_class
from whence.models.causality import is_unreached, refuse_not_causal, refuse_other_logits
from whence.models.checkpointing import blocks, recomputing
from whence.models.layers import linear_layers, matching_layers
from whence.models.load_options import Loading
from whence.models.loading_errors import FOREIGN, as_model_errors, reason_of
from whence.models.local_copies import MODEL_FILES, local_directory
from whence.models.saved_files import check_file, check_model_files
from whence.models.training_state import date_of_training, supervision_of_training
from whence.models.unreadable_layouts import missing_configuration, missing_weights
from whence.models.weights import weight_files
from whence.paths import is_directory, require_readable
from whence.turns import one_at_a_time

logger = logging.getLogger(__name__)

IRRELEVANT = ("_name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "use_cache")
"""Entries of a configuration that do not change an output."""

ADAPTER_PARAMETERS = ("lora_", ".modules_to_save.", "trainable_tokens_delta")
"""Text in the names of parameters that peft adds to a model."""

CAUSAL = "CAUSAL_LM"
"""What a model is loaded from."""
ADAPTER_DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": None, "modules_to_save": None}
ADAPTER_KINDS = {
    "r": int,
    "lora_alpha": int | float,
    "target_modules": str | list | None,
    "modules_to_save": list | None,
}
"""Types of what Whence reads of an adapter's configuration; values that it lacks are peft's."""
"""peft's name for the task of a causal language model; an adapter of another task has a head of its own."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A frozen causal language model in evaluation mode (no dropout), with its tokenizer."""

    __repr__ = brief

    model: nn.Module
    """The loaded model, with its adapter if it has one."""
    tokenizer: Any
    path: str
    """Directory or Hub name that it was loaded from."""
    has_adapter: bool = False

    @property
    def base(self) -> Any:
        """The transformers model itself, inside the adapter's wrapper."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go."""
        return device_of(self.base.get_input_embeddings())

    @property
    def context(self) -> int | None:
        """Longest sequence that the model takes, in tokens; None if its configuration does not say."""
        config = self.base.config.get_text_config()
        positions = getattr(self.base.base_model, "embeddings", None)
        positions = getattr(positions, "position_embeddings", None)
        if getattr(positions, "padding_idx", None) is not None:  # as in RoBERTa: positions begin behind it
            return positions.num_embeddings - positions.padding_idx - 1  # type: ignore[union-attr]
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(length := getattr(config, name, None), int) and length > 0:  # XLNet says -1: no limit
                return length
        return None

    def layers(self, pattern: str | None = None) -> dict[str, nn.Module]:
        """Traced layers by name, in the model's own order.

        Args:
            pattern: Shell-style patterns of names, with commas between; a "!" before one leaves its layers out. None
                gives the default that the module's text describes, and patterns that only leave out start from it.
                Layers that no text reaches, as those of a vision tower, are never among them.

        Raises:
            SettingError: A pattern matches no linear layer, or only such as no text reaches.
        """
        linear = dict(linear_layers(self.base))
        unreached = [name for name, layer in linear.items() if is_unreached(layer)]
        linear = {name: layer for name, layer in linear.items() if name not in unreached}
        if self.has_adapter:
            default = {name: layer for name, layer in linear.items() if ".lora_A." in name or ".lora_B." in name}
        else:
            head = self.base.get_output_embeddings()
            default = {name: layer for name, layer in linear.items() if layer is not head}
        return default if pattern is None else matching_layers(linear, default, pattern, unreached)

    def uses(self, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """Every module that has a layer's weight, with the layer's name; for example, Zamba2's blocks share weights."""
        yield from layers.items()
        traced, names = set(layers.values()), {id(layer.weight): name for name, layer in layers.items()}
        for module in self.base.modules():
            name = names.get(id(getattr(module, "weight", None)))
            if name is not None and module not in traced and isinstance(module, type(layers[name])):
                yield name, module

    def traced_fraction(self, layers: Mapping[str, nn.Module]) -> float:
        """The layers' weights as a share of the model's parameters, or of the adapter's if there is one."""
        only_adapter = self.has_adapter and all("lora_" in name for name in layers)
        names = [name for name, _ in self.model.named_parameters() if not only_adapter or self.is_trained(name)]
        total = sum(self.model.get_parameter(name).numel() for name in names)
        return sum(layer.weight.numel() for layer in layers.values()) / total  # type: ignore[union-attr]

    def is_trained(self, name: str) -> bool:
        """Whether a training of the model, as it is loaded, changes a parameter: with an adapter, only the adapter's.

        Those are its low-rank factors and magnitudes, modules that it saves whole, and tokens that it trains.
        """
        return not self.has_adapter or any(text in name for text in ADAPTER_PARAMETERS)

    def decode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Last hidden states [b t d] of token ids [b t], and the function from states [s d] to logits [s v].

        The function does what the model's own forward does after its decoder (scaling, soft caps): it runs that forward
        with the decoder replaced by a stub that returns the states.

        Raises:
            ModelError: The model has no separate decoder.
        """
        base = self.base
        candidates = (base.get_decoder(), base.base_model, getattr(base, "model", None))
        ends = (None, base, base.get_output_embeddings())  # what ModernBERT and Llama 4 give for their decoder
        decoder: Any = next((module for module in candidates if all(module is not end for end in ends)), None)
        if decoder is None:
            raise ModelError(f"{self.path}: a {type(base).__name__} has no decoder that Whence can find")
        out = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False)

        def head(states: Tensor) -> Tensor:
            with _returning(decoder, type(out)(**{**out, "last_hidden_state": states[None]})):
                return base(input_ids=ids[:1, :1], use_cache=False).logits.squeeze(0)

        return out.last_hidden_state, head

    def require_gradient_checkpointing(self) -> None:
        """Refuse a model whose blocks cannot recompute their activations."""
        if not (getattr(self.base, "supports_gradient_checkpointing", False) and blocks(self.base)):
            raise ModelError(
                f"{self.path}: a {type(self.base).__name__} has no gradient checkpointing. Leave "
                "--gradient-checkpointing out, and lower --batch-tokens for less memory."
            )

    def gradient_checkpointing(self) -> AbstractContextManager[None]:
        """Recompute activations in the backward pass instead of keeping them: less memory, a third more time."""
        self.require_gradient_checkpointing()
        return recomputing(self.base)


@contextmanager
def _returning(decoder: Any, output: Any) -> Iterator[None]:
    """Make a decoder return `output` whatever its input is."""
    before = decoder.__dict__.get("forward")  # accelerate sets one on the instance when it spreads a model
    decoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """`(o, i)` of a linear layer; `Conv1D` keeps its weight as `[i, o]`."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features  # a quantised layer packs its weight
    inputs, outputs = (int(size) for size in layer.weight.shape)  # type: ignore[union-attr]
    return outputs, inputs


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer runs: a model may be spread over several devices, and some of it lie on a disk."""
    device = next(layer.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = layer._hf_hook
    return torch.device(hook.execution_device)  # accelerate moves its weights there when it runs


@one_at_a_time
def load_model(
    path: str | Path, *, base: str | None = None, dtype: str | None = None, **loading: Unpack[Loading]
) -> LoadedModel:
    """Load a model directory, an adapter directory, or a Hub name.

    Args:
        path: Directory of a model or of a peft adapter (its base is loaded first), or a name on the Hub.
        base: Where an adapter's base was before; used if it is still there, else the configuration's base is.
        dtype: One of `DTYPES`; None keeps the dtype in which the weights are stored.
        **loading: See `Loading`.

    Raises:
        ModelError: There is no loadable model, a weight file is corrupt or lacks weights, the tokenizer's ids do not
            fit the model's embedding, or the model is not causal.
        SettingError: There is no such dtype or device.
    """
    import transformers

    tokenizer, device_map = loading.get("tokenizer"), loading.get("device_map")
    trust_remote_code = loading.get("trust_remote_code", False)
    if dtype is not None and dtype not in DTYPES:
        raise SettingError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    directory = local_directory(path)
    adapter = adapter_config(directory)
    source = base_of(adapter, base) if adapter else directory
    check_files(directory, base=base)
    options: dict[str, Any] = {"dtype": DTYPES[dtype] if dtype else "auto", "weights_only": True}
    options |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # so that `_refuse_missing` can name them
    options |= {"device_map": device_map} if device_map else {}
    files = local_directory(source)
    with as_model_errors(source, files), _quiet(transformers):
        model, report = auto_class(files, trust_remote_code=trust_remote_code).from_pretrained(files, **options)
    _refuse_missing(report, source)
    if tokenizer is None:
        loaded_tokenizer = load_tokenizer(directory, source, trust_remote_code)
    else:
        remedy = "--tokenizer expects a directory with a tokenizer, or a Hub name."
        loaded_tokenizer = _tokenizer(str(tokenizer), trust_remote_code, remedy)
    prepare(loaded_tokenizer, loading.get("chat_template"), loading.get("date"), date_of_training(path))
    supervise(loaded_tokenizer, loading.get("supervise"), supervision_of_training(path))
    if adapter:
        with as_model_errors(directory):
            model = with_adapter(model, directory, loaded_tokenizer, adapter)
    _check_tokenizer(loaded_tokenizer, model, str(tokenizer or directory), source)
    if not device_map:
        model = model.to(_device(loading.get("device")))
    model.requires_grad_(False).eval()
    if next(model.parameters()).dtype != torch.float32 and next(model.parameters()).device.type == "cpu":
        logger.warning("%s is in 16 bits; on a CPU --dtype float32 is several times faster", path)
    loaded = LoadedModel(model=model, tokenizer=loaded_tokenizer, path=str(path), has_adapter=adapter is not None)
    special = {*loaded_tokenizer.all_special_ids}
    refuse_not_causal(loaded.base, str(path), loaded.device, special)
    refuse_other_logits(loaded, special)
    return loaded


def model_without_storage(path: str) -> Any:
    """The transformers model of a directory's configuration, on the meta device: modules and names alone.

    Raises:
        ModelError: The configuration is not that of a causal language model.
    """
    import transformers

    with as_model_errors(path), _quiet(transformers), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path)
        return auto_class(path).from_config(config).eval()


def directory_digest(path: str | Path, *, base: str | None = None) -> str:
    """sha256 of what decides a model's outputs: its weight files (names and bytes), its configuration, its base.

    A configuration counts by its content, not by its formatting or by the version of the library that wrote it. For
    `base`, see `load_model`.
    """
    directory = local_directory(path)
    check_model_files(directory)
    digest = hashlib.sha256()
    for file in weight_files(directory):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    for name in ("config.json", "adapter_config.json"):
        digest.update(_relevant_settings(Path(directory) / name))
    if adapter := adapter_config(directory):
        digest.update(directory_digest(base_of(adapter, base)).encode())
    return digest.hexdigest()


def _relevant_settings(file: Path) -> bytes:
    """A configuration without its formatting and without entries that do not change an output."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):  # there is none, or loading the model will report it
        return b""
    if not isinstance(content, dict):
        return b""
    relevant = {name: value for name, value in content.items() if name not in IRRELEVANT}
    return json.dumps(relevant, sort_keys=True).encode()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what decides an example's ids: the vocabulary, the merges and rules, the chat template."""
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr((tokenizer.chat_template, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()


def adapter_config(directory: str) -> dict[str, Any] | None:
    """An adapter's configuration; None if the directory holds none.

    A relative path of the base counts from the working directory, as it did in the training, else from the adapter.
    """
    file = Path(directory) / "adapter_config.json"
    if not file.exists():
        return None
    check_file(file)
    try:
        config = json.loads(file.read_text())
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(f"{file}: not the configuration of a peft adapter ({error!r})") from None
    if kind != "LORA":
        raise ModelError(f"{file}: a {kind} adapter; Whence reads LoRA adapters.")
    if (task := config.get("task_type")) not in (None, CAUSAL):
        raise ModelError(f"{file}: an adapter for the task {task}, not {CAUSAL}: Whence traces causal language models.")
    if not isinstance(base, str):
        raise ModelError(f"{file}: base_model_name_or_path is {base}; write the base model's directory or name there.")
    config = ADAPTER_DEFAULTS | config
    for name, kinds in ADAPTER_KINDS.items():
        items = config[name] if isinstance(config[name], list) else []
        if not isinstance(config[name], kinds) or not all(isinstance(item, str) for item in items):
            raise ModelError(f"{file}: not the configuration of a peft adapter ({name} is {str(config[name])[:60]!r})")
    beside = Path(directory) / base
    chosen = str(beside if not is_directory(base) and is_directory(beside) else base)
    return config | {"base_model_name_or_path": chosen}


def base_of(config: dict[str, Any], known: str | None = None) -> str:
    """Directory or Hub name of an adapter's base: `known` if that directory still exists, else the configuration's."""
    return known if known is not None and is_directory(known) else config["base_model_name_or_path"]


def check_files(path: str | Path, *, base: str | None = None) -> None:
    """Find a cut or garbled weight file before transformers fails on it, also among the files of an adapter's base.

    For `base`, see `load_model`.

    Raises:
        ModelError: A file is broken, or an adapter's base does not exist; the message names it.
        ChecksumError: `whence train` wrote the directory, and a file of it is damaged.
    """
    directory = local_directory(path)
    _check_directory(directory)
    if adapter := adapter_config(directory):
        source = base_of(adapter, base)
        try:
            _check_directory(local_directory(source))
        except ModelError as error:
            file = Path(directory) / "adapter_config.json"
            raise ModelError(f"{error} It is the base that {file} names: correct that file.") from None


def _check_directory(directory: str) -> None:
    import safetensors

    check_model_files(directory)
    files, is_adapter = weight_files(directory), (Path(directory) / "adapter_config.json").is_file()
    if not files:
        raise ModelError(missing_weights(directory, adapter=is_adapter))
    if not (is_adapter or (Path(directory) / "config.json").is_file()):
        raise ModelError(missing_configuration(directory))
    for file in files:
        is_torch = file.suffix == ".bin"
        try:
            if is_torch:
                torch.load(file, map_location="meta", weights_only=True)
                continue
            with safetensors.safe_open(file, "pt") as opened:
                opened.keys()
        except (safetensors.SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            kind = "torch file of tensors" if is_torch else "safetensors file"
            raise ModelError(f"{file}: not a readable {kind} ({reason}). Copy it again.") from None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' own bar and loading report on stderr; what matters in it is checked and raised."""
    level = transformers.logging.get_verbosity()
    has_bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if has_bar:
            transformers.logging.enable_progress_bar()


def _refuse_missing(report: dict[str, Any], path: str) -> None:
    """Refuse weights that a file lacks: transformers fills them at random, and gradients through them mean nothing."""
    missing = sorted(report.get("missing_keys") or ())
    mismatched = sorted((str(name), [*stored], [*made]) for name, stored, made in report.get("mismatched_keys") or ())
    if mismatched:
        name, stored, made = mismatched[0]
        raise ModelError(
            f"{path}: its weights are of a model of other sizes than its config.json describes: "
            f"{number_of(len(mismatched), 'weight has', 'weights have')} another shape (first: {name}, {stored} in the "
            f"file, {made} by config.json). Copy config.json and the weights from one model."
        )
    if missing:
        raise ModelError(
            f"{path}: its files lack {number_of(len(missing), 'weight')} that its config.json asks for (first: "
            f"{', '.join(missing[:3])}): it is not a complete causal language model. Copy config.json and all weight "
            "files from one model."
        )
    if unknown := sorted(report.get("unexpected_keys") or ()):
        logger.warning("%s: the model has no place for %d weights, %s first", path, len(unknown), unknown[0])


@one_at_a_time
def load_tokenizer(path: str | Path, fallback: str, trust_remote_code: bool) -> Any:
    """A directory's own tokenizer, or the fallback's if the directory has none."""
    has_own = is_directory(path) and any(Path(path).glob("tokenizer*"))
    source = str(path) if has_own or not is_directory(path) else _tokenizer_above(Path(path), fallback)
    return _tokenizer(source, trust_remote_code, "Save one there, or name one with --tokenizer.")


def _tokenizer(source: str, trust_remote_code: bool, remedy: str) -> Any:
    import transformers

    if is_directory(source):
        require_readable(source, MODEL_FILES)
        check_model_files(source)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, FOREIGN):  # tokenizers raises plain ones
            raise
        raise ModelError(f"{source}: no loadable tokenizer ({reason_of(error).removesuffix('.')}). {remedy}") from error
    tokenizer.model_max_length = 10**30  # Whence truncates by itself; this silences the warning about long rows
    return tokenizer


def _tokenizer_above(directory: Path, fallback: str) -> str:
    """The tokenizer beside a checkpoint, where a Trainer without `processing_class` saves it; else the fallback's."""
    parent = directory.parent
    return str(parent) if directory.name.startswith("checkpoint-") and any(parent.glob("tokenizer*")) else fallback


def _check_tokenizer(tokenizer: Any, model: Any, tokenizer_path: str, model_path: str) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = len(model.get_input_embeddings().weight)  # peft wraps an embedding whose tokens it trains
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {tokenizer_path} has ids up to {largest}, but the embedding of {model_path} has {rows} "
            "rows: they do not belong together. Name the right one with --tokenizer."
        )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
