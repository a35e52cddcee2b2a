"""One-bit rows: every way to multiply them gives the exact top-k, and the same scores to the last bit.

Compiled loops read rows by their addresses, in vectors of 64 bytes: widths that fill them and that do not, ties, rows
of zeros, and more places than rows. What needs numba, or matrix units, is skipped where there are none.
"""

import numpy as np
import pytest
import torch

from whence.indexing import bit_planes, kernels, matrix_units, scan, signed_sums
from whence.indexing.addresses import VECTOR, addressed
from whence.indexing.codecs import CODECS
from whence.indexing.kernels import Stored
from whence.indexing.shards import Shard

WIDTHS = [1, 7, 8, 9, 31, 33, 512, 513, 1000, 4096, 4100]
needs_numba = pytest.mark.skipif(not kernels.compiled.is_available(), reason="numba is not installed")


def loops():
    """The compiled kernels that this machine has."""
    units = [] if matrix_units.is_available() else [pytest.mark.skip(reason="no matrix units")]
    return [
        pytest.param(bit_planes, marks=needs_numba),
        pytest.param(matrix_units, marks=[needs_numba, *units]),
    ]


def one_bit(n, k, seed=0):
    """Codes and scales of n rows, some of them equal, one of zeros with scale 0."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, k, generator=generator)
    vectors[n // 2] = vectors[0]
    vectors[n // 3] = 0
    return CODECS["onebit"].encode(vectors)


@pytest.mark.parametrize("module", loops())
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("n, q", [(1, 1), (33, 3), (40, 31), (100, 33), (65, 70)])
def test_a_loop_is_the_product_with_the_rounded_query(module, k, n, q):
    stored, scale = one_bit(n, k)
    queries = torch.randn(q, k, generator=torch.Generator().manual_seed(1))
    products, errors = module.products(queries)
    sizes = [n // 3, 0, n - n // 3]
    rows = Stored(stored.split(sizes), scale.split(sizes))
    got = torch.from_numpy(products(rows.addressed))
    signs = CODECS["onebit"].decode(stored, torch.ones(n), k).double()
    true = signs @ queries.double().T * scale[:, None]
    assert ((got - true).abs() <= scale[:, None] * torch.from_numpy(errors) * 1.00001).all()
    levels = 127 if module is matrix_units else 2 ** (bit_planes.planes_of(queries)[0].shape[1] - 1) - 1
    whole, step, _ = kernels.rounded(queries, levels)
    rounded = signs @ torch.from_numpy(whole * step[:, None].astype(np.float64)).T * scale[:, None]
    assert torch.allclose(got.double(), rounded, rtol=1e-6, atol=1e-6 * float(queries.norm()))


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=needs_numba)])
@pytest.mark.parametrize("k", [0, *WIDTHS])
def test_products_of_pairs_are_exact(k, is_compiled, monkeypatch):
    monkeypatch.setattr(signed_sums, "_spent", 9.0 if is_compiled else -np.inf)
    stored, scale = one_bit(70, k) if k else (torch.zeros(70, 0, dtype=torch.uint8), torch.zeros(70))
    queries = torch.randn(6, k, generator=torch.Generator().manual_seed(1)) ** 3
    place, query = np.random.default_rng(0).integers(0, 70, 300), np.random.default_rng(1).integers(0, 6, 300)
    got = signed_sums.products(Stored(stored.split(30), scale.split(30)), queries, place, query)
    signs = CODECS["onebit"].decode(stored, torch.ones(70), k).double()
    true = (signs @ queries.double().T)[place, query].numpy()
    assert got.dtype == np.float32
    assert (abs(got - true) <= np.spacing(np.abs(true).astype(np.float32)) * 0.51 + 1e-12).all()


def kernels_of(queries):
    """Every kernel of one-bit rows that this machine has for so many queries."""
    made = [make(queries) for make in CODECS["onebit"].kernels]
    columns = CODECS["onebit"].columns(queries.shape[1])
    costly = [kernels.compiled_kernel("onebit", queries, columns)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_units, "is_available", lambda: False)
        costly.append(kernels.compiled_kernel("onebit", queries, columns))
    return made + [kernel for kernel in costly if kernel is not None]


@pytest.mark.parametrize("k", [7, 513, 1100])
@pytest.mark.parametrize("q", [1, 4, 40])
@pytest.mark.parametrize("m", [10, 3000])
@pytest.mark.parametrize("cosine", [False, True])
def test_every_kernel_leads_to_the_same_exact_ranking(k, q, m, cosine, monkeypatch):
    n, generator = 700, torch.Generator().manual_seed(k)
    vectors = torch.randn(n, k, generator=generator)
    vectors[500:504] = vectors[3]
    vectors[20] = 0
    stored, scale = CODECS["onebit"].encode(vectors)
    ones = torch.ones(n)
    status = torch.zeros(n, dtype=torch.uint8)
    whole = Shard(vectors=stored, scale=scale, norm=vectors.norm(dim=1), loss=ones, status=status, tokens=ones.int())
    pieces = [
        (first, [Shard(**{name: tensor[first : first + 195] for name, tensor in vars(whole).items()})])
        for first in range(0, n, 195)
    ]
    queries = torch.randn(1, q, k, generator=generator) + vectors[3]
    query = scan.unit(queries) if cosine else queries
    m = min(m, n)
    signs = CODECS["onebit"].decode(stored, torch.ones(n), k).double()
    # as the scan rounds it: exact products to fp32, then the scale, then the norm
    true = ((signs @ query[0].double().T).float() * scale[:, None]).T
    if cosine:
        true = true * scan.inverse_or_zero(whole.norm)
    rankings = []
    for kernel in kernels_of(query[0]):
        monkeypatch.setattr(type(CODECS["onebit"]), "prepare", lambda codec, queries, kernel=kernel: kernel)
        asked = scan.ScanQuery(queries=query, weights=torch.ones(1), cosine=cosine, codec=CODECS["onebit"])
        ends = scan.top_k(asked, scan.batches_of(pieces, q), m)
        rankings.append(ends)
        for sign, ranking in zip((1, -1), ends, strict=True):
            expected = (sign * true).sort(dim=1, descending=True, stable=True)
            assert torch.allclose(sign * ranking.scores, expected.values[:, :m], rtol=1e-6, atol=1e-9)
            if m == 10 and k > 7 and sign == 1:
                assert [row for row in ranking.rows[0].tolist() if row in (3, 500, 501, 502, 503)] == [
                    3,
                    500,
                    501,
                    502,
                    503,
                ], "equal rows rank by their numbers"
    assert len(rankings) >= 2
    for ends in rankings[1:]:
        for first, other in zip(rankings[0], ends, strict=True):
            assert torch.equal(first.rows, other.rows) and torch.equal(first.scores, other.scores)


def test_rows_at_the_end_of_their_memory_are_copied():
    memory = np.random.default_rng(0).integers(0, 256, (5, 24), dtype=np.uint8)
    rows = addressed([memory, memory[:2]], np.ones(7, np.float32))
    start = memory.ctypes.data
    assert rows.addresses[:3].tolist() == [start, start + 24, start + 48], "72 bytes follow the third"
    inside = (rows.addresses >= start) & (rows.addresses + VECTOR <= start + memory.nbytes)
    assert inside.tolist() == [True] * 3 + [False] * 4
    assert len(rows.held) == 4 and all((copy[:, 24:] == 0).all() for copy in rows.held[1::2])
    copied = rows.held[1]
    assert (copied[:, :24] == memory[3:]).all() and rows.addresses[3] == copied.ctypes.data


@pytest.mark.parametrize("module", loops())
def test_rows_that_a_loop_would_read_past_are_refused(module):
    rows = torch.ones(3, 4, dtype=torch.uint8)
    products, _ = module.products(torch.ones(1, 33))
    for stored, scale, told in (
        ([rows], [torch.ones(1)], "3 rows of [4] entries have 1 scales"),
        ([rows, rows[:, :2]], [torch.ones(6)], "6 rows of [2, 4] entries"),
        ([rows], [torch.ones(3)], "Rows have 4 stored entries; queries were laid out for 5"),
    ):
        with pytest.raises(ValueError) as caught:
            products(Stored(stored, scale).addressed)
        assert told in str(caught.value)


@needs_numba
def test_without_matrix_units_their_loop_says_so(monkeypatch):
    monkeypatch.setattr(matrix_units, "_init", lambda: False)
    matrix_units._loop.cache_clear()
    products, _ = matrix_units.products(torch.ones(9, 64))
    rows = addressed([np.zeros((2, 8), np.uint8)], np.ones(2, np.float32))
    with pytest.raises(kernels.compiled.CompilingError, match="no matrix units"):
        products(rows)


def test_tiles_hold_each_entry_of_a_query_where_its_bit_is_unpacked():
    whole = np.random.default_rng(0).integers(-127, 128, (40, 1030)).astype(np.int16)
    tiles = matrix_units.tiles_of(whole)
    assert tiles.shape == (2, 3, 8, 2, 16, 16, 4)
    for query, column in [(0, 0), (17, 513), (39, 1029), (31, 1000)]:
        byte, bit = divmod(column, 8)
        vector, inside = divmod(byte, 64)
        place = (query // 32, vector, bit, query % 32 // 16, inside // 4, query % 16, inside % 4)
        assert tiles[place] == whole[query, column]
    assert np.abs(tiles.astype(np.int64)).sum() == np.abs(whole.astype(np.int64)).sum(), "all others are zeros"
