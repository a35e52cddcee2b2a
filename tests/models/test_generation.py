"""Tokens of an answer are told as they are chosen, with the model's own probability of each."""

from dataclasses import replace

import pytest
import torch

from conftest import tiny_model
from tiny_tokenizers import byte_level
from whence.errors import SettingError
from whence.models.generation import generate


@pytest.fixture(scope="module")
def loaded():
    return replace(tiny_model("llama"), tokenizer=byte_level())


def chances(loaded, ids):
    """The model's probability of each token after the first, from one pass."""
    logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].float().softmax(-1)
    return [float(logits[place - 1, ids[place]]) for place in range(1, len(ids))]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_each_token_is_told_with_its_probability(loaded, temperature):
    prompt, told = [3, 4, 5], []
    how = {"temperature": temperature, "seed": 2}
    (answer,) = generate(loaded, [prompt], 6, **how, on_token=lambda token, p: told.append((token, p)))
    assert answer == generate(loaded, [prompt], 6, **how)[0], "telling changes nothing"
    assert [token for token, _ in told] == answer
    expected = chances(loaded, prompt + answer)[len(prompt) - 1 :]
    assert [p for _, p in told] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [5e-324, 1.1754943508222875e-38, 1e-9])
def test_a_temperature_that_no_number_can_be_divided_by_takes_the_likeliest_token(loaded, temperature):
    assert generate(loaded, [[3, 4, 5]], 6, temperature=temperature) == generate(loaded, [[3, 4, 5]], 6)


def test_what_is_raised_ends_the_answer(loaded):
    told = []

    def stop(token, p):
        told.append(token)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(loaded, [[3, 4, 5]], 6, on_token=stop)
    assert len(told) == 2


def test_tokens_are_told_of_one_prompt(loaded):
    with pytest.raises(SettingError, match="of one prompt alone"):
        generate(loaded, [[3], [4]], 2, on_token=lambda token, p: None)
