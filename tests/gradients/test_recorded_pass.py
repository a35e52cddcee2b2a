"""What is recorded of a pass equals the ghost's own pass, and the recording changes no bit of it."""

import pytest
import torch
import torch.nn.functional as F
from test_ghost import MORE, made, random_direction

from conftest import ARCHITECTURES, random_examples
from whence.corpus.tokens import collate
from whence.errors import ModelError
from whence.gradients.ghost import owners_of, per_example_dot
from whence.gradients.recorded_pass import RecordedPass


def trained(model, batch):
    """A training's own pass: logits at every position, the mean loss over the batch's supervised tokens."""
    model.model.requires_grad_(True)
    logits = model.model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[:, :-1]
    labels = batch.ids.masked_fill(~batch.supervised, -100)[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    weights = dict(model.model.named_parameters())
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    model.model.requires_grad_(False)
    return dict(zip(weights, gradients, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE)
def test_equals_the_ghosts_own_pass_and_changes_no_bit(architecture):
    model, batch = made(architecture), collate(random_examples(5, seed=1))
    direction = random_direction(model)
    alone = trained(model, batch)
    recorded = RecordedPass(owners_of(model, direction), batch)
    with recorded.recording():
        gradients = trained(model, batch)
    assert all(
        gradients[name] is None if alone[name] is None else torch.equal(gradients[name], alone[name]) for name in alone
    )
    assert not any(module._forward_hooks for module in model.model.modules())
    expected = per_example_dot(model, batch, direction, reduction="sum").total / batch.supervised.sum()
    torch.testing.assert_close(recorded.dots(direction), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_dots_with_the_gradient_add_up_to_its_square():
    model, batch = made("gpt2"), collate(random_examples(4, seed=2))
    recorded = RecordedPass(owners_of(model, random_direction(model)), batch)
    with recorded.recording():
        gradients = trained(model, batch)
    square = sum(part.double().square().sum() for part in gradients.values())
    assert recorded.dots(gradients).double().sum().item() == pytest.approx(square.item(), rel=1e-5)


def test_a_pass_without_gradients_is_not_recorded():
    model, batch = made("llama"), collate(random_examples(3, seed=3))
    recorded = RecordedPass(owners_of(model, random_direction(model)), batch)
    with recorded.recording(), torch.no_grad():
        model.model(input_ids=batch.ids)
    assert recorded.records == []


def test_what_cannot_be_told_apart_is_refused():
    model, batch = made("opt"), collate(random_examples(3, seed=4))
    name = next(name for name in random_direction(model) if "embed_positions" in name)
    recorded = RecordedPass(owners_of(model, random_direction(model, [name])), batch)
    with recorded.recording(), pytest.raises(ModelError, match="reads more than its input"):
        trained(model, batch)
    model = made("llama")
    recorded = RecordedPass(owners_of(model, random_direction(model, ["lm_head.weight"])), batch)
    with recorded.recording(), pytest.raises(ModelError, match=r"called on 2 positions of a batch of 3 x"):
        model.base.lm_head(torch.zeros(2, 16))
