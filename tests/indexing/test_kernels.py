"""Every kernel of every codec is within its stated slack of fp32, and the fastest is chosen."""

import subprocess
import sys
import time

import pytest
import torch
from test_codecs import rows

from whence.indexing import kernels
from whence.indexing.codecs import CODECS

NAMES = sorted(CODECS)


@pytest.mark.parametrize("has_matrix_units", [kernels._has_matrix_units(), False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "n, k, q",
    [
        (1, 1, 1),
        (2, 1, 5),
        (33, 57, 3),
        (300, 257, 1),
        (300, 256, 8),
        (17, 512, 64),
        (9, 2500, 2),
        (2, 9001, 1),
        (3, 0, 2),
    ],
)
@pytest.mark.parametrize("heavy_tailed", [False, True])
def test_every_kernel_is_within_its_slack(name, n, k, q, has_matrix_units, heavy_tailed, monkeypatch):
    monkeypatch.setattr(kernels, "_has_matrix_units", lambda: has_matrix_units)
    monkeypatch.setattr(kernels.compiled, "_STRIP_BYTES", 1000)
    vectors, queries = (rows(n, k, seed=k) if heavy_tailed else torch.randn(n, k)), torch.randn(q, k)
    stored, scale = CODECS[name].encode(vectors)
    decoded = CODECS[name].decode(stored, scale, k)
    true = (queries.double() @ decoded.double().T).float()
    made = [make(queries) for make in CODECS[name].kernels]
    if (costly := kernels.compiled_kernel(name, queries, CODECS[name].columns(k))) is not None:
        made.append(costly)
    assert (costly is not None) == (q <= 8 or name in ("int4", "onebit")), "which queries are compiled for"
    sizes = [n // 3, 0, n - n // 3]  # a batch is several blocks
    for kernel in made:
        block = kernel(kernels.Stored(stored.split(sizes), scale.split(sizes)))
        slack = queries.norm(dim=1)[:, None] * decoded.norm(dim=1) * 1e-5 + 1e-35  # fp32 sums, where none is stated
        if block.slack is not None:
            slack = slack + block.slack
        if block.slack_per_norm is not None:
            slack = slack + block.slack_per_norm[:, None] * vectors.norm(dim=1)
        if block.slack_per_scale is not None:
            slack = slack + block.slack_per_scale[:, None] * scale
        assert ((block.scores - true).abs() <= slack).all(), kernel.__qualname__


def test_the_first_large_batch_chooses_the_fastest_kernel(monkeypatch):
    monkeypatch.setattr(kernels.Fastest, "_chosen", {})
    calls = []

    def kernel(name, seconds):
        def score(rows):
            calls.append((name, rows.count))
            time.sleep(seconds)
            return kernels.Block(torch.zeros(1, rows.count))

        return score

    timed = [kernel("slow", 0.02), kernel("fast", 0.001), kernel("near", 0.002)]
    fastest = kernels.Fastest("int8", torch.zeros(1, 4), timed)

    def scan(*sizes):
        calls.clear()
        fastest(kernels.Stored([torch.zeros(n, 4) for n in sizes], [torch.ones(n) for n in sizes]))

    scan(10)
    assert calls == [("slow", 10)], "a small batch is no trial"
    scan(1000, 8000, 1000)
    assert calls[-1] == ("fast", 10_000)
    assert {rows for name, rows in calls if name == "slow"} == {256}, "what is far slower is not tried again"
    assert {rows for name, rows in calls if name == "near"} == {256, 8192}
    scan(10)
    assert calls == [("fast", 10)], "the choice is kept"


@pytest.mark.parametrize("seconds, name", [(0.0, "costly"), (0.02, "cheap")])
def test_what_must_be_compiled_waits_until_that_can_pay(seconds, name, monkeypatch):
    monkeypatch.setattr(kernels.Fastest, "_chosen", {})
    monkeypatch.setattr(kernels.Fastest, "_spent", {})
    monkeypatch.setattr(kernels, "_PATIENCE", 0.05)
    calls = []

    def kernel(name, seconds):
        def score(rows):
            calls.append(name)
            time.sleep(seconds)
            return kernels.Block(torch.zeros(1, rows.count))

        return score

    cheap, costly = kernel("cheap", 0.005), kernel("costly", seconds)
    fastest = kernels.Fastest("int8", torch.zeros(1, 4), [cheap], costly)
    rows = kernels.Stored([torch.zeros(300, 4)], [torch.ones(300)])
    fastest(rows)
    assert set(calls) == {"cheap"}
    for _ in range(20):
        fastest(rows)
    assert set(calls) == {"cheap", "costly"}
    calls.clear()
    for _ in range(20):
        fastest(rows)
    assert set(calls) == {name}, "the faster of both is kept"


def test_a_compiler_that_fails_leaves_scans_as_they_were(monkeypatch, caplog):
    monkeypatch.setattr(kernels.Fastest, "_chosen", {})
    monkeypatch.setattr(kernels.Fastest, "_spent", {})
    monkeypatch.setattr(kernels, "_PATIENCE", -1.0)
    queries = torch.ones(1, 4)
    costly = kernels.compiled_kernel("int8", queries, 4)
    kernels.compiled._loop.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)  # it cannot be imported

    def cheap(rows):
        return kernels.Block(torch.zeros(1, rows.count))

    fastest = kernels.Fastest("int8", queries, [cheap], costly)
    rows = kernels.Stored([torch.ones(300, 4, dtype=torch.int8)], [torch.ones(300)])
    for _ in range(3):
        assert (fastest(rows).scores == 0).all(), "the cheap one goes on"
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("scans are not compiled, and stay slower: ModuleNotFoundError: import of numba halted")


def test_numba_is_not_imported_before_it_is_needed():
    code = (
        "import sys, torch; from whence.indexing.codecs import CODECS; from whence.indexing.kernels import Stored\n"
        "score = CODECS['int8'].prepare(torch.ones(1, 64))\n"
        "score(Stored([torch.ones(300, 64, dtype=torch.int8)], [torch.ones(300)]))\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba_there_is_no_compiled_kernel(monkeypatch):
    monkeypatch.setattr(kernels.compiled, "is_available", lambda: False)
    assert kernels.compiled_kernel("int8", torch.zeros(1, 4), 4) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4", "onebit"])
def test_integer_sums_do_not_overflow_in_long_rows(name):
    vectors, queries = torch.ones(20, 300_001), torch.ones(2, 300_001)
    integer = CODECS[name].kernels[0](queries)
    stored, scale = CODECS[name].encode(vectors)
    scores = integer(kernels.Stored([stored], [scale])).scores
    assert (scores / 300_001 - 1).abs().max() < 1e-4


def test_rows_that_compiled_loops_would_read_past_are_refused():
    rows = torch.ones(3, 4, dtype=torch.int8)
    kernel = kernels.compiled_kernel("int8", torch.ones(1, 5), 5)
    for stored, scale, told in (
        ([rows], [torch.ones(1)], "3 rows of [4] entries have 1 scales"),
        ([rows, rows[:, :2]], [torch.ones(6)], "6 rows of [2, 4] entries"),
        ([rows], [torch.ones(3)], "Rows have 4 stored entries; queries were laid out for 5"),
    ):
        with pytest.raises(ValueError) as caught:
            kernel(kernels.Stored(stored, scale))
        assert told in str(caught.value)
