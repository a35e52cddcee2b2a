"""Queries in bit planes: worked by hand, and as many planes as they need; the loops are tested with all kernels."""

import numpy as np
import pytest
import torch

from whence.indexing import bit_planes
from whence.indexing.codecs import CODECS


def product(packed, factors, codes):
    """The plain sum: codes [bytes] of one row, and one query's planes and factors."""
    other = np.pad(codes, (0, packed.shape[1] - len(codes))) ^ packed[0]
    counts = np.bitwise_count(other & packed[1:]).sum(1, dtype=np.int64)
    return factors[0] * (counts << np.arange(len(counts))).sum() + factors[1]


def test_a_query_of_whole_steps_worked_by_hand(monkeypatch):
    monkeypatch.setattr(bit_planes, "PLANES", (3,))
    # step 0.5: sizes 7, 2 and 0 are 111, 010 and 000
    packed, factors, _ = bit_planes.planes_of(torch.tensor([[-3.5, 1.0, 0.0]]))
    assert packed.shape == (1, 4, 64)
    assert packed[0, :, 0].tolist() == [0b010, 0b001, 0b011, 0b001] and not packed[0, :, 1:].any()
    assert factors[0].tolist() == [-1.0, 4.5]
    for signs in ((1, 1, 1), (-1, 1, -1), (1, -1, 1)):
        codes = CODECS["onebit"].encode(torch.tensor([signs], dtype=torch.float32))[0][0].numpy()
        assert product(packed[0], factors[0], codes) == -3.5 * signs[0] + signs[1]


def test_a_query_has_as_many_planes_as_its_outliers_need():
    generator = torch.Generator().manual_seed(0)
    few = torch.ones(1, 43_008)
    plain = torch.randn(1, 43_008, generator=generator)
    heavy = plain * torch.randn(1, 43_008, generator=generator).mul(1.2).exp()
    planes = [bit_planes.planes_of(queries)[0].shape[1] - 1 for queries in (few, plain, heavy, torch.zeros(1, 43_008))]
    assert planes == [3, 4, 6, bit_planes.PLANES[-1]]
    for queries in (few, plain, heavy):
        assert bit_planes.planes_of(queries)[2][0] <= bit_planes.LIMIT * queries.norm()


@pytest.mark.parametrize("seed", range(3))
def test_few_rows_of_noise_are_within_the_bound_of_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4096, generator=generator)
    signs = (torch.randn(20_000, 4096, generator=generator) > 0).float() * 2 - 1
    products = (signs @ query[0]).sort(descending=True).values
    error = bit_planes.planes_of(query)[2][0]
    assert (products >= products[9] - error).sum() <= 600
