"""Expected overlaps against those that happen, over many sketches of the same exact scores."""

import pytest
import torch

from conftest import corpus_rows
from whence.indexing.build import index
from whence.tracing.pipeline import trace
from whence.tracing.stability import margins, moments, under_checkpoints, under_noise


def overlap(one, other):
    return len({*one.tolist()} & {*other.tolist()}) / len(one)


@pytest.mark.parametrize("tails", ["normal", "heavy"])
@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("m", [3, 10])
def test_what_is_expected_is_what_happens_within_a_twentieth(tails, spread, m):
    rng, n = torch.Generator().manual_seed(1), 1500
    found, happened = [], []
    for _ in range(60):
        exact = torch.randn(n, generator=rng)
        if tails == "heavy":
            exact = exact * torch.randn(3, n, generator=rng).square().mean(0).rsqrt()
        exact = spread * exact
        sketches = exact + torch.randn(8, n, generator=rng)
        first, *others = (scores.topk(m).indices for scores in sketches)
        candidates = sketches[0].topk(400).values
        stability = under_noise(candidates, torch.ones(400), m)
        found.append((stability.exact, stability.sketch))
        again = sum(overlap(first, other) for other in others) / len(others)
        happened.append((overlap(first, exact.topk(m).indices), again))
    expected, real = (torch.tensor(pairs).mean(0) for pairs in (found, happened))
    assert (expected - real).abs().max() < 0.08, (expected, real)  # 60 rankings: a real share is known to .03
    assert abs(float((expected - real)[1])) < 0.06


def test_moments_of_normal_scores_are_those_of_a_normal_posterior():
    rng = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(20_000, generator=rng) + torch.randn(20_000, generator=rng)).sort(descending=True).values
    some = scores[::40]
    mean, variance = moments(some, torch.ones(len(some)))
    middle = some.abs() < 4
    torch.testing.assert_close(mean[middle], 0.9 * some[middle], atol=0.2, rtol=0)
    assert 0.7 < float(variance[middle].mean()) <= 1.0


def test_scores_without_noise_stand():
    stability = under_noise(torch.arange(50.0, 0, -1), torch.full((50,), 1e-6), 5)
    assert (stability.exact, stability.sketch, stability.checkpoints) == (1.0, 1.0, None)
    assert under_noise(torch.zeros(0), torch.zeros(0), 5).exact is None


def test_checkpoints_that_agree_stand_and_those_that_do_not_fall_by_the_draw():
    same = torch.arange(6.0).expand(3, 6)
    assert under_checkpoints(same, 2).checkpoints == 1.0
    apart = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    """Both draws of the first, or one of each: row 0 leads; both of the second, a quarter of the draws: row 1."""
    assert under_checkpoints(apart, 1).checkpoints == pytest.approx(0.75, abs=0.06)
    assert under_checkpoints(same[:1], 2).checkpoints is None


@pytest.mark.parametrize("tails", ["normal", "heavy"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_margins_hold_the_exact_scores_of_rows_chosen_for_being_high(tails, spread):
    rng, n, m, inside = torch.Generator().manual_seed(1), 800, 10, []
    for _ in range(100):
        exact = torch.randn(n, generator=rng)
        if tails == "heavy":
            exact = exact * torch.randn(3, n, generator=rng).square().mean(0).rsqrt()
        exact = spread * exact
        noise = 0.5 + torch.rand(n, generator=rng)
        scores = exact + noise * torch.randn(n, generator=rng)
        shown = torch.cat([scores.topk(m).indices, (-scores).topk(m).indices])
        inside.append(((scores - exact).abs()[shown] <= margins(noise[shown], len(shown), n)).float().mean())
    assert 0.93 < float(torch.stack(inside).mean()) <= 1


def test_margins_of_rows_that_were_not_chosen_are_those_of_one_alone():
    torch.testing.assert_close(margins(torch.tensor([1.0, 2.0]), 2, 2), torch.tensor([1.96, 3.92]), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def built(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("stability") / "index"
    return index(tiny_run, corpus_rows(60), out, width=512, checkpoints="all", progress=False)


def test_a_trace_says_how_much_of_it_would_stand(built):
    asked = ("5 and 3?", " yes, 12")
    by_index = trace(built, *asked, top=5, exact=False)
    (stability,) = by_index.stabilities
    assert 0 < stability.sketch <= stability.exact <= 1 and stability.checkpoints is None
    (exact,) = trace(built, *asked, top=5, exact=True).stabilities
    assert exact.sketch is None and 0 < exact.checkpoints <= 1
    assert trace(built, *asked, top=5, method="bm25").stabilities == []


def test_a_trace_says_how_far_off_a_score_may_be(built, command):
    """By the sketch's error, where the index ranks by what the error is of."""
    asked = ("5 and 3?", " yes, 12")
    by_index, exact = (trace(built, *asked, top=60, exact=is_exact) for is_exact in (False, True))
    true = {hit.id: hit.exact for hit in exact.hits}
    inside = [abs(hit.score - true[hit.id]) <= hit.margin for hit in by_index.hits]
    assert sum(inside) >= 0.9 * len(inside) and all(hit.margin > 0 for hit in by_index.hits)
    assert by_index.hits[0].as_row()["margin"] == by_index.hits[0].margin
    others = {"exact": True}, {"method": "bm25"}, {"exact": False, "specific": True}
    assert all(trace(built, *asked, **options).hits[0].margin is None for options in others)
    words = "trace", built.store.place.root, "--prompt", asked[0], "--completion", asked[1]
    shown = " ".join(command(*words, "--no-exact")[1].split())
    assert "\u00b1" in shown and "The exact score lies within \u00b1 of what is shown, 19 of 20 times." in shown
