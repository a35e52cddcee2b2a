"""Queries in bit planes: worked by hand, unbiased, and within their bound; the loops are tested with all kernels."""

import numpy as np
import pytest
import torch

from whence.indexing import bit_planes
from whence.indexing.codecs import CODECS


def product(packed, factors, codes):
    """The plain sum: codes [bytes] of one row, and one query's planes and factors."""
    padded = np.pad(codes, (0, packed.shape[1] - len(codes)))
    return factors[-1] + (factors[:-1] * np.bitwise_count(padded & packed).sum(1)).sum()


def test_a_query_of_whole_steps_worked_by_hand(monkeypatch):
    monkeypatch.setattr(bit_planes, "PLANES", (4,))
    # step 0.5: -7, 2 and 0 are 1001, 0010 and 0000 in two's complement of four bits
    packed, factors, errors = bit_planes.planes_of(torch.tensor([[-3.5, 1.0, 0.0]]))
    assert packed.shape == (1, 4, 64)
    assert packed[0, :, 0].tolist() == [0b001, 0b010, 0b000, 0b001] and not packed[0, :, 1:].any()
    assert factors[0].tolist() == [1.0, 2.0, 4.0, -8.0, -(0.5 * 1 + 0.5 * 2 - 0.5 * 8)]
    assert errors == pytest.approx(0.5 * np.sqrt(3 * np.log(2e9) / 2))
    for signs in ((1, 1, 1), (-1, 1, -1), (1, -1, 1)):
        codes = CODECS["onebit"].encode(torch.tensor([signs], dtype=torch.float32))[0][0].numpy()
        assert product(packed[0], factors[0], codes) == -3.5 * signs[0] + signs[1]


def test_rounding_is_unbiased_and_within_the_bound():
    queries, signs = torch.randn(3000, 70), (torch.randn(70) > 0).float() * 2 - 1
    packed, factors, errors = bit_planes.planes_of(queries)
    codes = CODECS["onebit"].encode(signs[None])[0][0].numpy()
    off = [product(*each, codes) for each in zip(packed, factors, strict=True)] - (queries @ signs).numpy()
    assert (abs(off) <= errors).all()
    step = errors / np.sqrt(70 * np.log(2 / bit_planes.RISK) / 2)
    spread = off / step  # the variance of an entry's error is a sixth of a squared step on average
    assert abs(spread.mean()) < 4 * np.sqrt(70 / 6 / 3000) and spread.std() == pytest.approx(np.sqrt(70 / 6), rel=0.1)


def test_a_query_has_as_many_planes_as_its_outliers_need():
    plain, outlier = torch.ones(1, 20_000), torch.ones(1, 20_000)
    outlier[0, 7] = 30.0
    planes = [bit_planes.planes_of(queries)[0].shape[1] for queries in (plain, outlier, torch.zeros(1, 20_000))]
    assert planes == [6, 10, 12]
    for queries in (plain, outlier):
        _, _, errors = bit_planes.planes_of(queries)
        assert errors[0] <= bit_planes.LIMIT * queries.norm()


@pytest.mark.parametrize("seed", range(3))
def test_few_rows_of_noise_are_within_the_bound_of_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4096, generator=generator)
    signs = (torch.randn(20_000, 4096, generator=generator) > 0).float() * 2 - 1
    products = (signs @ query[0]).sort(descending=True).values
    error = bit_planes.planes_of(query)[2][0]
    assert (products >= products[9] - 2 * error).sum() <= 100
