"""Every kernel of every codec is within its stated slack of fp32, and the fastest is chosen."""

import time

import pytest
import torch

from test_codecs import rows
from whence import kernels
from whence.codecs import CODECS

NAMES = sorted(CODECS)


@pytest.mark.parametrize("has_matrix_units", [kernels._has_matrix_units(), False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n, k, q", [(1, 1, 1), (2, 1, 5), (33, 57, 3), (300, 257, 1), (300, 256, 8), (17, 512, 64)])
@pytest.mark.parametrize("heavy_tailed", [False, True])
def test_every_kernel_is_within_its_slack(name, n, k, q, has_matrix_units, heavy_tailed, monkeypatch):
    monkeypatch.setattr(kernels, "_has_matrix_units", lambda: has_matrix_units)
    vectors, queries = (rows(n, k, seed=k) if heavy_tailed else torch.randn(n, k)), torch.randn(q, k)
    stored, scale = CODECS[name].encode(vectors)
    decoded = CODECS[name].decode(stored, scale, k)
    true = (queries.double() @ decoded.double().T).float()
    made = [kernel for make in CODECS[name].kernels if (kernel := make(queries))]
    assert made, "at least one kernel for any queries"
    for kernel in made:
        block = kernel(stored, scale)
        slack = queries.norm(dim=1)[:, None] * decoded.norm(dim=1) * 1e-5 + 1e-35  # fp32 sums, where none is stated
        if block.slack is not None:
            slack = slack + block.slack
        if block.slack_per_norm is not None:
            slack = slack + block.slack_per_norm[:, None] * vectors.norm(dim=1)
        if block.slack_per_scale is not None:
            slack = slack + block.slack_per_scale[:, None] * scale
        assert ((block.scores - true).abs() <= slack).all(), kernel.__qualname__


def test_the_first_large_block_chooses_the_fastest_kernel(monkeypatch):
    monkeypatch.setattr(kernels.Fastest, "_chosen", {})
    calls = []

    def kernel(name, seconds):
        def score(stored, scale):
            calls.append((name, len(stored)))
            time.sleep(seconds)
            return kernels.Block(torch.zeros(1, len(stored)))

        return score

    timed = [kernel("slow", 0.02), kernel("fast", 0.001), kernel("near", 0.002)]
    fastest = kernels.Fastest("int8", torch.zeros(1, 4), timed)
    fastest(torch.zeros(10, 4), torch.ones(10))
    assert calls == [("slow", 10)], "a small block is no trial"
    fastest(torch.zeros(3000, 4), torch.ones(3000))
    assert calls[-1] == ("fast", 3000)
    assert ("slow", 2048) not in calls, "what is far slower is not tried again"
    calls.clear()
    fastest(torch.zeros(10, 4), torch.ones(10))
    assert calls == [("fast", 10)], "the choice is kept"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4", "onebit"])
def test_integer_sums_do_not_overflow_in_long_rows(name):
    vectors, queries = torch.ones(20, 300_001), torch.ones(2, 300_001)
    integer = CODECS[name].kernels[0](queries)
    scores = integer(*CODECS[name].encode(vectors)).scores
    assert (scores / 300_001 - 1).abs().max() < 1e-4
