"""Every codec keeps its stated error, and its scores are those of the decoded rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whence.errors import UnknownNameError
from whence.indexing.codecs import CODECS, codec

NAMES = sorted(CODECS)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**31))


def rows(n: int, k: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes, a heavy tail, and one of zeros."""
    rng = torch.Generator().manual_seed(seed)
    out = torch.randn(n, k, generator=rng) ** 3 * 10.0 ** torch.randint(-20, 12, (n, 1), generator=rng)
    out[torch.randint(n, (1,), generator=rng)] = 0
    return out


@pytest.mark.parametrize("name", NAMES)
@given(shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_a_round_trip_stays_within_the_stated_bound(name, shape):
    n, k, _, seed = shape
    vectors = rows(n, k, seed)
    stored, scale = CODECS[name].encode(vectors)
    assert stored.shape == (n, CODECS[name].columns(k))
    assert stored.numel() * stored.itemsize == n * CODECS[name].bytes_per_row(k)
    decoded = CODECS[name].decode(stored, scale, k)
    assert ((decoded - vectors).abs().amax(1) <= CODECS[name].bound(vectors)).all()


@pytest.mark.parametrize("name", NAMES)
@given(shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_the_decoded_rows(name, shape):
    n, k, q, seed = shape
    stored, scale = CODECS[name].encode(rows(n, k, seed))
    queries = torch.randn(q, k, generator=torch.Generator().manual_seed(seed + 1))
    decoded = CODECS[name].decode(stored, scale, k)
    true = (queries.double() @ decoded.double().T).float()
    # in fp64, since the squares of 1e-25 vanish in fp32
    bound = queries.norm(dim=1)[:, None] * decoded.double().norm(dim=1) * 1e-5 + 1e-35
    assert ((CODECS[name].scores(stored, scale, queries) - true).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-8, 1e6, 1e30, 3.4e38])
def test_tiny_and_huge_rows_survive(name, size):
    vectors = torch.tensor([[1.0, -1.0, 0.5, 1.0, -1.0]]) * size
    stored, scale = CODECS[name].encode(vectors)
    decoded = CODECS[name].decode(stored, scale, 5)
    assert decoded.isfinite().all()
    assert (decoded[0, 0] / size - 1).abs() < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_and_no_rows_score_zero(name):
    stored, scale = CODECS[name].encode(torch.zeros(3, 11))
    assert (CODECS[name].scores(stored, scale, torch.randn(2, 11)) == 0).all()
    assert CODECS[name].scores(stored[:0], scale[:0], torch.randn(2, 11)).shape == (2, 0)
    assert (CODECS[name].scores(*CODECS[name].encode(torch.randn(3, 11)), torch.zeros(2, 11)) == 0).all()


def test_packed_codes_are_the_bytes_worked_by_hand():
    stored, scale = CODECS["int4"].encode(torch.tensor([[7.0, -7.0, 1.0]]))
    assert stored.tolist() == [[15 | 1 << 4, 9]]
    assert scale.tolist() == [1.0]
    stored, scale = CODECS["onebit"].encode(torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, -3.0]]))
    assert stored.tolist() == [[0b11111101, 0]]
    assert scale.tolist() == [1.0]
    assert CODECS["int8"].encode(torch.tensor([[127.0, -63.5, 1.5]]))[0].tolist() == [[127, -64, 2]]


def test_bfloat16_rounds_to_nearest():
    stored, _ = CODECS["bfloat16"].encode(torch.tensor([[1 + 2**-8 + 2**-12, 1 + 2**-8 - 2**-12]]))
    assert stored.tolist() == [[1 + 2**-7, 1.0]]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UnknownNameError, match=r"--codec int7:.*float32.*onebit"):
        codec("int7")


@pytest.mark.parametrize("name", list(CODECS))
def test_no_rows_are_no_rows(name):
    own = CODECS[name]
    stored, scale = own.encode(torch.zeros(0, 24))
    assert own.decode(stored, scale, 24).shape == (0, 24)


def turned(vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """Vectors under one random rotation."""
    k = vectors.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(seed)))
    return vectors @ rotation


@pytest.mark.parametrize("name", NAMES)
def test_scores_by_the_unbiased_scale_have_the_products_mean_and_the_noise_as_their_spread(name):
    """Over 600 random rotations of a query and a row of cosine 0.3; the row of k = 64 has a heavy tail."""
    k, found = 64, []
    rng = torch.Generator().manual_seed(0)
    row = torch.randn(k, generator=rng) ** 3
    query = 0.3 * row / row.norm() + (1 - 0.3**2) ** 0.5 * torch.nn.functional.normalize(
        torch.randn(k, generator=rng), dim=0
    )
    true = float(query @ row)
    for seed in range(600):
        q, v = turned(torch.stack([query, row]), seed)
        stored, scale = CODECS[name].encode(v[None])
        scale = CODECS[name].unbiased(scale, v[None].norm(dim=1), k)
        noise = CODECS[name].noise(scale, v[None].norm(dim=1), k)
        found.append((float(q @ CODECS[name].decode(stored, scale, k)[0]), float(noise)))
    scores, noises = torch.tensor(found).T
    assert float(scores.mean()) == pytest.approx(true, rel=0.03)
    if name in ("onebit", "int4", "int8"):
        assert float(scores.std()) == pytest.approx(float(noises.mean()) * float(query.norm()), rel=0.15)
    else:
        assert (noises == 0).all() and float(scores.std()) < 0.01 * float(row.norm())


def test_a_row_in_one_bit_has_its_own_norm_as_its_product_with_itself():
    vectors = rows(20, 70, 3)
    norms = vectors.double().norm(dim=1)
    stored, scale = CODECS["onebit"].encode(vectors)
    unbiased = CODECS["onebit"].unbiased(scale, norms.float(), 70)
    decoded = CODECS["onebit"].decode(stored, unbiased, 70)
    assert torch.allclose((decoded.double() * vectors).sum(1) / norms.clamp(min=1e-100) ** 2, (norms > 0).double())
    assert CODECS["onebit"].unbiased(torch.tensor([1e-30]), torch.zeros(1), 70).tolist() == [pytest.approx(1e-30)]
