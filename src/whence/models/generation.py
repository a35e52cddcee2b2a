"""Continuations of many prompts, greedy or sampled, by transformers' own `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from whence.errors import SettingError
from whence.models.loading import LoadedModel
from whence.numerics import mixed_seed
from whence.turns import one_at_a_time

PROMPTS_PER_BATCH = 64


@one_at_a_time
def generate(
    loaded: LoadedModel, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Continuations of many prompts, greedy unless there is a temperature.

    Only prompts of equal length share a batch, so that none is padded. A sampled prompt is a batch of its own, with its
    own random numbers. So no answer depends on the other prompts.

    Args:
        loaded: The model; its tokenizer says which token ends an answer.
        prompts: Token ids, as `corpus.tokens.encode_prompt` gives them.
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from the softmax of logits / temperature.
        seed: Seed of the drawn tokens; each prompt has its own random numbers, which depend on its token ids.

    Returns:
        The new tokens of each prompt, with the end-of-sequence token of an answer that ended.

    Raises:
        SettingError: A prompt has no token.
    """
    if not all(prompts):
        raise SettingError("a prompt has no token: there is nothing for the model to go on from")
    answers: list[list[int]] = [[] for _ in prompts]
    if temperature > 0:
        for number, prompt in enumerate(prompts):
            with torch.random.fork_rng():
                torch.manual_seed(mixed_seed(seed, "generate", *map(str, prompt)))
                ids = torch.tensor([prompt], device=loaded.device)
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                answers[number] = _continuations(loaded, ids, max_new_tokens, **sampling)[0]
        return answers
    for numbers in _equal_lengths(prompts):
        ids = torch.tensor([prompts[number] for number in numbers], device=loaded.device)
        for number, answer in zip(numbers, _continuations(loaded, ids, max_new_tokens), strict=True):
            answers[number] = answer
    return answers


def _equal_lengths(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Numbers of prompts, in batches of one length."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), PROMPTS_PER_BATCH):
            yield numbers[start : start + PROMPTS_PER_BATCH]


def _continuations(
    loaded: LoadedModel, ids: Int64[Tensor, "b t"], max_new_tokens: int, **sampling: Any
) -> list[list[int]]:
    end = loaded.tokenizer.eos_token_id
    with torch.inference_mode(), _without_generation_config(loaded.base):
        out = loaded.base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            **(sampling or {"do_sample": False}),
            pad_token_id=end,  # an answer that ended early is filled with these, and cut at the first
        )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@contextmanager
def _without_generation_config(base: Any) -> Iterator[None]:
    """Set the model's generation_config.json aside, whose beams or repetition penalty would not be greedy."""
    config = base.generation_config
    base.generation_config = type(config)()
    try:
        yield
    finally:
        base.generation_config = config
