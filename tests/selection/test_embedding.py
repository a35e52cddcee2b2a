"""RDS and RDS+, and the forward passes that they share with other scorers."""

import logging
import math

import pytest
import torch
from small_views import Tokens, each, ids_alone

from conftest import ARCHITECTURES, random_examples, tiny_model
from whence.corpus.tokens import Encoded
from whence.errors import ModelError
from whence.gradients import forward_passes as passes
from whence.gradients.forward_passes import (
    embeddings,
    even_weights,
    last_token_weights,
    losses,
    pooled,
    position_weights,
)
from whence.selection.protocols import QueryText, Target
from whence.selection.scorers.embedding import RDS, RDSPlus


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embedding_equals_a_loop_over_rows_and_positions(architecture):
    model = tiny_model(architecture)
    rows, asked = random_examples(7, seed=1), random_examples(3, seed=2)

    def states(example):
        return model.decode(torch.tensor([example.ids]), torch.ones(1, len(example.ids), dtype=torch.bool))[0][0]

    def weighted(example):
        total = sum(range(1, len(example.ids) + 1))
        return sum(state * (place / total) for place, state in enumerate(states(example), start=1))

    for scorer, vector in ((RDSPlus(), weighted), (RDS(), lambda example: states(example)[-1])):
        expected = [[torch.cosine_similarity(vector(q), vector(row), dim=0) for row in rows] for q in asked]
        scores = scorer(Tokens(rows, model), each([ids_alone(example) for example in asked]))
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embedding_does_not_depend_on_batch_mates_and_padding(architecture):
    model, rows = tiny_model(architecture), random_examples(12, seed=1)
    targets = each([ids_alone(example) for example in random_examples(3, seed=2)])
    for scorer in (RDS(), RDSPlus()):
        alone, together = (scorer(Tokens(rows, model, size), targets) for size in (1, 10_000))
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_embedding_does_not_depend_on_windows(monkeypatch):
    model, rows = tiny_model("llama"), random_examples(11, seed=1)
    rows[4] = Encoded([], [])
    targets = each([ids_alone(example) for example in random_examples(2, seed=2)])
    whole = RDSPlus()(Tokens(rows, model), targets)
    monkeypatch.setattr(passes, "ROWS_PER_WINDOW", 3)
    torch.testing.assert_close(RDSPlus()(Tokens(rows, model), targets), whole)


def test_rows_without_an_embedding_score_minus_infinity_and_leave_the_others_alone():
    """A token whose embedding is NaN, one whose embedding is infinite, and a row of no tokens."""
    model, rows = tiny_model("llama"), random_examples(8, seed=1, longest=9)
    rows = [Encoded([1 + i % 50 for i in row.ids], row.supervised) for row in rows]
    targets = each([ids_alone(rows[0]), ids_alone(rows[3])])
    expected = RDSPlus()(Tokens(rows, model), targets)
    weight = model.base.get_input_embeddings().weight
    weight[59], weight[60] = math.nan, math.inf
    broken = [*rows, Encoded([3, 59, 4], [False, True, True]), Encoded([60, 5], [False, True]), Encoded([], [])]
    scores = RDSPlus()(Tokens(broken, model), targets)
    torch.testing.assert_close(scores[:, :8], expected, rtol=1e-4, atol=1e-5)
    assert scores[:, 8:].tolist() == [[-math.inf] * 3] * 2


@pytest.mark.parametrize(
    "ids, reason", [([], "it has no token"), ([3, 60], "the model's states for it are not finite")]
)
def test_query_without_an_embedding_is_refused(ids, reason):
    model = tiny_model("llama")
    model.base.get_input_embeddings().weight[60] = math.nan
    with pytest.raises(ModelError, match=f"target 'query 0', query 'why': {reason}"):
        RDSPlus()(
            Tokens(random_examples(3, seed=1), model), each([QueryText("why", "", Encoded(ids, [False] * len(ids)))])
        )


def test_query_without_an_embedding_does_not_spoil_its_target(caplog):
    """In LESS's code one NaN among a subtask's examples makes every score NaN, and NaN sorts first."""
    model, rows = tiny_model("llama"), random_examples(8, seed=1, longest=9)
    rows = [Encoded([1 + i % 50 for i in row.ids], row.supervised) for row in rows]
    good = [ids_alone(rows[0]), ids_alone(rows[3])]
    expected = RDSPlus()(Tokens(rows, model), [Target("task", good), Target("other", good[:1])])
    model.base.get_input_embeddings().weight[60] = math.nan
    bad = [ids_alone(Encoded([3, 60], [False, True])), ids_alone(Encoded([], []))]
    targets = [Target("task", [bad[0], *good, bad[1]]), Target("other", good[:1])]
    with caplog.at_level(logging.WARNING):
        scores = RDSPlus()(Tokens(rows, model), targets)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert caplog.messages == ["target 'task': 2 of 4 queries have no finite states and do not count"]


def test_pooling_ignores_whatever_stands_at_padding():
    states = torch.tensor([[[1.0, 0.0], [4.0, 3.0], [math.nan, math.inf]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(pooled(states, mask, position_weights), torch.tensor([[3.0, 2.0], [1.0, 1.0]]))
    torch.testing.assert_close(pooled(states, mask, even_weights), torch.tensor([[2.5, 1.5], [1.0, 1.0]]))
    torch.testing.assert_close(pooled(states, mask, last_token_weights), torch.tensor([[4.0, 3.0], [1.0, 1.0]]))


def test_embeddings_are_pooled_in_fp32_and_without_gradients():
    """A sum of bfloat16 ones stops at 256; the weighted mean of 1000 equal states is that state."""
    states = torch.full((1, 1000, 4), 1.5, dtype=torch.bfloat16)
    found = pooled(states, torch.ones(1, 1000, dtype=torch.bool), position_weights)
    torch.testing.assert_close(found, torch.full((1, 4), 1.5))
    model = tiny_model("llama")
    model.model.to(torch.bfloat16).requires_grad_(True)
    ((numbers, vectors),) = embeddings(model, random_examples(2, seed=0), 1000, even_weights)
    assert sorted(numbers) == [0, 1]
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad


@pytest.mark.parametrize("tokens_per_batch", [1, 60])
def test_losses_are_those_of_each_row_alone(tokens_per_batch):
    model, rows = tiny_model("llama"), random_examples(9, seed=1)
    rows[3], rows[6] = Encoded([], []), Encoded([5, 6, 7], [False] * 3)
    found = torch.full((9,), 7.0)
    for numbers, some in losses(model, rows, tokens_per_batch):
        found[numbers] = some
    for number, row in enumerate(rows):
        if number in (3, 6):
            continue
        log_p = model.model(torch.tensor([row.ids])).logits[0].log_softmax(1)
        each_token = [-log_p[t - 1, row.ids[t]] for t in range(len(row.ids)) if row.supervised[t]]
        torch.testing.assert_close(found[number], sum(each_token) / len(each_token), rtol=1e-4, atol=1e-5)
    assert found[3] == 7
    assert found[6].isnan()
