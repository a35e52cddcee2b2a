"""Exact scores and token matrices equal those of gradients taken one at a time by plain autograd."""

import pytest
import torch

from conftest import random_examples, tiny_model
from whence.corpus.tokens import Encoded, collate
from whence.gradients import corpus_scores, exact, tokenwise
from whence.gradients.capture import OBJECTIVES, backward, gradients, squared_norms
from whence.gradients.exact import SignedSequence, inner_products
from whence.gradients.space import GradientSpace

BUDGET = 40  # tokens of a pass: several batches
SPACES = [(normalise, cosine) for normalise in ("none", "layer") for cosine in (False, True)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "lora", "twice"])  # linear, Conv1D with tied head, adapters
def loaded(request):
    if request.param != "twice":
        return tiny_model(request.param)
    model = tiny_model("llama")  # one block at both places, as in HRM
    model.base.model.layers[1] = model.base.model.layers[0]
    model.base.config.use_cache = False  # both would write into one place of it
    return model


@pytest.fixture(scope="module")
def traced(loaded):
    """With the output head, where there is one that is no adapter's neighbour."""
    return loaded.layers("*" if loaded.path == "gpt2" else None)


@pytest.fixture(scope="module")
def whole(loaded, traced):
    """One example's gradient by layer, taken once."""
    taken = {}

    def gradient(example, *, reduction="mean", objective="loss"):
        key = (*example.ids, *example.supervised, objective)
        if key not in taken:
            taken[key] = gradients(loaded, traced, collate([example]), reduction="sum", objective=objective)[0]
        return {name: x / (example.supervised_count if reduction == "mean" else 1) for name, x in taken[key].items()}

    return gradient


@pytest.fixture(scope="module")
def of_query(whole, traced):
    """A query's gradient by layer."""

    def gradient(sequences, **options):
        found = [whole(sequence.encoded, **options) for sequence in sequences]
        return {
            name: sum(sequence.sign * x[name] for sequence, x in zip(sequences, found, strict=True)) for name in traced
        }

    return gradient


def score(query, example, *, normalise="none", cosine=False):
    """By definition, in double precision, layer by layer."""
    pairs = [(query[name].double(), example[name].double()) for name in query]
    if normalise == "layer":
        unit = lambda x: x / x.norm() if x.norm() > 0 else x  # noqa: E731
        pairs = [(unit(x), unit(y)) for x, y in pairs]
    total = sum(float((x * y).sum()) for x, y in pairs)
    norms = [sum(float(side.square().sum()) for side in sides) ** 0.5 for sides in zip(*pairs, strict=True)]
    return total / (norms[0] * norms[1]) if cosine else total


def alone(example, place):
    """An example of which one token is supervised."""
    return Encoded(example.ids, [number == place for number in range(len(example.ids))])


def places_of(example):
    return [place for place, is_target in enumerate(example.supervised) if is_target]


def query_sequences(contrast):
    sequences = [SignedSequence(example) for example in random_examples(2, seed=5)]
    return [sequences[0], SignedSequence(sequences[1].encoded, sign=-1.0)] if contrast else sequences[:1]


@pytest.mark.parametrize("contrast", [False, True])
def test_scores_are_inner_products_of_whole_gradients(loaded, traced, whole, of_query, contrast):
    sequences, rows = query_sequences(contrast), random_examples(7, seed=6)
    query = exact.query_gradient(loaded, traced, sequences, GradientSpace(), "loss")
    inner = exact.layer_products(loaded, traced, query, rows, reduction="mean", tokens_per_batch=BUDGET)
    for normalise, cosine in SPACES:
        found = inner.scores(normalise=normalise, cosine=cosine)
        true = [score(of_query(sequences), whole(row), normalise=normalise, cosine=cosine) for row in rows]
        assert found.tolist() == pytest.approx(true, rel=1e-3, abs=1e-4 * max(map(abs, true)))


def test_lists_of_many_queries_share_one_pass_over_their_rows(loaded, traced, whole, of_query, monkeypatch):
    """A row of several lists is read once, and scored for the queries alone that ask for it."""
    queries, rows, read = [query_sequences(False), query_sequences(True)] * 2, random_examples(7, seed=6), []
    lists, real = [[0, 3, 5], [3, 5, 6], [], [0, 1, 3, 5, 6]], exact.batches

    def recorded(some, budget):
        read.extend(some)
        return real(some, budget)

    monkeypatch.setattr(exact, "batches", recorded)
    for held, (normalise, cosine) in [*((2**31, how) for how in SPACES), (1, ("none", True))]:
        monkeypatch.setattr(exact, "HELD_BYTES", held)
        space, read[:] = GradientSpace(normalise=normalise), []
        gradients = (exact.query_gradient(loaded, traced, sequences, space, "loss") for sequences in queries)
        found = exact.list_scores(
            loaded, traced, gradients, lists, dict(enumerate(rows)), space=space, cosine=cosine, tokens_per_batch=BUDGET
        )
        assert len(read) == (5 if held > 1 else sum(map(len, lists)))
        for sequences, numbers, scores in zip(queries, lists, found, strict=True):
            true = [
                score(of_query(sequences), whole(rows[number]), normalise=normalise, cosine=cosine)
                for number in numbers
            ]
            assert scores.tolist() == pytest.approx(true, rel=1e-3, abs=1e-4 * max(map(abs, true), default=0))


def test_products_by_gram_and_by_formed_gradients_are_the_same(loaded, traced, monkeypatch):
    queries = [exact.query_gradient(loaded, traced, query_sequences(contrast), GradientSpace(), "loss")
               for contrast in (False, True)]  # fmt: skip
    captured = []
    backward(loaded, traced, collate(random_examples(1, seed=6)), captured.append, whole=True)
    monkeypatch.setattr(exact, "FORMED_AT_ONCE", 1)
    for one in captured:
        held = exact.Queries(queries)
        formed_dots, formed_squares = held._formed_products(one)
        dots = [inner_products(one.a, one.g, *pair)[0] for pair in held.pairs[one.layer]]
        torch.testing.assert_close(torch.stack(dots), formed_dots, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(squared_norms(one.a, one.g), formed_squares, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("reduction", "objective"), [("mean", "loss"), ("sum", "margin")])
@pytest.mark.parametrize("held", [2**31, 1])  # every query in a pass of its own
def test_scores_of_a_corpus_are_the_same(loaded, traced, whole, of_query, reduction, objective, held, monkeypatch):
    monkeypatch.setattr(corpus_scores, "HELD_BYTES", held)
    rows = [*random_examples(5, seed=6), Encoded([1, 2], [False, False])]
    queries = [query_sequences(False), query_sequences(True)]
    for normalise, cosine in SPACES:
        space = GradientSpace(reduction=reduction, normalise=normalise)
        found = corpus_scores.corpus_scores(
            loaded, traced, queries, rows, space, cosine=cosine, objective=objective, tokens_per_batch=BUDGET
        )
        assert (found[:, -1] == -torch.inf).all(), "a row that supervises nothing has no score"
        for number, sequences in enumerate(queries):
            query = of_query(sequences, reduction=reduction, objective=objective)
            examples = [whole(row, reduction=reduction) for row in rows[:-1]]
            true = [score(query, example, normalise=normalise, cosine=cosine) for example in examples]
            assert found[number, :-1].tolist() == pytest.approx(true, rel=1e-3, abs=1e-4 * max(map(abs, true)))


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("basis", tokenwise.BASES)
def test_token_matrices_are_inner_products_of_single_tokens(
    loaded, traced, whole, of_query, contrast, basis, monkeypatch
):
    """Rows by their own gradients; columns of `loss` by theirs; and everything sums to the exact score."""
    monkeypatch.setitem(tokenwise.POSITIONS_AT_ONCE, "cpu", 8)  # several pieces
    monkeypatch.setitem(tokenwise.PRODUCTS_AT_ONCE, "cpu", 64)
    sequences, rows = query_sequences(contrast), random_examples(3, seed=6)
    tokens = tokenwise.tokens_of(sequences, "mean")
    matrices = [torch.zeros(len(tokens), len(row.ids) if basis == "position" else row.supervised_count) for row in rows]
    for group in tokenwise.token_groups(sequences, tokens, traced):
        some = [tokens[number] for number in group]
        examples, weights = tokenwise.token_rows(sequences, some), [token.weight for token in some]
        pairs = tokenwise.token_gradients(loaded, traced, examples, weights, objective="loss", tokens_per_batch=BUDGET)
        factors = torch.ones(len(traced), len(rows))
        found = tokenwise.token_products(
            loaded, traced, pairs, len(some), rows, factors, basis=basis, reduction="mean", tokens_per_batch=BUDGET
        )
        for matrix, part in zip(matrices, found, strict=True):
            matrix[group] += part
    ones = [whole(alone(sequences[token.sequence].encoded, token.place), reduction="sum") for token in tokens]
    singles = [{name: token.weight * x for name, x in one.items()} for token, one in zip(tokens, ones, strict=True)]
    for row, matrix in zip(rows, matrices, strict=True):
        total = score(of_query(sequences), whole(row))
        close = {"rel": 1e-3, "abs": 1e-4 * abs(total)}
        assert float(matrix.sum()) == pytest.approx(total, **close)
        assert matrix.sum(1).tolist() == pytest.approx([score(one, whole(row)) for one in singles], **close)
        if basis == "loss":
            own = [whole(alone(row, place), reduction="sum") for place in places_of(row)]
            for found, one in zip(matrix.tolist(), singles, strict=True):
                assert found == pytest.approx(
                    [score(one, gradient) / row.supervised_count for gradient in own], **close
                )


def test_positions_are_told_apart_by_hand(loaded, of_query):
    """Basis `position`: the example's gradient, restricted to one position's pairs at a time."""
    traced, (row,), sequences = loaded.layers(), random_examples(1, seed=9), query_sequences(False)
    pairs = exact.query_gradient(loaded, traced, sequences, GradientSpace(), "loss")
    factors = torch.ones(len(traced), 1)
    matrix = tokenwise.token_products(
        loaded, traced, pairs, 1, [row], factors, basis="position", reduction="mean", tokens_per_batch=BUDGET
    )[0]
    query, captured = of_query(sequences), []
    backward(loaded, traced, collate([row]), captured.append)
    for place in range(len(row.ids)):
        true = sum(
            float(torch.einsum("o,oi,i->", seen.g[0, place], query[seen.layer][0], seen.a[0, place]))
            for seen in captured
        )
        assert float(matrix[0, place]) == pytest.approx(true, rel=1e-3, abs=1e-5 * float(matrix.abs().max()) + 1e-9)


def test_groups_of_tokens_stay_within_the_budget_and_never_mix_sequences(traced, monkeypatch):
    sequences = query_sequences(True)
    tokens = tokenwise.tokens_of(sequences, "sum")
    monkeypatch.setattr(tokenwise, "HELD_BYTES", 1)
    assert list(tokenwise.token_groups(sequences, tokens, traced)) == [[number] for number in range(len(tokens))]
    monkeypatch.setattr(tokenwise, "HELD_BYTES", 2**31)
    groups = list(tokenwise.token_groups(sequences, tokens, traced))
    assert [{tokens[number].sequence for number in group} for group in groups] == [{0}, {1}]
    assert [number for group in groups for number in group] == list(range(len(tokens)))


def test_the_margin_is_the_log_odds(loaded):
    traced, (example,) = loaded.layers(), random_examples(1, seed=3)
    found, losses = gradients(loaded, traced, collate([example]), objective="margin", reduction="sum")
    places = places_of(example)
    weights = [layer.weight.requires_grad_() for layer in traced.values()]
    with torch.enable_grad():
        logits = loaded.model(input_ids=torch.tensor([example.ids])).logits[0].double()
        odds = sum(
            logits[t - 1].log_softmax(0)[example.ids[t]] - torch.log1p(-logits[t - 1].softmax(0)[example.ids[t]])
            for t in places
        )
        true = torch.autograd.grad(-odds, weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    largest = max(float(gradient.abs().max()) for gradient in true if gradient is not None)
    for (name, layer), gradient in zip(traced.items(), true, strict=True):
        shaped = found[name][0] if isinstance(layer, torch.nn.Linear) else found[name][0].T  # Conv1D keeps [i o]
        assert torch.allclose(shaped, gradient, rtol=1e-3, atol=1e-5 * largest)
    assert losses.nll[0, places].tolist() == pytest.approx(
        [-float(logits[t - 1].detach().log_softmax(0)[example.ids[t]]) for t in places], rel=1e-4
    )


def test_the_margins_slope_does_not_vanish_where_the_model_is_sure():
    logits, target, weight = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([0]), torch.ones(1)
    assert OBJECTIVES["margin"](logits, target, weight)[1].tolist() == [[-1.0, 0.5, 0.5]]
    assert OBJECTIVES["loss"](logits, target, weight)[1].abs().max() < 1e-16


def test_slopes_that_are_zero_are_not_held():
    """Of two tokens one reaches positions 1 to 3 (with a 0 among them), one reaches none."""
    a, g = torch.randn(5, 2), torch.zeros(2, 5, 3)
    g[0, 1], g[0, 3] = 2.0, 3.0
    pairs = exact.pairs_of(a, g, [4, 7], torch.tensor([0.5, 1.0]))
    assert pairs.spans == [(4, 1, 4), (7, 0, 0)]
    assert pairs.g.tolist() == [[1.0] * 3, [0.0] * 3, [1.5] * 3]
    (own, slopes), (nothing, _) = pairs.by_token()
    assert torch.equal(own, a[1:4])
    assert torch.equal(slopes, pairs.g)
    assert len(nothing) == 0


def test_rows_share_a_pass_where_little_is_padded():
    rows = random_examples(40, seed=2, longest=40)
    seen = []
    for numbers, batch in exact.batches(rows, 200):
        lengths = [len(rows[number].ids) for number in numbers]
        assert batch.ids.shape == (len(numbers), max(lengths))
        assert batch.ids.numel() <= 200
        assert min(lengths) >= 0.75 * max(lengths)
        seen += numbers
    assert sorted(seen) == list(range(40))
