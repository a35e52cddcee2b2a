"""Continuations of many prompts, greedy or sampled, by transformers' own `generate`.

An answer ends where the model's own `generate` would end it: at any token of the list of ends in its
generation_config.json (or config.json), at the tokenizer's end-of-sequence token, and at the token with which its chat
template closes a turn. Chat models differ in which of these places has it. The rest of generation_config.json is set
aside, since with beams, penalties or suppressed tokens an answer would not be what the model finds likeliest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from whence.corpus.closings import closing_of
from whence.errors import SettingError
from whence.models.loading import LoadedModel
from whence.numerics import mixed_seed
from whence.turns import one_at_a_time

PROMPTS_PER_BATCH = 64

KEPT = ("eos_token_id", "stop_strings", "bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache",
        "max_length", "max_new_tokens", "transformers_version", "output_attentions", "output_hidden_states",
        "output_scores", "return_dict_in_generate", "cache_implementation")  # fmt: skip
"""Settings of a generation_config.json that are followed, or do not decide which token is taken."""

OnToken = Callable[[int, float], None]
"""Called with each token of an answer and its probability, as soon as it is chosen."""

LEAST_TEMPERATURE = 1e-6
"""Below it the likeliest token is as good as certain, and logits / temperature may leave the numbers' range."""
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that decide nothing in a greedy answer."""


@one_at_a_time
def generate(
    loaded: LoadedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continuations of many prompts, greedy unless there is a temperature.

    Only prompts of equal length share a batch, so that none is padded. A sampled prompt is a batch of its own, with its
    own random numbers. So no answer depends on the other prompts.

    Args:
        loaded: The model; see `ends_of` for the tokens that end an answer.
        prompts: Token ids, as `corpus.tokens.encode_prompt` gives them.
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token, and so does less than `LEAST_TEMPERATURE`; above, tokens are drawn
            from the softmax of logits / temperature.
        seed: Seed of the drawn tokens; each prompt has its own random numbers, which depend on its token ids.
        on_token: Of one prompt, called with each token as it is chosen; what it raises ends the answer.

    Returns:
        The new tokens of each prompt, with the token that ended it where one did.

    Raises:
        SettingError: A prompt has no token, or tokens of several prompts are to be told as they are chosen.
    """
    if not all(prompts):
        raise SettingError("a prompt has no token: there is nothing for the model to go on from")
    if on_token is not None and len(prompts) > 1:
        raise SettingError(f"{len(prompts)} prompts: tokens are told as they are chosen of one prompt alone")
    answers: list[list[int]] = [[] for _ in prompts]
    if temperature >= LEAST_TEMPERATURE:
        for number, prompt in enumerate(prompts):
            with torch.random.fork_rng():
                torch.manual_seed(mixed_seed(seed, "generate", *map(str, prompt)))
                ids = torch.tensor([prompt], device=loaded.device)
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                answers[number] = _continuations(loaded, ids, max_new_tokens, on_token, **sampling)[0]
        return answers
    for numbers in _equal_lengths(prompts, 1 if _stop_strings(loaded) else PROMPTS_PER_BATCH):
        ids = torch.tensor([prompts[number] for number in numbers], device=loaded.device)
        for number, answer in zip(numbers, _continuations(loaded, ids, max_new_tokens, on_token), strict=True):
            answers[number] = answer
    return answers


def ends_of(loaded: LoadedModel) -> list[int]:
    """Tokens that end an answer: those of the model's own list, the tokenizer's, and its chat template's; see above."""
    tokenizer, base = loaded.tokenizer, loaded.base
    sources = (base.generation_config, base.config, base.config.get_text_config())
    own = next((ends for source in sources if (ends := getattr(source, "eos_token_id", None)) is not None), None)
    ends = [*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id]
    if tokenizer.chat_template:
        ends.append(closing_of(tokenizer, "messages").end(tokenizer))
    return sorted({int(end) for end in ends if end is not None and end >= 0})


def set_aside(loaded: LoadedModel, *, greedy: bool = True) -> list[str]:
    """Settings of the model's generation_config.json that are not followed, such as "repetition_penalty 1.1".

    Args:
        loaded: The model.
        greedy: Leave out those that decide nothing in a greedy answer.
    """
    others = loaded.base.generation_config.to_diff_dict()
    ignored = (*KEPT, *(SAMPLING if greedy else ()))
    return [
        f"{name} {value}"
        for name, value in others.items()
        if name not in ignored and not name.startswith("_") and value not in (None, False, {}, [])
    ]


def _stop_strings(loaded: LoadedModel) -> Any:
    return getattr(loaded.base.generation_config, "stop_strings", None)


def _equal_lengths(prompts: list[list[int]], most: int) -> Iterator[list[int]]:
    """Numbers of prompts, in batches of one length and at most so many."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


class _Telling(LogitsProcessor, BaseStreamer):
    """Tells each token of an answer with its probability: before it is chosen it has the logits, then the token."""

    def __init__(self, on_token: OnToken):
        self.on_token = on_token
        self.logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the logits of the next token, and change none."""
        self.logits = scores[0]
        return scores

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token that was chosen."""
        if self.logits is not None:
            token = int(value.flatten()[-1])
            self.on_token(token, float(self.logits.float().softmax(0)[token]))

    def end(self) -> None:
        """Do nothing: the answer is returned too."""


def _continuations(
    loaded: LoadedModel,
    ids: Int64[Tensor, "b t"],
    max_new_tokens: int,
    on_token: OnToken | None = None,
    **sampling: Any,
) -> list[list[int]]:
    ends, stops = ends_of(loaded), _stop_strings(loaded)
    stopping = {"stop_strings": stops, "tokenizer": loaded.tokenizer} if stops else {}
    if on_token is not None:
        telling = _Telling(on_token)
        stopping |= {"logits_processor": LogitsProcessorList([telling]), "streamer": telling}
    with torch.inference_mode(), _without_generation_config(loaded.base):
        out = loaded.base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            **(sampling or {"do_sample": False}),
            **stopping,
            pad_token_id=ends[0] if ends else None,  # an answer that ended early is filled with these, and cut
        )
    return [_through_end(row, ends) for row in out[:, ids.shape[1] :].tolist()]


def _through_end(answer: list[int], ends: list[int]) -> list[int]:
    place = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return answer[: place + 1]


@contextmanager
def _without_generation_config(base: Any) -> Iterator[None]:
    """Set the model's generation_config.json aside; what is followed of it is given by name."""
    config = base.generation_config
    base.generation_config = type(config)()
    try:
        yield
    finally:
        base.generation_config = config
