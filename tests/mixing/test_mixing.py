"""Mixing laws: tables and their mistakes, planted laws, optima under caps, and `whence mix law` as a user types it."""

import builtins
import csv
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import write_jsonl
from whence import catalogue
from whence.errors import CorpusError, MissingExtraError, SettingError, UnknownNameError
from whence.mixing.laws.exponential import ExpLaw
from whence.mixing.laws.ridge import EPS, PENALTIES, RidgeLaw
from whence.mixing.pipeline import _notes, cross_validated, mix_law
from whence.mixing.simplex import availability_caps, capped, critical_ratio, optimum, share_outside
from whence.mixing.tables import MixtureTable, read_mixture_table
from whence.numerics import mean_spearman, order_codes, spearman

REGMIX = Path(__file__).parents[3] / "shared/data/mixtures"
LAWS = list(catalogue.MIXING_LAWS)
DOMAINS = ("code", "news", "web")
SETS = ("bbh", "gsm8k")


def made(name):
    """A law's class; skips where its package is missing."""
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    return catalogue.mixing_law(name)


def planted(domains=3, sets=2, seed=0):
    """An exponential law with parameters as RegMix's tables have them."""
    rng = np.random.default_rng(seed)
    return ExpLaw(
        domains=tuple(f"d{number}" for number in range(domains)),
        sets=tuple(f"s{number}" for number in range(sets)),
        c=rng.uniform(1, 3, sets),
        b=rng.uniform(-0.5, 0.5, sets),
        t=rng.normal(0, 1.5, (sets, domains)),
    )


def table_of(law, rows, seed=1, noise=0.0):
    """Mixtures and what a law makes of them."""
    rng = np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.ones(len(law.domains)), rows)
    losses = law.predict(mixtures) + noise * rng.normal(size=(rows, len(law.sets)))
    return MixtureTable(domains=law.domains, sets=law.sets, mixtures=mixtures, losses=losses)


def others(law, rows=200, seed=2):
    return np.random.default_rng(seed).dirichlet(np.ones(len(law.domains)), rows)


# -- laws


def test_a_planted_law_is_recovered_in_its_predictions_and_its_parameters():
    law = planted(domains=6, sets=3)
    found = ExpLaw.fit(table_of(law, 48))
    new = others(law)
    spread = law.predict(new).std(0)
    assert (np.abs(found.predict(new) - law.predict(new)).max(0) < 0.01 * spread).all()
    np.testing.assert_allclose(found.c, law.c, atol=0.02)
    np.testing.assert_allclose(found.t, law.t - law.t.mean(1, keepdims=True), atol=0.05)  # the mean belongs to b
    np.testing.assert_allclose(found.b, law.b + law.t.mean(1), atol=0.05)


def test_an_outlier_does_not_bend_the_exponential_law():
    law = planted(domains=4, sets=1)
    table = table_of(law, 60, noise=0.005)
    losses = table.losses.copy()
    losses[:3] += 20 * losses.std()
    bent = MixtureTable(domains=law.domains, sets=law.sets, mixtures=table.mixtures, losses=losses)
    new = others(law)
    assert np.abs(ExpLaw.fit(bent).predict(new) - law.predict(new)).mean() < 0.1 * law.predict(new).std()


def test_ridge_is_the_closed_form_of_the_least_leave_one_out_error():
    law = planted(domains=4, sets=1)
    table = table_of(law, 20, noise=0.1)
    y, n = table.losses[:, 0], table.n

    def solved(rows, eps, penalty, new):
        """Normal equations, with columns standardised over the whole table and an intercept that is free."""
        columns = np.hstack([table.mixtures, np.log(table.mixtures + eps)])
        columns = np.hstack([np.ones((n, 1)), (columns - columns.mean(0)) / columns.std(0)])
        free = penalty * np.diag([0.0, *np.ones(8)])
        weights = np.linalg.solve(columns[rows].T @ columns[rows] + free, columns[rows].T @ y[rows])
        return columns[new] @ weights

    def error(eps, penalty):
        left_out = [solved(np.arange(n) != row, eps, penalty, [row])[0] - y[row] for row in range(n)]
        return np.mean(np.square(left_out))

    eps, penalty = min(itertools.product(EPS, PENALTIES), key=lambda pair: error(*pair))
    found = RidgeLaw.fit(table)
    assert (found.eps[0], found.penalties[0]) == (eps, penalty)
    expected = solved(np.arange(n), eps, penalty, np.arange(n))
    np.testing.assert_allclose(found.predict(table.mixtures)[:, 0], expected, rtol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_every_law_says_what_it_was_fitted_to_and_predicts_it(name):
    law = planted(domains=4)
    table = table_of(law, 60)
    found = made(name).fit(table, seed=0)
    assert (found.domains, found.sets) == (table.domains, table.sets)
    new = others(law, 50)
    predicted = found.predict(new)
    assert predicted.shape == (50, 2) and predicted.dtype == np.float64
    for place in range(2):
        assert spearman(*torch.from_numpy(np.stack([predicted, law.predict(new)])[:, :, place])) > 0.8
    np.testing.assert_array_equal(made(name).fit(table, seed=0).predict(new), predicted, "same seed, same law")


@pytest.mark.parametrize("name", ["exp", "ridge"])
def test_the_order_of_domains_and_the_unit_of_losses_do_not_matter(name):
    law = planted(domains=5)
    table, new, order = table_of(law, 40, noise=0.05), others(law), np.array([3, 0, 4, 2, 1])
    predicted = made(name).fit(table).predict(new)
    turned = MixtureTable(
        domains=tuple(law.domains[place] for place in order),
        sets=law.sets,
        mixtures=table.mixtures[:, order],
        losses=table.losses,
    )
    np.testing.assert_allclose(made(name).fit(turned).predict(new[:, order]), predicted, atol=1e-6)
    scaled = MixtureTable(domains=law.domains, sets=law.sets, mixtures=table.mixtures, losses=7 + 100 * table.losses)
    np.testing.assert_allclose(made(name).fit(scaled).predict(new), 7 + 100 * predicted, rtol=1e-6)


@pytest.mark.parametrize("name", ["exp", "ridge"])
def test_slopes_are_the_derivatives_of_predictions(name):
    law = planted(domains=4)
    found, at = made(name).fit(table_of(law, 40)), np.array([0.1, 0.2, 0.3, 0.4])
    step = 1e-6 * np.eye(4)
    numeric = (found.predict(at + step) - found.predict(at - step)) / 2e-6
    np.testing.assert_allclose(found.slopes(at), numeric.T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LAWS)
def test_a_loss_that_never_changes_is_predicted_and_has_no_rank(name):
    law = planted(domains=3)
    table = table_of(law, 40)
    losses = np.column_stack([table.losses[:, 0], np.full(40, 2.5)])
    flat = MixtureTable(domains=law.domains, sets=("moves", "stays"), mixtures=table.mixtures, losses=losses)
    np.testing.assert_allclose(made(name).fit(flat).predict(others(law))[:, 1], 2.5, atol=1e-6)
    held_out = cross_validated(flat, name, folds=4)
    assert held_out.sets["stays"].spearman is None and held_out.sets["moves"].spearman > 0.8
    assert held_out.overall.spearman == pytest.approx(held_out.sets["moves"].spearman)


@pytest.mark.parametrize("name", ["exp", "ridge"])
def test_a_domain_that_no_mixture_has_breaks_nothing(name):
    law = planted(domains=4)
    mixtures = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    mixtures = np.hstack([mixtures, np.zeros((40, 1))])
    table = MixtureTable(domains=law.domains, sets=law.sets, mixtures=mixtures, losses=law.predict(mixtures))
    found = made(name).fit(table)
    assert (np.abs(found.predict(mixtures) - table.losses).mean(0) < 0.2 * table.losses.std(0)).all()
    assert np.isfinite(found.predict(np.eye(4))).all()


@pytest.mark.parametrize(("name", "least"), [("exp", 12), ("ridge", 8), ("lightgbm", 12)])
def test_too_few_rows_are_told(name, least):
    law = planted(domains=10)
    with pytest.raises(SettingError, match=f"{least - 1} mixtures of 10 domains: --law {name} needs {least}"):
        made(name).fit(table_of(law, least - 1))


def test_without_lightgbm_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "lightgbm":
            raise ImportError("No module named 'lightgbm'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'whence\[laws\]'"):
        catalogue.mixing_law("lightgbm").fit(table_of(planted(), 20))


def test_every_law_shows_its_source_in_its_file():
    for name, entry in catalogue.MIXING_LAWS.items():
        file = Path(sys.modules[entry.load().__module__].__file__)
        assert entry.source.split()[1] in file.read_text(), name


# -- held-out errors


def test_cross_validation_never_shows_a_law_what_it_predicts():
    seen = []

    class Spy(RidgeLaw):
        @classmethod
        def fit(cls, table, *, seed=0):
            seen.append({tuple(row) for row in table.mixtures.round(9)})
            return RidgeLaw.fit(table, seed=seed)

    table = table_of(planted(), 20)
    twice = MixtureTable(
        domains=table.domains,
        sets=table.sets,
        mixtures=np.vstack([table.mixtures] * 2),
        losses=np.vstack([table.losses] * 2),
    )
    held_out = cross_validated(twice, Spy, folds=5)
    assert len(seen) == 5 and held_out.predicted.shape == (40, 2)
    assert all(len(rows) == 16 for rows in seen), "both copies of a mixture are held out together"
    np.testing.assert_allclose(held_out.predicted[:20], held_out.predicted[20:])


def test_grades_are_those_of_the_held_out_predictions():
    held_out = cross_validated(table_of(planted(), 30, noise=0.1), "exp", folds=5, seed=3)
    pairs = np.stack([held_out.predicted, held_out.table.losses])
    by_set = [spearman(*torch.from_numpy(pairs[:, :, place])) for place in range(2)]
    for place, grade in enumerate(held_out.sets.values()):
        assert grade.error == pytest.approx(np.abs(pairs[0] - pairs[1])[:, place].mean())
        assert grade.spearman == pytest.approx(by_set[place])
        assert grade.error_interval[0] < grade.error < grade.error_interval[1]
        assert grade.spearman_interval[0] < grade.spearman <= grade.spearman_interval[1]
    assert held_out.overall.spearman == pytest.approx(np.mean(by_set))
    again = cross_validated(held_out.table, "exp", folds=5, seed=3)
    np.testing.assert_array_equal(again.predicted, held_out.predicted)


def test_the_fast_rank_correlation_is_that_of_numerics_with_ties():
    pairs = torch.randint(5, (30, 3, 2), generator=torch.Generator().manual_seed(0)).double() - 2.5
    expected = np.mean([spearman(pairs[:, place, 0], pairs[:, place, 1]) for place in range(3)])
    assert mean_spearman(order_codes(pairs)) == pytest.approx(expected)
    again = torch.randint(30, (30,), generator=torch.Generator().manual_seed(1))
    expected = np.mean([spearman(pairs[again, place, 0], pairs[again, place, 1]) for place in range(3)])
    assert mean_spearman(order_codes(pairs)[again]) == pytest.approx(expected), "of a resample"
    alike = torch.zeros(30, dtype=torch.int64)
    assert mean_spearman(order_codes(pairs)[alike]) == 0
    several = mean_spearman(order_codes(pairs)[torch.stack([again, alike])])
    assert several.tolist() == pytest.approx([expected, 0]), "of several resamples at once"


def test_folds_that_leave_too_few_rows_are_told():
    table = table_of(planted(domains=6), 9)
    with pytest.raises(SettingError, match="needs 8, and 3 folds leave 6"):
        cross_validated(table, "exp", folds=3)
    with pytest.raises(SettingError, match="--folds 1: two at least"):
        cross_validated(table, "exp", folds=1)
    assert cross_validated(table, "exp", folds=50).folds == 9, "at most one mixture a fold"


# -- the simplex


def grid(steps=200):
    """Every mixture of three domains in steps of 1 / 200."""
    pairs = [(i, j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    return np.array([(i, j, steps - i - j) for i, j in pairs]) / steps


@pytest.mark.parametrize("caps", [{}, {"d0": 0.3}, {"d0": 0.25, "d1": 0.2}, {"d0": 0.5, "d1": 0.3, "d2": 0.2}])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_brute_force_and_within_caps(caps, seed):
    law = planted(seed=seed)
    found = optimum(law, caps=caps)
    most = np.array([caps.get(name, 1.0) for name in law.domains])
    assert (found.mixture <= most + 1e-12).all() and (found.mixture >= 0).all()
    assert found.mixture.sum() == pytest.approx(1, abs=1e-12)
    every = grid()
    values = law.predict(every[(every <= most + 1e-9).all(1)]).mean(1)
    assert found.objective <= values.min() + 1e-9
    assert found.objective >= values.min() - 0.02, "the grid is fine enough to be near"
    assert found.gap < 1e-5
    assert found.objective == pytest.approx(law.predict(found.mixture[None]).mean())


def test_targets_weigh_the_sets():
    law = planted(seed=1)
    for place, name in enumerate(law.sets):
        found = optimum(law, {name: 3.0})
        assert found.objective == pytest.approx(law.predict(grid())[:, place].min(), abs=0.01)
        assert found.objective == pytest.approx(found.predicted[place])


def test_a_law_without_slopes_is_searched_within_caps():
    law = planted(seed=2)

    class Opaque:
        domains, sets, is_convex = law.domains, law.sets, False
        formula, terms = "", ()
        predict = staticmethod(law.predict)

        def slopes(self, mixture):
            return None

    caps = {"d0": 0.3, "d2": 0.6}
    exact, found = optimum(law, caps=caps), optimum(Opaque(), caps=caps)
    assert found.gap is None
    assert found.mixture.sum() == pytest.approx(1, abs=1e-12)
    assert found.mixture[0] <= 0.3 and found.mixture[2] <= 0.6
    assert exact.objective - 1e-9 <= found.objective < exact.objective + 0.02
    np.testing.assert_array_equal(optimum(Opaque(), caps=caps).mixture, found.mixture, "same seed, same draws")
    least = np.array([0.1, 0.2, 0.5])
    assert (optimum(Opaque(), caps=caps, floors=least).mixture >= least).all()


def test_ridge_is_descended_to_what_brute_force_finds():
    found = RidgeLaw.fit(table_of(planted(seed=3), 40))
    assert optimum(found).objective <= found.predict(grid()).mean(1).min() + 1e-9


def test_capping_fills_others_in_proportion_and_is_exact():
    rng = np.random.default_rng(0)
    mixtures, caps = rng.dirichlet(np.full(6, 0.3), 500), np.array([0.1, 0.3, 0.0, 0.25, 0.2, 0.4])
    inside = capped(mixtures, caps)
    np.testing.assert_allclose(inside.sum(1), 1, atol=1e-12)
    assert (inside >= 0).all() and (inside <= caps + 1e-12).all()
    np.testing.assert_allclose(capped(inside, caps), inside, atol=1e-12, err_msg="what is within stays")
    assert capped(np.array([[1.0, 0.0, 0.0]]), np.array([0.0, 0.5, 1.0]))[0] == pytest.approx([0, 1 / 3, 2 / 3])
    tight = np.array([0.2, 0.5, 0.3])
    assert capped(np.array([[0.9, 0.05, 0.05]]), tight)[0] == pytest.approx(tight)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"caps": {"d0": 0.3, "d1": 0.3, "d2": 0.3}}, "caps of all 3 domains sum to 0.9"),
        ({"caps": {"d0": 1.5}}, "--cap d0=1.5: a share from 0 to 1"),
        ({"caps": {"d0": -0.1}}, "--cap d0=-0.1: a number of 0 or more"),
        ({"caps": {"d00": 0.1}}, "--cap d00: the table has no domain of this name. Did you mean d0? There are d0, d1"),
        ({"set_weights": {"s9": 1.0}}, "--target s9: the table has no evaluation set of this name"),
        ({"set_weights": {"s0": 0.0}}, "--target: all weights are 0"),
        ({"set_weights": {"s0": math.nan}}, "--target s0=nan"),
    ],
)
def test_what_no_mixture_can_meet_is_told(arguments, told):
    with pytest.raises(SettingError, match=told.replace("?", r"\?")):
        optimum(planted(), **arguments)


def test_caps_come_from_the_tokens_that_there_are():
    assert availability_caps({"a": 100.0, "b": 900.0}, 1000.0, epochs=2.0) == {"a": 0.2, "b": 1.0}
    with pytest.raises(SettingError, match="numbers above 0 do"):
        availability_caps({"a": 100.0}, 0.0)


def test_the_share_outside_is_how_much_would_have_to_move():
    corners = np.array([[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.4, 0.4, 0.2]])
    table = MixtureTable(domains=DOMAINS, sets=("x",), mixtures=corners, losses=np.ones((3, 1)))
    assert share_outside(table, corners.mean(0)) == pytest.approx(0, abs=1e-9)
    assert share_outside(table, np.array([1.0, 0.0, 0.0])) == pytest.approx(0.2)
    assert share_outside(table, np.array([0.0, 0.0, 1.0])) == pytest.approx(0.8)


# -- the critical ratio


def two_domains(t_replay):
    """L = 1 + exp(b + t . r) of a replayed and a new domain."""
    t = np.array([[t_replay, 0.5]])
    return ExpLaw(domains=("replay", "new"), sets=("old",), c=np.ones(1), b=np.full(1, 0.2), t=t)


def test_the_critical_ratio_by_hand():
    law, before = two_domains(-1.0), 1.0 + math.exp(-0.4)
    # 0.2 - r + 0.5 (1 - r) = -0.4 at r = 1.1 / 1.5
    found = critical_ratio(law, "old", "replay", before)
    assert found.share == pytest.approx(1.1 / 1.5) and found.side == "from" and not found.reason
    new = critical_ratio(law, "old", "new", before)
    assert new.share == pytest.approx(0.4 / 1.5) and new.side == "up to"
    np.testing.assert_allclose(law.predict(np.array([[found.share, 1 - found.share]])), before)


def test_the_critical_ratio_keeps_the_others_in_proportion():
    t = np.array([[-1.0, 0.5, 2.0]])
    law = ExpLaw(domains=("replay", "a", "b"), sets=("old",), c=np.ones(1), b=np.zeros(1), t=t)
    found = critical_ratio(law, "old", "replay", 2.0, others=np.array([0.5, 0.3, 0.2]))
    rest = 0.6 * 0.5 + 0.4 * 2.0  # of three to two
    assert found.share == pytest.approx(rest / (1 + rest))


@pytest.mark.parametrize(("before", "why"), [(1.05, "always higher"), (9.0, "never higher")])
def test_no_critical_ratio_is_a_reason(before, why):
    found = critical_ratio(two_domains(-1.0), "old", "replay", before)
    assert found.share is None and found.reason == f"{why}: 1.449 to 3.014 is predicted, whatever the share"


def test_both_ends_of_a_predicted_range_have_three_decimals():
    law = ExpLaw(domains=("replay", "new"), sets=("old",), c=np.ones(1), b=np.zeros(1), t=np.log([[2.79, 2.776]]))
    assert critical_ratio(law, "old", "replay", 9.0).reason.startswith("never higher: 3.776 to 3.790 is")


def test_a_critical_ratio_may_be_an_end():
    law = two_domains(-1.0)
    assert critical_ratio(law, "old", "replay", float(law.predict(np.eye(2))[0, 0])).share == 1.0
    assert critical_ratio(law, "old", "replay", float(law.predict(np.eye(2))[1, 0])).share == 0.0
    with pytest.raises(SettingError, match="no evaluation set of this name"):
        critical_ratio(law, "odl", "replay", 2.0)


# -- tables and files


def rows_of(table):
    """As a single table with prefixes."""
    shares = [
        {f"train_{name}": value for name, value in zip(table.domains, row, strict=True)}
        for row in table.mixtures.tolist()
    ]
    losses = [
        {f"metric/{name}_loss": value for name, value in zip(table.sets, row, strict=True)}
        for row in table.losses.tolist()
    ]
    return [{"index": number, **share, **loss} for number, (share, loss) in enumerate(zip(shares, losses, strict=True))]


def write_csv(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def small():
    return table_of(planted(seed=5), 24, noise=0.01)


def split(rows):
    """The same rows as two files of shares and losses, the second in another order."""
    shares = [{name: value for name, value in row.items() if not name.startswith("metric")} for row in rows]
    losses = [{name: value for name, value in row.items() if not name.startswith("train")} for row in rows]
    return shares, losses[::-1]


def same(found, table):
    assert (found.domains, found.sets) == (table.domains, table.sets)
    np.testing.assert_allclose(found.mixtures, table.mixtures)
    np.testing.assert_allclose(found.losses, table.losses)


def test_every_layout_gives_the_same_table(small, tmp_path):
    rows = rows_of(small)
    shares, losses = split(rows)
    plain = [{name.removeprefix("train_"): value for name, value in row.items()} for row in shares]
    nested = [
        {
            "mixture": dict(zip(small.domains, mixture, strict=True)),
            "loss": dict(zip(small.sets, loss, strict=True)),
        }
        for mixture, loss in zip(small.mixtures.tolist(), small.losses.tolist(), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "one.parquet")
    same(read_mixture_table(rows), small)
    same(read_mixture_table(write_csv(tmp_path / "one.csv", rows)), small)
    same(read_mixture_table(str(tmp_path / "one.parquet")), small)
    same(read_mixture_table(write_jsonl(tmp_path / "nested.jsonl", nested)), small)
    same(read_mixture_table(write_csv(tmp_path / "m.csv", shares), write_csv(tmp_path / "l.csv", losses)), small)
    same(read_mixture_table(plain, losses), small)
    unkeyed = [{name: value for name, value in row.items() if name != "index"} for row in losses[::-1]]
    same(read_mixture_table(shares, unkeyed), small)


def test_the_long_layout_of_ablate_is_read(small):
    shares = [
        {"name": f"m{number}", "weights": dict(zip(small.domains, row, strict=True))}
        for number, row in enumerate(small.mixtures.tolist())
    ]
    long = [
        {"mixture": f"m{row}", "set": name, "merged": small.losses[row, place] + 1, "truth": small.losses[row, place]}
        for place, name in enumerate(small.sets)
        for row in range(small.n)
    ]
    found = read_mixture_table(shares, long)
    same(found, small)
    assert found.column == "truth"
    named = {row["name"]: row["weights"] for row in shares}
    same(read_mixture_table([row | {"weights": named[row["mixture"]]} for row in long]), small)
    with pytest.raises(SettingError, match="row 0: no column name, by which"):
        read_mixture_table([{"weights": row["weights"]} for row in shares], long)
    half = [row | ({"truth": None} if number else {}) for number, row in enumerate(long)]
    assert read_mixture_table(shares, half).column == "merged"
    assert "which were not trained" in mix_law(shares, half, law="ridge", folds=3).notes[0]
    with pytest.raises(SettingError, match="mixture m0 has two losses on s0"):
        read_mixture_table(shares, [*long, long[0]])
    with pytest.raises(SettingError, match="without a loss in every one"):
        read_mixture_table(shares, [{"mixture": "m0", "set": "s0"}])


def test_a_domain_that_an_object_leaves_out_has_no_share():
    rows = [{"mixture": {"a": 1.0}, "loss": {"x": 2.0}}, {"mixture": {"a": 0.5, "b": 0.5}, "loss": {"x": 3.0}}]
    assert read_mixture_table(rows).mixtures.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_prefixes_can_be_said():
    rows = [{"p.a": 0.4, "p.b": 0.6, "ppl x": 2.0, "seconds": "long"}, {"p.a": 1, "p.b": 0, "ppl x": 3, "seconds": ""}]
    found = read_mixture_table(rows, mixture_prefix="p.", loss_prefix="ppl ")
    assert (found.domains, found.sets) == (("a", "b"), ("x",))
    with pytest.raises(
        SettingError, match=r"no column of losses begins with nats\. Columns are p\.a, p\.b, ppl x, seconds"
    ):
        read_mixture_table(rows, mixture_prefix="p.", loss_prefix="nats")


def test_shares_are_made_to_sum_to_one_within_rounding():
    table = MixtureTable(domains=("a", "b"), sets=("x",), mixtures=np.array([[0.33, 0.66]]), losses=np.ones((1, 1)))
    assert table.mixtures.sum() == pytest.approx(1, abs=1e-15)


def broken(**cells):
    """Two good rows and a bad one, in csv's own words."""
    good = {"index": "1", "train_a": "0.4", "train_b": "0.6", "metric/x": "3.1"}
    return [good, good | {"index": "2"}, good | {"index": "3"} | cells]


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"train_a": "nan"}, "t.csv:4: a is nan, which is not finite"),
        ({"train_a": "-0.2", "train_b": "1.2"}, "t.csv:4: a is -0.2, which is negative"),
        ({"train_a": "0.7"}, "t.csv:4: the shares of 2 domains sum to 1.3, not to 1. They are a, b"),
        ({"train_a": "40", "train_b": "60"}, "sum to 100, not to 1 (percentages? divide them by 100)"),
        ({"metric/x": "inf"}, "t.csv:4: x is inf, which is not finite"),
        ({"metric/x": ""}, "t.csv:4: nothing in column metric/x, where a number is expected"),
        ({"metric/x": "low"}, "t.csv:4: column metric/x holds 'low', where a number is expected"),
    ],
)
def test_what_is_wrong_in_a_table_is_told_by_row_and_column(tmp_path, cells, told):
    with pytest.raises(SettingError) as caught:
        read_mixture_table(write_csv(tmp_path / "t.csv", broken(**cells)))
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shares", "losses", "told"),
    [
        ([{"index": 1, "a": 0.5, "b": 0.5}], [{"index": 2, "x": 3}], "row 0: index 1 has a mixture, but no losses"),
        (
            [{"index": 1, "a": 0.5, "b": 0.5}],
            [{"index": 1, "x": 3}, {"index": 2, "x": 3}],
            "row 1: index 2 has losses, but no mixture",
        ),
        ([{"id": 1, "a": 0.5, "b": 0.5}] * 2, [{"id": 1, "x": 3}], "row 1: id 1 is there twice; before at row 0"),
        ([{"a": 0.5, "b": 0.5}] * 2, [{"x": 3}], "2 rows of mixtures and 1 of losses, without a column index, id or"),
        ([{"a": 1.0}], [{"x": 3}], "1 mixture of 1 domain"),
        ([], None, "no rows"),
        ([{"a": 0.5, "metric/x": 1}], None, "no column of shares begins with train_ or mixture/ or weights/. Columns"),
        ([{"train_a": 0.5, "train_b": 0.5}], None, "or give --losses FILE, or say how they begin: --loss-prefix TEXT"),
        ([{"train_a": 0.5, "mixture": {"a": 0.5}}], [{"x": 1}], "domain a: two columns of this name"),
    ],
)
def test_tables_that_do_not_fit_together_are_told(shares, losses, told):
    with pytest.raises(SettingError) as caught:
        read_mixture_table(shares, losses)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# -- the job and the command line


def test_a_job_suggests_what_the_planted_law_says():
    law = planted(seed=5)
    table = table_of(law, 60)
    found = mix_law(table, caps={"d0": 0.4}, targets={"s1": 1.0}, before={"s1": 3.0}, within=False, folds=4)
    truth = optimum(law, {"s1": 1.0}, caps={"d0": 0.4})
    np.testing.assert_allclose(found.best.mixture, truth.mixture, atol=0.02)
    assert found.best.objective == pytest.approx(truth.objective, abs=0.01)
    assert found.held_out.overall.error < 0.01
    assert {*found.critical["s1"]} == {*law.domains}
    assert found.table.mixtures[found.best_row, 0] <= 0.41, "the best row tried is within the caps too"


def emails(slope):
    """Two domains tried from 20 to 80%, and emails from 1 to 2%: losses fall by `slope` nats a share of emails."""
    rng = np.random.default_rng(0)
    rare = rng.uniform(0.01, 0.02, 30)
    half = rng.uniform(0.2, 0.8, 30)
    mixtures = np.stack([half * (1 - rare), (1 - half) * (1 - rare), rare], 1)
    losses = 3.0 + 0.2 * mixtures[:, :1] - slope * mixtures[:, 2:]
    return MixtureTable(domains=("a", "b", "emails"), sets=("x",), mixtures=mixtures, losses=losses)


@pytest.mark.parametrize("law", ["exp", "ridge"])
def test_a_law_is_asked_only_of_shares_that_were_tried(law):
    table = emails(1.0)
    found = mix_law(table, law=law, before={"x": 2.9}, folds=3)
    least, most = table.mixtures.min(0), table.mixtures.max(0)
    assert (found.best.mixture >= least - 1e-12).all() and (found.best.mixture <= most + 1e-12).all()
    assert found.best.mixture.sum() == pytest.approx(1)
    assert found.best.mixture[2] == pytest.approx(most[2], abs=1e-6)
    assert found.best.objective == pytest.approx(found.law.predict(found.best.mixture[None])[0] @ found.weights)
    assert "whatever" not in found.critical["x"]["emails"].reason
    assert found.document()["settings"]["bounds"] == "from the least to the most tried"


def test_an_optimum_above_floors_is_that_of_brute_force():
    law, floors, caps = planted(seed=1), np.array([0.2, 0.05, 0.1]), {"d0": 0.5, "d1": 0.6, "d2": 0.4}
    found, most = optimum(law, caps=caps, floors=floors), np.array([*caps.values()])
    every = grid()
    inside = every[((every <= most + 1e-9) & (every >= floors - 1e-9)).all(1)]
    values = law.predict(inside).mean(1)
    assert values.min() - 0.02 <= found.objective <= values.min() + 1e-9 and found.gap < 1e-5
    assert (found.mixture >= floors).all() and (found.mixture <= most).all() and found.mixture.sum() == pytest.approx(1)
    only = np.array([0.2, 0.3, 0.5])
    np.testing.assert_array_equal(optimum(law, floors=only).mixture, only, "nothing is left to share out")


def test_a_loss_below_nothing_is_refused_and_extrapolation_is_asked_for():
    law, steep = "ridge", emails(9.0)
    bounded = mix_law(steep, law=law, folds=3)
    assert bounded.best.mixture[2] < 0.021 and bounded.best.predicted.min() > 0
    with pytest.raises(SettingError, match=r"predicts a loss of -.* on x for its best mixture .*--extrapolate"):
        mix_law(steep, law=law, within=False, folds=3)
    wide = mix_law(emails(1.0), law=law, within=False, folds=3)
    assert wide.best.mixture[2] > 0.5 and any("leave out --extrapolate" in note for note in wide.notes)
    ranks = replace(steep, losses=steep.losses - 3)  # not losses, which are never negative
    assert mix_law(ranks, law=law, folds=3).best.predicted.min() < 0
    with pytest.raises(SettingError, match="raise a cap, or add --extrapolate"):
        mix_law(steep, law=law, caps={"a": 0.1})


def test_notes_say_what_should_not_be_believed():
    law = planted(domains=4, seed=5)
    rng = np.random.default_rng(0)
    mixtures = 0.9 * np.full((10, 4), 0.25) + 0.1 * rng.dirichlet(np.ones(4), 10)
    losses = 9 + law.predict(mixtures) + 0.2 * rng.normal(size=(10, 2))
    near = MixtureTable(domains=law.domains, sets=law.sets, mixtures=mixtures, losses=losses)
    notes = " ".join(mix_law(near, folds=5, within=False).notes)
    assert "few mixtures: 10, of 4 domains" in notes
    assert "outside what was tried" in notes
    steep = ExpLaw(domains=("a", "b"), sets=("x",), c=np.ones(1), b=np.zeros(1), t=np.array([[-1.0, 1.0]]))
    table = table_of(steep, 20)
    lucky = table.losses.copy()
    lucky[0] = 0.5
    seen = MixtureTable(domains=steep.domains, sets=("x",), mixtures=table.mixtures, losses=lucky)
    assert "it knows of none better than those tried" in " ".join(mix_law(seen, folds=5).notes)
    found = mix_law(table_of(steep, 20, noise=0.2), folds=5)
    tried, error = found.table.losses[found.best_row, 0], found.held_out.overall.error
    near = replace(found, best=replace(found.best, objective=tried - 0.9 * error))
    assert "within the law's own held-out error" in " ".join(_notes(near))
    far = replace(found, best=replace(found.best, objective=tried - 1.1 * error))
    assert "one of the table had" not in " ".join(_notes(far))


@pytest.fixture
def file(small, tmp_path):
    return write_csv(tmp_path / "table.csv", rows_of(small))


def test_mix_law_prints_and_writes(command, file, tmp_path):
    out = tmp_path / "best.jsonl"
    code, said, _ = command(
        "mix", "law", file, "--target", "s0=2", "--target", "s1=1", "--cap", "d0=0.3", "--folds", 4, "--before", "s0=3",
        "-o", out,
    )  # fmt: skip
    assert code == 0
    for words in ("exp law of 24 mixtures of 3 domains", "Spearman", "suggested", "best tried", "30.0%", "s0 stays at"):
        assert words in said
    assert f"written to {out}" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["domain"] for row in rows] == ["d0", "d1", "d2"]
    assert sum(row["suggested"] for row in rows) == pytest.approx(1)
    assert rows[0]["suggested"] <= 0.3 and rows[0]["cap"] == 0.3


@pytest.mark.parametrize("name", ["exp", "ridge"])
def test_mix_law_gives_one_json_document(command, file, name):
    words = ["mix", "law", file, "--law", name, "--folds", 3, "--within", "--before", "s0=3", "--json"]
    code, said, _ = command(*words)
    found = json.loads(said)
    assert code == 0 and found["settings"]["law"] == name
    assert [row["set"] for row in found["sets"]] == ["s0", "s1"]
    assert {*found["rows"][0]} >= {"domain", "suggested", "mean", "cap"}
    assert {*found["critical"]["s0"]["d0"]} == {"share", "side", "reason"}
    assert (found["gap"] is None) == (name == "ridge")
    again = json.loads(
        command("mix", "law", file, "--law", name, "--folds", 3, "--within", "--before", "s0=3", "--json")[1]
    )
    assert again == found, "the same seed gives the same document"


def test_mix_law_predicts_another_table_and_grades_itself_by_its_losses(command, file, small, tmp_path):
    rows = [dict(reversed(row.items())) for row in rows_of(small)[:5]]  # domains in another order
    fitted = mix_law(small, law="ridge", folds=3)
    expected = fitted.law.predict(small.mixtures[:5])
    for has_losses in (True, False):
        some = rows if has_losses else [{k: v for k, v in row.items() if not k.startswith("metric")} for row in rows]
        other = write_csv(tmp_path / f"{has_losses}.csv", some)
        code, said, _ = command("mix", "law", file, "--law", "ridge", "--folds", 3, "--predict", other, "--json")
        found = json.loads(said)["predictions"]
        assert code == 0
        assert [row["predicted/s1"] for row in found["rows"]] == pytest.approx(expected[:, 1].tolist())
        assert (found["overall"] is None) == (not has_losses)
        if has_losses:
            assert found["overall"]["error"] == pytest.approx(float(np.abs(expected - small.losses[:5]).mean()))
        printed = command("mix", "law", file, "--law", "ridge", "--folds", 3, "--predict", other)[1]
        assert "Predicted mixtures" in printed and ("Prediction of these mixtures" in printed) == has_losses


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--law", "expo"], "--law expo: no such method. Did you mean exp? There are exp, ridge, lightgbm."),
        (["--cap", "d0"], "--cap d0: NAME=NUMBER is expected"),
        (["--cap", "d0=much"], "--cap d0=much: NAME=NUMBER is expected"),
        (["--cap", "d0=0.1", "--cap", "d0=0.2"], "--cap d0=0.2: d0 is given twice"),
        (["--cap", "x=0.1"], "--cap x: the table has no domain of this name. There are d0, d1, d2."),
        (["--cap", "d0=.1", "--cap", "d1=.1", "--cap", "d2=.1"], "sum to 0.3, and shares must sum to 1"),
        (["--target", "s=1"], "--target s: the table has no evaluation set of this name"),
        (["--before", "x=1"], "--before x: the table has no evaluation set of this name"),
        (["--folds", 1], "--folds 1: two at least"),
        (["-o", "best.txt"], "-o best.txt: what is found is written to .jsonl, .csv or .parquet"),
        (["--loss-prefix", "ppl"], "no column of losses begins with ppl"),
        (["--losses", "none.csv"], "none.csv: no such file or directory"),
        (["--predict", "none.csv"], "none.csv: no such file or directory"),
        (["--predict-losses", "none.csv"], "--predict-losses belongs to --predict TABLE"),
    ],
)
def test_mistakes_are_one_clear_line(command, file, words, told):
    code, said, complaint = command("mix", "law", file, *words)
    assert code == 2 and not said
    assert told in complaint and "Traceback" not in complaint


def test_mistakes_are_told_before_anything_is_fitted(small, monkeypatch):
    monkeypatch.setattr(ExpLaw, "fit", lambda *_, **__: pytest.fail("fitted"))
    for wrong in ({"caps": {"x": 0.1}}, {"targets": {"x": 1.0}}, {"before": {"x": 1.0}}):
        with pytest.raises(SettingError):
            mix_law(small, **wrong)
    with pytest.raises(UnknownNameError):
        mix_law(small, law="none")
    with pytest.raises(CorpusError, match="no such file"):
        mix_law("./none.csv")


def test_regmix_files_are_read_and_predicted():
    if not REGMIX.is_dir():
        pytest.skip(f"RegMix's tables are not at {REGMIX}")
    train, test = (
        read_mixture_table(REGMIX / f"regmix_1m_{part}_mixture.csv", REGMIX / f"regmix_1m_{part}_loss.csv")
        for part in ("train", "test")
    )
    assert (train.n, test.n, len(train.domains), len(train.sets)) == (512, 256, 17, 13)
    assert train.sets[0] == train.domains[0] == "the_pile_arxiv"
    predicted = ExpLaw.fit(train.rows(np.arange(64))).predict(test.mixtures)
    codes = order_codes(torch.from_numpy(np.stack([predicted, test.losses], -1)))
    assert mean_spearman(codes) >= 0.93, "the bar of docs/results/mixing.md"
