"""Joint matching: slow and obvious loops, cases worked by hand, and what must hold whatever the numbers."""

import math

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whence.errors import SettingError
from whence.recovery import matching_problem as problems
from whence.recovery.matching_problem import NuisanceProducts, VectorProblem, gram_problem
from whence.recovery.pursuit import cosine, matching, mixture, nnls

METHODS = [cosine, matching, nnls]
KINDS = [gram_problem, VectorProblem]
TIGHT = {"tolerance": 1e-9, "limit": 100_000}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n=60, k=40, m=8, seed=0, alpha=0.3):
    """Atoms that share a direction, and the sum of the first m of a random order."""
    atoms = normal(n, k, seed=seed) + normal(k, seed=seed + 100)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:m]
    return atoms, alpha * atoms[rows].sum(0), sorted(rows.tolist())


def off(vectors, directions):
    """Projected off directions: what least squares by them leaves."""
    found = torch.linalg.lstsq(directions.T, vectors.reshape(-1, 40).T, driver="gelsd").solution
    return vectors - (directions.T @ found).T.reshape(vectors.shape)


def greedy_cosine(atoms, target, count):
    """By the definition, with sums made anew."""
    rows = []
    for _ in range(count):
        values = [
            -math.inf if i in rows else torch.cosine_similarity(atoms[[*rows, i]].sum(0), target, 0).item()
            for i in range(len(atoms))
        ]
        rows.append(max(range(len(atoms)), key=values.__getitem__))
    return rows


def greedy_matching(atoms, target, count, alpha):
    rows = []
    for _ in range(count):
        left = target - alpha * atoms[rows].sum(0)
        losses = [math.inf if i in rows else (left - alpha * atoms[i]).square().sum().item() for i in range(len(atoms))]
        rows.append(min(range(len(atoms)), key=losses.__getitem__))
    return rows


# -- against slow loops


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_cosine_is_the_greedy_of_the_definition(kind, seed):
    atoms, target, _ = planted(seed=seed)
    found = cosine(kind(atoms, target), count=12)
    assert found.rows == greedy_cosine(atoms, target, 12)
    total = atoms[found.rows].sum(0)
    assert found.cosine == pytest.approx(torch.cosine_similarity(total, target, 0).item())
    alpha = (total @ target / total.square().sum()).item()
    assert found.weights[found.rows].tolist() == pytest.approx([alpha] * 12)
    assert found.residual == pytest.approx(((target - alpha * total).norm() / target.norm()).item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_greedy_of_the_definition(kind, seed):
    atoms, target, _ = planted(seed=seed)
    found = matching(kind(atoms, target), count=12, alpha=0.25)
    assert found.rows == greedy_matching(atoms, target, 12, 0.25)
    assert found.residual == pytest.approx(((target - 0.25 * atoms[found.rows].sum(0)).norm() / target.norm()).item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(10, 30), (30, 30), (12, 50)])
@pytest.mark.parametrize("seed", range(3))
def test_nnls_finds_scipys_weights(kind, n, k, seed):
    atoms, target = normal(n, k, seed=seed), normal(k, seed=seed + 50)
    weights, residual = scipy.optimize.nnls(atoms.T.numpy(), target.numpy())
    found = nnls(kind(atoms, target), **TIGHT)
    assert found.stopped == "converged"
    assert found.weights.tolist() == pytest.approx(weights.tolist(), abs=1e-6)
    assert found.residual == pytest.approx(residual / target.norm().item(), abs=1e-7)
    assert found.rows == sorted(weights.nonzero()[0].tolist(), key=lambda row: -weights[row])


@pytest.mark.parametrize("kind", KINDS)
def test_nnls_of_more_atoms_than_numbers_has_the_least_residual(kind):
    atoms, target = normal(80, 12), normal(12, seed=1) + 2
    _, residual = scipy.optimize.nnls(atoms.T.numpy(), target.numpy())
    assert nnls(kind(atoms, target), tolerance=1e-7, limit=100_000).residual == pytest.approx(residual, abs=1e-5)


@pytest.mark.parametrize("l1", [0.05, 0.3])
def test_l1_is_the_cosine_that_the_first_atom_must_exceed(l1):
    """The conditions of the optimum: <g_i, R> is l1 |g_i| |T| where there is a weight, and not above it elsewhere."""
    atoms, target, _ = planted()
    found = nnls(gram_problem(atoms, target), l1=l1, **TIGHT)
    left = target - found.weights.double() @ atoms
    excess = atoms @ left / (atoms.norm(dim=1) * target.norm()) - l1
    assert excess[found.rows].abs().max() < 1e-6
    assert excess.max() < 1e-6
    greatest = float(torch.cosine_similarity(atoms, target[None]).max())
    assert nnls(gram_problem(atoms, target), l1=greatest + 1e-6).rows == []
    assert len(nnls(gram_problem(atoms, target), l1=greatest - 1e-2).rows) >= 1


def test_count_fits_the_weights_anew_to_the_rows_of_greatest_weight():
    atoms, target = normal(30, 20), normal(20, seed=1)
    free, few = (nnls(gram_problem(atoms, target), count=count, **TIGHT) for count in (None, 5))
    assert len(free.rows) > 5
    assert few.rows == free.rows[:5]
    assert few.scores.tolist() == free.scores.tolist()
    weights, residual = scipy.optimize.nnls(atoms[few.rows].T.numpy(), target.numpy())
    assert few.weights[few.rows].tolist() == pytest.approx(weights.tolist(), abs=1e-6)
    assert few.residual == pytest.approx(residual / target.norm().item())


@pytest.mark.parametrize("of", ["float64", "float32"])
def test_gram_is_all_inner_products_also_over_several_blocks(of, monkeypatch):
    monkeypatch.setattr(problems, "_ROWS", 7)
    monkeypatch.setattr(problems, "_COLUMNS", 9)
    atoms, target = normal(23, 31).to(getattr(torch, of)), normal(31, seed=1)
    found = gram_problem(atoms, target)
    precision = 1e-12 if of == "float64" else 1e-5
    torch.testing.assert_close(found.gram.double(), atoms.double() @ atoms.double().T, atol=precision, rtol=precision)
    torch.testing.assert_close(found.linear, atoms.double() @ target, atol=precision, rtol=precision)
    blocked = nnls(VectorProblem(atoms, target))
    monkeypatch.undo()
    torch.testing.assert_close(blocked.weights, nnls(VectorProblem(atoms, target)).weights, atol=1e-3, rtol=0)


# -- directions that do not count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r", [1, 3])
def test_without_is_as_if_the_vectors_had_been_projected(method, r):
    atoms, target, _ = planted()
    directions = normal(r, 40, seed=5)
    directions = torch.cat([directions, directions.sum(0, keepdim=True), torch.zeros(1, 40)])  # dependent, and none
    nuisance = NuisanceProducts(directions @ atoms.T, directions @ target, directions @ directions.T)
    expected = method(gram_problem(off(atoms, directions), off(target, directions)))
    for bare in (gram_problem(atoms, target).without(nuisance), VectorProblem(atoms, target).without(directions)):
        found = method(bare)
        assert found.rows == expected.rows
        torch.testing.assert_close(found.weights, expected.weights, atol=1e-4, rtol=1e-4)
        assert found.residual == pytest.approx(expected.residual, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_mean_nothing_along_it_is_left(kind):
    atoms, target, _ = planted()
    atoms[3] = math.nan
    atoms[4] = 5 * atoms[[row for row in range(60) if row not in (3, 4)]].sum(0)  # along the mean that it is part of
    problem = kind(atoms, target)
    bare = problem.without(problem.mean())
    assert not bare.usable[[3, 4]].any()
    assert bare.usable.sum() == 58
    assert bare.without(bare.mean()).square == pytest.approx(bare.square)
    only = kind(atoms, atoms[4] * 2)
    with pytest.raises(SettingError, match="weight difference is zero"):
        nnls(only.without(only.mean()))


def test_without_twice_is_without_both():
    atoms, target, _ = planted()
    one, other = normal(1, 40, seed=5), normal(2, 40, seed=6)
    twice, once = (
        nnls(problem)
        for problem in (
            VectorProblem(atoms, target).without(one).without(other),
            VectorProblem(atoms, target).without(torch.cat([one, other])),
        )
    )
    torch.testing.assert_close(twice.weights, once.weights)


# -- worked by hand


def test_three_atoms_worked_by_hand():
    """T = (3, 4, 0).

    Cosine: rows 0, 1, 2 alone have .6, .8 and 7 / (5 sqrt 2) = .99, so 2 first. With row 1 added, (1, 2, 0), it is
    11 / (5 sqrt 5) = .984, with row 0, (2, 1, 0), 10 / (5 sqrt 5) = .894: neither is above .99. The step for row 2
    that fits is <(1, 1, 0), T> / 2 = 3.5. Of nnls without row 2 the weights are T itself.
    """
    atoms, target = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0], [0, 0, 1.0]]), torch.tensor([3.0, 4.0, 0])
    free = cosine(gram_problem(atoms, target))
    assert (free.rows, free.stopped, free.steps) == ([2], "nothing to gain", 1)
    assert free.cosine == pytest.approx(7 / (5 * 2**0.5))
    assert free.weights.tolist() == pytest.approx([0, 0, 3.5, 0])
    assert cosine(gram_problem(atoms, target), count=2).rows == [2, 1]
    # At alpha = 3: gains 6 <g, T> - 9 |g|^2 are 9, 15, 24, -9; then R = (0, 1, 0): -9, -3, -9.
    found = matching(gram_problem(atoms, target), alpha=3.0)
    assert (found.rows, found.stopped) == ([2], "nothing to gain")
    assert found.residual == pytest.approx(1 / 5)
    assert found.scores.tolist() == pytest.approx([-9 / 25, -3 / 25, 2, -9 / 25])
    fitted = nnls(gram_problem(atoms[[0, 1, 3]], target), **TIGHT)
    assert fitted.weights.tolist() == pytest.approx([3, 4, 0])
    assert (fitted.rows, fitted.residual) == ([1, 0], pytest.approx(0, abs=1e-7))
    assert fitted.cosine == pytest.approx(1)


def test_scores_rank_all_rows():
    atoms, target, _ = planted()
    atoms[7], atoms[8] = 0, math.inf
    for method in METHODS:
        found = method(gram_problem(atoms, target), count=5)
        assert found.scores.argsort(descending=True, stable=True)[:5].tolist() == found.rows
        assert sorted((found.scores == -math.inf).nonzero()[:, 0].tolist()) == [7, 8]
        assert len({*found.scores.tolist()}) >= 58
    left = nnls(gram_problem(atoms, target))
    assert (left.scores[left.weights == 0] <= 0).all()
    assert (left.scores[left.weights > 0] == left.weights[left.weights > 0]).all()


# -- whatever the numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_disjoint_atoms_are_recovered_exactly(kind, method, m, seed):
    """One step of SGD on examples whose gradients share nothing: these and no other, without being told how many."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    atoms = torch.eye(30)[order]
    members = sorted(torch.randperm(30, generator=torch.Generator().manual_seed(seed + 1))[:m].tolist())
    found = method(kind(atoms, 0.1 * atoms[members].sum(0)))
    assert sorted(found.rows) == members
    assert found.weights[members].tolist() == pytest.approx([0.1] * m, rel=1e-3)
    assert found.residual == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_order_of_the_rows_does_not_matter(method, seed):
    atoms, target, _ = planted(seed=seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    one, other = (method(gram_problem(some, target), count=8) for some in (atoms, atoms[order]))
    assert one.rows == order[other.rows].tolist()
    torch.testing.assert_close(one.scores[order], other.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_scaling_the_target_scales_the_weights_alone(kind, method, factor):
    atoms, target, _ = planted()
    one, other = method(kind(atoms, target)), method(kind(atoms, factor * target))
    assert other.rows == one.rows
    torch.testing.assert_close(other.weights, factor * one.weights)
    assert (other.residual, other.cosine) == pytest.approx((one.residual, one.cosine), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_atoms_share_their_weight(kind):
    atoms, target = normal(20, 40), normal(20, 40)[:6].sum(0) + 0.1 * normal(40, seed=3)
    alone = nnls(kind(atoms, target), **TIGHT).weights
    both = nnls(kind(torch.cat([atoms, atoms[:1]]), target), **TIGHT).weights
    assert both[0] == pytest.approx(both[20].item(), rel=1e-6)
    assert (both[0] + both[20]).item() == pytest.approx(alone[0].item(), rel=1e-5)
    torch.testing.assert_close(both[1:20], alone[1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gram_and_atoms_agree(method):
    atoms, target, _ = planted(n=200, k=150, m=20)
    one, other = (method(kind(atoms.float(), target.float()), count=20) for kind in KINDS)
    assert one.rows == other.rows
    torch.testing.assert_close(one.weights, other.weights, atol=1e-4, rtol=1e-3)
    assert one.residual == pytest.approx(other.residual, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_rows_are_found_and_bfloat16_finds_nearly_the_same(kind):
    atoms, target, members = planted(n=300, k=400, m=20)
    for method in METHODS:
        fine, coarse = (method(kind(some, target), count=20) for some in (atoms.float(), atoms.bfloat16()))
        assert len({*fine.rows} & {*members}) >= (20 if method is nnls else 15)
        assert len({*fine.rows} & {*coarse.rows}) >= 18
        assert coarse.residual == pytest.approx(fine.residual, abs=0.02)


def test_atoms_may_be_a_memory_map(tmp_path):
    atoms, target, _ = planted()
    file = tmp_path / "atoms"
    file.write_bytes(atoms.float().numpy().tobytes())
    mapped = torch.from_file(str(file), size=60 * 40, dtype=torch.float32).view(60, 40)
    for method in METHODS:
        assert method(VectorProblem(mapped, target)).rows == method(VectorProblem(atoms.float(), target)).rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_rows_without_a_finite_gradient_are_never_taken_and_change_nothing(kind, method):
    atoms, target, _ = planted()
    spoiled = torch.cat([atoms, torch.full((1, 40), math.nan), torch.zeros(1, 40), torch.full((1, 40), math.inf)])
    spoiled[60, 1:] = 0.5
    one, other = method(kind(atoms, target)), method(kind(spoiled, target))
    assert one.rows == other.rows
    torch.testing.assert_close(one.weights, other.weights[:60])
    assert other.weights[60:].tolist() == [0, 0, 0]
    assert other.scores[60:].tolist() == [-math.inf] * 3
    all_of_them = method(kind(spoiled, target), count=1000)
    assert sorted(all_of_them.rows) == list(range(60))
    assert len(other.weights) == len(other.scores) == 63


@pytest.mark.parametrize("method", METHODS)
def test_same_problem_same_answer(method):
    atoms, target, _ = planted()
    one, other = method(gram_problem(atoms, target)), method(gram_problem(atoms, target))
    assert one.rows == other.rows
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_points_away_from_all_finds_nothing(method):
    found = method(gram_problem(torch.eye(3), -torch.ones(3)))
    assert found.rows == []
    assert (found.residual, found.cosine) == (1.0, 0.0)
    assert found.scores.isfinite().all()


def test_a_start_changes_the_way_and_not_the_end():
    atoms, target = normal(30, 40), normal(40, seed=1)
    cold = nnls(gram_problem(atoms, target), **TIGHT)
    warm = nnls(gram_problem(atoms, target), start=cold.weights, **TIGHT)
    other = nnls(gram_problem(atoms, target), start=torch.full((30,), 0.5), **TIGHT)
    torch.testing.assert_close(warm.weights, cold.weights)
    torch.testing.assert_close(other.weights, cold.weights, atol=1e-6, rtol=0)
    assert warm.steps < cold.steps


def test_a_fit_that_was_cut_short_says_so():
    atoms, target, _ = planted()
    assert "2 steps, " in nnls(gram_problem(atoms, target), limit=2).stopped


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_work_is_told(method):
    atoms, target, _ = planted()
    with pytest.raises(SettingError, match=r"weight difference is zero.*weights that moved"):
        method(gram_problem(atoms, 0 * target))
    with pytest.raises(SettingError, match="weight difference is not finite"):
        method(gram_problem(atoms, math.nan * target))
    with pytest.raises(SettingError, match="none of 60 atoms"):
        method(gram_problem(0 * atoms, target))
    with pytest.raises(SettingError, match="count 0"):
        method(gram_problem(atoms, target), count=0)


def test_settings_out_of_range_are_told():
    atoms, target, _ = planted()
    with pytest.raises(SettingError, match=r"alpha -1.0 of matching"):
        matching(gram_problem(atoms, target), alpha=-1.0)
    with pytest.raises(SettingError, match=r"l1 1.0 of nnls"):
        nnls(gram_problem(atoms, target), l1=1.0)


# -- mixtures


def sources_of(counts, k=300, seed=0, spread=1.0):
    """Rows about a mean for each source, and another such draw."""
    means = normal(len(counts), k, seed=seed)
    names = [f"s{number}" for number, count in enumerate(counts) for _ in range(count)]
    numbers = torch.tensor([int(name[1:]) for name in names])
    return means[numbers] + spread * normal(len(names), k, seed=seed + 1), names, means


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_is_the_share_of_rows_whatever_the_pool_holds(kind):
    """Trained on 60, 30, 10 and 0 rows that are not in the pool, which has 100, 200, 50 and 80 of the sources."""
    pool, names, means = sources_of([100, 200, 50, 80])
    trained = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    target = 0.02 * (means[trained] + normal(100, 300, seed=9)).sum(0)
    found = mixture(kind(pool, target), names, seed=1)
    assert found.sources == ["s0", "s1", "s2", "s3"]
    assert found.shares == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.02)
    assert sum(found.shares) == pytest.approx(1)
    for share, (low, high) in zip((0.6, 0.3, 0.1, 0), found.intervals, strict=True):
        assert low <= share <= high < low + 0.1
    assert found.rows == pytest.approx(100, rel=0.25)
    assert mixture(kind(pool, target), names, seed=1) == found
    assert mixture(kind(pool, target), names, seed=2).intervals != found.intervals


def test_mixture_intervals_cover():
    """Of 24 trainings on 20 and 10 rows, noise far above the means' distance; nominal coverage is .95."""
    covered = 0
    for seed in range(24):
        pool, names, means = sources_of([80, 120], k=100, seed=10 * seed, spread=3.0)
        trained = torch.tensor([0] * 20 + [1] * 10)
        target = (means[trained] + 3.0 * normal(30, 100, seed=10 * seed + 5)).sum(0)
        low, high = mixture(gram_problem(pool, target), names, resamples=100).intervals[0]
        covered += low <= 2 / 3 <= high
    assert covered >= 20


def test_mixture_leaves_out_what_is_not_usable():
    pool, names, _ = sources_of([50, 50])
    target = pool[:10].sum(0)
    spoiled = torch.cat([pool, torch.full((2, 300), math.nan)])
    one = mixture(gram_problem(pool, target), names)
    other = mixture(gram_problem(spoiled, target), [*names, "s0", "none"])
    assert other.sources == ["s0", "s1"]
    assert one.shares == pytest.approx(other.shares)
    with pytest.raises(SettingError, match="no source explains"):
        mixture(gram_problem(torch.eye(2), -torch.ones(2)), ["a", "b"])


def test_mixture_of_single_rows_has_no_spread():
    found = mixture(gram_problem(torch.eye(2), torch.tensor([3.0, 1.0])), ["a", "b"])
    assert found.shares == pytest.approx([0.75, 0.25])
    assert found.residual == pytest.approx(0, abs=1e-6)


def test_nnls_may_rank_by_the_part_that_a_row_adds():
    """T = 1 (3, 0) + 2 (0, 1): the second atom has the larger weight, the first adds the longer part."""
    problem = gram_problem(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, 2.0]))
    assert nnls(problem).rows == [1, 0]
    found = nnls(problem, by="contribution")
    assert found.rows == [0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(found.weights, torch.tensor([1.0, 2.0]))
    with pytest.raises(SettingError, match="choose weight or contribution"):
        nnls(problem, by="size")
