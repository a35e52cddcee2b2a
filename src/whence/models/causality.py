"""Is a model causal, and does every row of a batch stand for itself? Forward passes of a few tokens decide.

Two rows of a batch begin with the same tokens. The first goes on, the second is padded. A causal model gives both, and
the first alone, the same logits at the common tokens, and the same inputs to every linear layer: what comes after must
not matter, nor padding, nor the other row. Where logits differ, the model sees answers before it gives them (encoders
without `is_decoder`) or mixes rows, and is refused. Where only a layer's inputs differ, it lays positions out by time
first or mixes them, so that hooks could not tell whose they are: the layer is refused when it is traced.

Differences are root mean squares, relative to the spread of what is compared. fp32 rounds by 1e-6. Rounding in 16 bits
can send a token to another expert, which moves that token and those after it: there all tokens have to differ.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from whence.errors import ModelError
from whence.models.layers import is_linear
from whence.numerics import inverse_or_zero

COMMON, MORE = 5, 3
"""Tokens with which both rows begin, and with which the first goes on."""
TOLERANCE, TOLERANCE_16_BITS, TOLERANCE_OF_INPUTS_16_BITS = 1e-3, 0.02, 0.3
"""Largest relative differences, of logits and of a layer's inputs."""
ATTEMPTS = 3
"""Choices of tokens that must all give a difference for a model to be refused."""

_NOT_BY_EXAMPLE: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Linear layers whose positions do not come example by example."""
_UNREACHED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Linear layers that no text reaches."""


def refuse_not_causal(model: Any, path: str, device: torch.device, special: set[int]) -> None:
    """Refuse a model of transformers whose logits at a token depend on later tokens, or on other rows.

    Args:
        model: In evaluation mode.
        path: Where it is from, for the message.
        device: Device of its embedding.
        special: Ids of special tokens, which are not used.

    Raises:
        ModelError: They do, or the model does not run on token ids alone.
    """
    seen = ""
    for attempt in range(ATTEMPTS):
        ids = _ordinary_ids(model, special, attempt).to(device)
        if len(ids) < COMMON + MORE or not (seen := _later_tokens_seen(model, path, ids)):
            return
    raise ModelError(seen)


@torch.no_grad()
def refuse_other_logits(model: Any, special: set[int]) -> None:
    """Refuse a `LoadedModel` whose logits are not what its head makes of its decoder's last states, as ProphetNet's.

    Raises:
        ModelError: They are not.
    """
    ids = _ordinary_ids(model.base, special, 0).to(model.device)[None]
    if not ids.numel():
        return
    message = (
        f"{model.path}: this {type(model.base).__name__} makes its logits of more than its decoder's last states, and "
        "cannot be traced. Give another model."
    )
    try:
        states, head = model.decode(ids, torch.ones_like(ids))
        logits = head(states[0]).float()
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise ModelError(message) from error
    tolerance = TOLERANCE if states.dtype == torch.float32 else TOLERANCE_OF_INPUTS_16_BITS
    whole = _logits(model.base, model.path, ids, torch.ones_like(ids))[0]
    if _differences(logits, whole.to(logits.device)).mean() > tolerance:
        raise ModelError(message)


def _later_tokens_seen(model: Any, path: str, ids: Int64[Tensor, " t"]) -> str:
    """What is wrong, as a message; empty if what follows common tokens moves no logits."""
    is_wide = next(model.parameters()).dtype == torch.float32
    tolerance, worst = (TOLERANCE, torch.amax) if is_wide else (TOLERANCE_16_BITS, torch.amin)
    rows = torch.stack([ids, torch.cat([ids[:COMMON], torch.zeros_like(ids[COMMON:])])])
    mask = torch.ones_like(rows)
    mask[1, COMMON:] = 0
    with _layers_watched(model, TOLERANCE if is_wide else TOLERANCE_OF_INPUTS_16_BITS), _calls_watched(model, rows):
        logits = _logits(model, path, rows, mask)[:, :COMMON]
    whole = _logits(model, path, rows[:1], mask[:1])
    others = logits[1], whole[0, :COMMON]  # PaliGemma is causal beside a padded row, and alone it is not
    if not any(worst(_differences(logits[0], other)) > tolerance for other in others):  # NaN is seen row by row, later
        return ""
    kind = f"{path}: this {type(model).__name__}"
    cut = _logits(model, path, rows[:1, :COMMON], mask[:1, :COMMON])
    if worst(_differences(whole[0, :COMMON], cut[0])) > tolerance:
        return f"{kind} is not causal: tokens see those after them, and so the answer. {_remedy(model, path)}"
    return (
        f"{kind} gives a row other numbers beside other rows or padding, so its gradients cannot be told apart by "
        "example. Give another model."
    )


_CHECKED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models of which a padded row has been compared with the same row alone."""


@torch.no_grad()
def refuse_dependent_rows(model: Any, batch: Any, states: Float[Tensor, "b t d"]) -> None:
    """Compare a row of the first padded batch with the same row alone: neither other rows nor padding may matter.

    `refuse_not_causal` does so with a few tokens; an attention that chooses tokens shows it only with more.

    Args:
        model: A `LoadedModel`.
        batch: The batch.
        states: Its last states.

    Raises:
        ModelError: They do matter.
    """
    lengths = batch.mask.sum(1)
    padded = lengths.masked_fill(lengths == batch.mask.shape[1], 0)
    row, length = int(padded.argmax()), int(padded.max())
    if model.model in _CHECKED or not length:
        return
    _CHECKED.add(model.model)
    alone, _ = model.decode(batch.ids[row : row + 1, :length], batch.mask[row : row + 1, :length])
    tolerance = TOLERANCE if states.dtype == torch.float32 else TOLERANCE_OF_INPUTS_16_BITS
    if _differences(states[row, :length].detach(), alone[0].to(states.device)).mean() > tolerance:
        raise ModelError(
            f"{model.path}: this {type(model.base).__name__} gives a row other numbers beside longer rows. Pass "
            "one row at a time: --batch-tokens 2"
        )


def not_by_example(layer: nn.Module) -> bool:
    """Whether a layer's positions do not come example by example, as `refuse_not_causal` saw them."""
    return layer in _NOT_BY_EXAMPLE


def is_unreached(layer: nn.Module) -> bool:
    """Whether no text reaches a layer, as `refuse_not_causal` saw it: one of a vision tower, or of cross-attention."""
    return layer in _UNREACHED


def _remedy(model: Any, path: str) -> str:
    config = model.config.get_text_config()
    switch = next((name for name in ("is_decoder", "causal") if getattr(config, name, None) is False), None)
    if switch is None:
        return "Give a causal model."
    return f'If it was trained to be causal, set "{switch}": true in {path}/config.json; else give another.'


def _ordinary_ids(model: Any, special: set[int], attempt: int) -> Int64[Tensor, " t"]:
    """Different ids, spread over the vocabulary, that are none of a special token, an image or the like."""
    config = model.config.get_text_config()
    named = {
        value for name, value in config.to_dict().items() if name.endswith(("_id", "_index")) and value is not None
    }
    apart = special | {value for value in named if isinstance(value, int)}
    rows = model.get_input_embeddings().weight.shape[0]
    ordinary = [row for row in range(min(rows, 1000)) if row not in apart]
    step = max(1, len(ordinary) // (COMMON + MORE))
    return torch.tensor(ordinary[attempt % step :: step][: COMMON + MORE], dtype=torch.int64)


@torch.no_grad()
def _logits(model: Any, path: str, ids: Tensor, mask: Tensor) -> Float[Tensor, "b t v"]:
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: this {type(model).__name__} does not run on token ids alone ({reason})") from error


def _differences(one: Float[Tensor, "t d"], other: Float[Tensor, "t d"]) -> Float[Tensor, " t"]:
    """Root mean square of the difference at each position, over the spread of all; 0 if there is no spread."""
    spread = one.float().std(unbiased=False)
    return (one - other).float().square().mean(-1).sqrt() * inverse_or_zero(spread)


@contextmanager
def _layers_watched(model: nn.Module, tolerance: float) -> Iterator[None]:
    """Note linear layers whose inputs, parted by example, differ between the two rows at the common tokens."""

    def compare(module: nn.Module, args: tuple[Any, ...]) -> None:
        a = args[0] if args and isinstance(args[0], Tensor) else None
        if a is not None and a.shape[:-1].numel() == 2 * (COMMON + MORE):
            first, second = a.reshape(2, COMMON + MORE, -1)[:, :COMMON].flatten(2)
            if _differences(first, second).mean() > tolerance:
                _NOT_BY_EXAMPLE.add(module)

    hooks = [module.register_forward_pre_hook(compare) for module in model.modules() if is_linear(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _calls_watched(model: nn.Module, ids: Int64[Tensor, "b t"]) -> Iterator[None]:
    """Note linear layers of the parts that a pass over token ids does not call: towers, cross-attention.

    An expert is such a part too if no token chose it, but then others of its kind in its list are called. A weight can
    be used without a call of its layer (Mamba); so a layer counts as unreached only in a part that has a `forward` of
    its own, and if the logits' graph does not hold its weight.
    """
    called = {model}
    hooks = [module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    suspects = {module for part in _uncalled_parts(model, called) for module in part.modules() if is_linear(module)}
    weights: list[Any] = [module.weight for module in suspects]
    weights = [weight for weight in weights if weight.is_floating_point()]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        is_used = model(input_ids=ids, use_cache=False).logits.requires_grad if suspects else False
        for weight in weights:
            weight.requires_grad_(False)
    if not is_used:
        _UNREACHED.update(suspects)


def _uncalled_parts(module: nn.Module, called: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules that have parts, and are called neither themselves nor in part; no experts of a list."""
    lists = nn.ModuleList | nn.ModuleDict
    kinds = {type(child) for child in module.children() if child in called} if isinstance(module, lists) else set()
    for child in module.children():
        if not isinstance(child, lists) and called.isdisjoint(child.modules()):
            if any(child.children()) and type(child) not in kinds:
                yield child
        else:
            yield from _uncalled_parts(child, called)
