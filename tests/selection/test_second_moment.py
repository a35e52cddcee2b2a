"""TRAK and TrackStar against explicit inverses of explicit second moments."""

import pytest
import torch
from small_views import each, query

from conftest import corpus_rows
from whence.errors import SettingError
from whence.indexing.build import index as build_index
from whence.indexing.opening import open_index
from whence.selection.scorers.second_moment import TRAK, SecondMoment, TrackStar
from whence.selection.views import IndexView


@pytest.fixture(scope="module")
def view(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("moment") / "index"
    build_index(tiny_run, corpus_rows(14), path, width=300, projection="count_sketch", codec="float32",
                checkpoints="all", progress=False)  # fmt: skip
    return IndexView(open_index(path))


@pytest.fixture(scope="module")
def targets(view):
    return each([query(row, view.model()) for row in (*corpus_rows(14)[3:5], *corpus_rows(2, first=90))])


def vectors_of(view, targets):
    """Of rows [c n k] and of targets [c s k], in double precision."""
    rows = torch.cat([stored for stored, _ in view.vectors()], 1).double()
    return rows, view.query_vectors([target.queries[0].encoded for target in targets]).double()


def formed(rows, damping, queries=None, mixing=0.0):
    """R, entry by entry of its definition."""
    sides = [(rows, 1.0)] if queries is None else [(rows, 1 - mixing), (queries, mixing)]
    moment, lines = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64), 0
    for side, share in sides:
        if share == 0:
            continue
        size = 1.0 if queries is None else float(side.square().sum(1).mean())
        moment += share * sum(torch.outer(one, one) for one in side) / len(side) / size
        lines += len(side)
    return moment + damping * moment.trace() / lines * torch.eye(len(moment), dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.01, 0.1, 10.0])
def test_trak_is_the_explicit_inverse(view, targets, damping):
    rows, asked = vectors_of(view, targets)
    expected = torch.zeros(len(targets), 14, dtype=torch.float64)
    for weight, g, v in zip(view.weights.tolist(), rows, asked, strict=True):
        expected += weight * v @ torch.linalg.inv(formed(g, damping)) @ g.T
    found = TRAK(damping=damping)(view, targets).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_trackstar_is_the_cosine_after_the_explicit_root(view, targets, mixing):
    rows, asked = vectors_of(view, targets)
    expected = torch.zeros(len(targets), 14, dtype=torch.float64)
    for weight, g, v in zip(view.weights.tolist(), rows, asked, strict=True):
        values, basis = torch.linalg.eigh(formed(g, 0.1, v, mixing))
        root = basis @ values.pow(-0.5).diag() @ basis.T
        expected += weight * torch.nn.functional.normalize(v @ root) @ torch.nn.functional.normalize(g @ root).T
    found = TrackStar(mixing=mixing)(view, targets).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert found.abs().max() <= 1 + 1e-5


def test_squared_norms_and_a_second_moment_of_nothing():
    lines = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment.of(lines, 0.3)
    explicit = lines.double().T @ lines.double() + moment.damping * torch.eye(40, dtype=torch.float64)
    asked = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    expected = (asked.double() @ torch.linalg.inv(explicit) * asked.double()).sum(1)
    torch.testing.assert_close(moment.squared_norms(asked).double(), expected, rtol=1e-4, atol=1e-4)
    nothing = SecondMoment.of(torch.zeros(2, 40), 0.1)
    torch.testing.assert_close(nothing.solved(asked), asked)


def test_little_damping_and_a_direction_that_all_share_lose_no_digits():
    """An eigenvalue of 1e6 dampings: what is left of a vector is a millionth of it."""
    rng = torch.Generator().manual_seed(3)
    lines = torch.randn(60, 500, generator=rng) / 500**0.5 + 30 * torch.nn.functional.normalize(torch.ones(500), dim=0)
    moment = SecondMoment.of(lines, 1e-6)
    explicit = lines.double().T @ lines.double() + moment.damping * torch.eye(500, dtype=torch.float64)
    asked = lines[:3] + 0.1 * torch.randn(3, 500, generator=rng)
    expected = torch.linalg.solve(explicit, asked.double().T).T
    torch.testing.assert_close(
        moment.solved(asked).double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())
    )
    norms = (asked.double() * expected).sum(1)
    torch.testing.assert_close(moment.squared_norms(asked).double(), norms, rtol=1e-4, atol=0)


def test_a_sample_of_the_rows_is_drawn_by_the_seed(view, targets):
    whole, first, other = (TRAK(sample=sample, seed=seed)(view, targets) for sample, seed in ((99, 0), (6, 0), (6, 1)))
    assert torch.equal(whole, TRAK(seed=5)(view, targets)), "all rows are no sample"
    assert not torch.equal(first, other)
    assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.5 for pair in zip(first, whole, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TRAK(damping=0.0), "damping 0.0 of trak: a number above 0"),
        (lambda: TRAK(sample=0), "sample 0 of trak: at least 1"),
        (lambda: TrackStar(mixing=2.0), "mixing 2.0 of trackstar: a share from 0 to 1"),
    ],
)
def test_values_that_cannot_be_are_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()
