"""A weight difference with an optimizer's doing undone: by hand, and against what AdamW really did."""

import pytest
import torch
from test_evidence import by_autograd, worded

from conftest import corpus_rows
from whence.corpus.tokens import encode
from whence.errors import SettingError
from whence.recovery.preconditioner import scale_of_rows, scaled, without_decay


def test_decay_is_taken_off_and_nothing_else():
    start = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([[0.0, 12.0]])}
    moved = {"a": torch.tensor([[0.0, 5.0], [-2.0, 0.0]]), "b": torch.tensor([[7.0, 0.0]])}  # orthogonal to theta_0
    target = {name: moved[name] + 0.25 * start[name] for name in start}
    found, share = without_decay(target, start)
    assert share == pytest.approx(0.25)
    for name in start:
        torch.testing.assert_close(found[name], moved[name])
    grown = {name: moved[name] - 0.25 * start[name] for name in start}
    kept, share = without_decay(grown, start)
    assert share == 0 and all(torch.equal(kept[name], grown[name]) for name in start), "weights that grew did not decay"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_scale_of_rows_is_that_of_single_gradients(architecture):
    model = worded(architecture)
    layers = model.layers()
    rows = [encode(row, model.tokenizer) for row in corpus_rows(5)]
    found = scale_of_rows(model, layers, rows, tokens_per_batch=64)
    names = {id(weight): name for name, weight in model.model.named_parameters()}
    squares, entries = {}, 0
    for name, module in layers.items():
        own = [by_autograd(model, row)[1][names[id(module.weight)]] for row in corpus_rows(5)]
        own = [part if isinstance(module, torch.nn.Linear) else part.T for part in own]
        squares[name] = torch.stack(own).square().mean((0, 2)).sqrt()
        entries += module.weight.numel()
    total = sum(float(part.mean()) * layers[name].weight.numel() for name, part in squares.items()) / entries
    for name, part in squares.items():
        torch.testing.assert_close(found[name][:, 0], part / total, rtol=1e-3, atol=1e-5)
    ones = {name: torch.ones(found[name].shape[0], 3) for name in found}
    assert all(torch.equal(part, found[name].expand(-1, 3)) for name, part in scaled(ones, found).items())


def test_nothing_supervised_is_told():
    model = worded("llama")
    rows = [encode({"prompt": "a", "completion": None}, model.tokenizer)]
    with pytest.raises(SettingError, match="none of 1 row has a supervised token"):
        scale_of_rows(model, model.layers(), rows)
