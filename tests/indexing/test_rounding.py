"""Rounded queries: worked by hand, unbiased but for clipping, and products within the bound."""

import numpy as np
import pytest
import torch

from whence.indexing import rounding
from whence.indexing.rounding import rounded


def test_whole_steps_stay_as_they_are():
    whole, step, error = rounded(torch.tensor([[-3.5, 1.0, 0.0, 0.5]]), 7)
    assert whole.tolist() == [[-7, 2, 0, 1]] and step.tolist() == [0.5]
    assert error[0] == pytest.approx(0.5 * np.sqrt(4 * np.log(2e9) / 2), rel=1e-3), "Hoeffding's"
    _, _, error = rounded(torch.full((1, 400), 2.0), 7)
    assert error[0] == pytest.approx(2 / 7 * np.log(2e9) / 3, rel=3e-2), "Bernstein's knows that nothing is rounded"


def test_rounding_is_unbiased_and_within_the_bound():
    generator = np.random.default_rng(0)
    query, signs = generator.standard_normal(70, np.float32), generator.choice([-1.0, 1.0], 70)
    true, off, whole = query.astype(np.float64) @ signs, [], np.zeros(70, np.int16)
    for _ in range(3000):
        step, error = rounding._round_row(query, 127, generator.random(70, np.float32), whole)
        off.append(whole @ signs * step - true)
        assert abs(off[-1]) <= error
    fraction = query / step - np.floor(query / step)
    spread = np.sqrt((fraction * (1 - fraction)).sum()) * step
    assert abs(np.mean(off)) < 4 * spread / np.sqrt(3000) and np.std(off) == pytest.approx(spread, rel=0.05)


def test_an_outlier_is_clipped_where_that_makes_the_bound_smaller():
    queries = torch.ones(2, 20_000)
    queries[1, 7] = -100.0
    whole, step, errors = rounded(queries, 7)
    assert step[1] < 100 / 7 / 2 and whole[1, 7] == -7
    assert errors[1] < 100 / 7 * np.sqrt(20_000 * np.log(2e9) / 2)
    signs = torch.ones(20_000, dtype=torch.float64)
    off = torch.from_numpy(whole * step[:, None].astype(np.float64)) @ signs - queries.double() @ signs
    assert (off.abs().numpy() <= errors).all()


@pytest.mark.parametrize("levels", [7, 127, 1023])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_queries_of_any_size_are_within_the_bound(levels, scale):
    queries = torch.randn(5, 333, generator=torch.Generator().manual_seed(0)) ** 3 * scale
    whole, step, errors = rounded(queries, levels)
    assert np.abs(whole).max() <= levels and np.isfinite(errors).all()
    signs = (torch.randn(333, 40) > 0).double() * 2 - 1
    off = torch.from_numpy(whole * step[:, None].astype(np.float64)) @ signs - queries.double() @ signs
    assert (off.abs().numpy() <= errors[:, None] * 1.000001).all()


def test_the_same_query_is_rounded_the_same_way_whatever_comes_with_it():
    queries = torch.randn(70, 5000)
    alone, among = rounded(queries[3:4], 127), rounded(queries, 127)
    for one, many in zip(alone, among, strict=True):
        assert (one[0] == many[3]).all()


def test_queries_of_no_entries_have_no_error():
    whole, _, errors = rounded(torch.zeros(2, 0), 127)
    assert whole.shape == (2, 0) and rounding.RISK < 1e-6 and (errors >= 0).all()


@pytest.mark.parametrize("levels", [127, 255, 1023])
def test_the_largest_entry_is_not_rounded_beyond_the_levels(levels):
    """The noise of column 12,277 is so near 1 that fp32 rounds its sum with a whole number up."""
    queries = torch.full((1, 12_500), 0.01)
    queries[0, 12_277] = 100.0
    whole, _, _ = rounded(queries, levels)
    assert whole[0, 12_277] == levels and np.abs(whole).max() == levels
