"""Probabilities where the model's recipe was not the shadow's: log odds whose truth is known."""

import pytest
import torch

from whence.recovery.recalibration import recalibrated

SHADOW_OTHERS, SHADOW_MEMBERS = -8.0, 5.0


def drawn(others, members, *, seed, place=SHADOW_OTHERS, separation=1.0, scale=1.0, members_scale=1.0):
    """Log odds with a tail to the right, as a shadow's others have, and whether each is a member's."""
    rng = torch.Generator().manual_seed(seed)
    tail = torch.empty(others).exponential_(generator=rng)
    null = place + scale * (1.5 * torch.randn(others, generator=rng) + tail)
    gap = (SHADOW_MEMBERS - SHADOW_OTHERS) * separation
    own = place + gap + members_scale * 3 * torch.randn(members, generator=rng)
    return torch.cat([null, own]).double(), torch.arange(others + members) >= others


def fitted(z, *, share=0.1, shadow=9, is_share_known=False):
    odds, is_member = drawn(1350, 150, seed=shadow)
    return recalibrated(z, odds[~is_member], odds[is_member], share=share, is_share_known=is_share_known, distance=1.0)


@pytest.mark.parametrize(
    ("recipe", "members"),
    [
        ({}, 150),
        ({"separation": 1.8, "members_scale": 0.8}, 150),
        ({"separation": 1.2, "members_scale": 0.3, "scale": 1.1}, 150),
        ({"separation": 1.4}, 500),
    ],
    ids=["the same", "more epochs", "alike", "more rows"],
)
def test_members_are_counted_under_other_recipes(recipe, members):
    """By the shadow's own threshold 164 to 235 rows of 150 would be more likely members than not."""
    z, is_member = drawn(1500 - members, members, seed=2, **recipe)
    found = fitted(z)
    p = found.log_odds.sigmoid()
    assert found.low <= members <= found.high
    assert found.members == pytest.approx(members, rel=0.1)
    assert int((p >= 0.5).sum()) == pytest.approx(members, rel=0.1)
    between = (p >= 0.1) & (p < 0.9)
    assert float(p[between].sum()) == pytest.approx(int(is_member[between].sum()), abs=6)


def test_where_members_hardly_stand_off_the_interval_is_wide_and_holds():
    """Over 20 corpora and shadows, of this separation and .8, 18 intervals held it."""
    found = [fitted(drawn(1350, 150, seed=seed, separation=0.5)[0], shadow=100 + seed) for seed in range(1, 4)]
    assert sum(fit.low <= 150 <= fit.high for fit in found) >= 2
    narrow = fitted(drawn(1350, 150, seed=1)[0])
    assert all(fit.high - fit.low > 2 * (narrow.high - narrow.low) for fit in found)


def test_ranks_stay_and_others_have_even_p_values():
    z, is_member = drawn(1350, 150, seed=1, separation=1.8, scale=1.2)
    found = fitted(z)
    assert torch.equal(found.log_odds.argsort(), z.argsort())
    for level in (0.02, 0.1):
        height = found.null.quantile(1 - level)
        assert float((z[~is_member] >= height).double().mean()) == pytest.approx(level, rel=0.6)


def test_a_given_count_leads_where_the_corpus_does_not_tell():
    z, _ = drawn(1350, 150, seed=1, separation=0.3)
    few, many = (fitted(z, share=share, is_share_known=True).members for share in (0.03, 0.3))
    assert many > 2 * few


def test_few_rows_and_rows_all_alike_are_taken():
    z, _ = drawn(45, 15, seed=2)
    assert 8 <= fitted(z).members <= 22
    assert 0 <= fitted(torch.zeros(30).double()).members <= 30
