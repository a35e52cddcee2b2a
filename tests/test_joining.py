"""The join on a tiny pool: sums and changes by hand, the correlation, the plot, the command."""

import json
import math

import pytest
import torch

from conftest import save_tiny_llama
from test_ablation import HELD, QUICK, ROWS
from whence.ablation import ablate
from whence.errors import SettingError
from whence.heldout import EvalSet
from whence.index import index as build_index
from whence.index import open_index
from whence.joining import join
from whence.numerics import spearman
from whence.pool import train_pool
from whence.report_join import join_plot
from whence.selection import made_scorer, open_view, targets_of

SETS = [EvalSet(name, tuple(rows)) for name, rows in HELD.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("joining")
    parent = str(save_tiny_llama(place / "parent"))
    pool = train_pool(parent, ROWS, place / "pool", shown=False, **QUICK)
    build_index(parent, ROWS, place / "index", max_tokens=32, progress=False)
    return pool, str(place / "index")


def test_sums_and_changes_by_hand(made):
    pool, index = made
    found = join(index, pool, SETS, methods=["influence", "bm25"], shown=False)
    assert len(found.points) == 2 * 3 * 2
    point = next(
        row for row in found.points if (row["method"], row["partition"], row["set"]) == ("influence", "b", "a")
    )
    mixtures = [{"name": "all", "weights": dict.fromkeys("abc", 1 / 3)}, {"name": "rest", "a": 0.5, "c": 0.5}]
    losses = {cell.mixture: cell.merged for cell in ablate(pool, SETS[:1], mixtures=mixtures, shown=False).cells}
    assert point["change"] == pytest.approx(losses["rest"] - losses["all"])
    view = open_view(index, "influence")
    targets, _ = targets_of(list(SETS[0].rows), view)
    scores = made_scorer("influence", 0, {})(view, targets)[0].double()
    rows = [number for number, row in enumerate(ROWS) if row["source"] == "b"]
    lengths = sum(len(encoded.ids) for number, encoded in enumerate(view.encoded()) if number in rows)
    assert point["score"] == pytest.approx(float(scores[rows].sum()) * 200 / lengths, rel=1e-5)
    told = found.correlations["influence"]
    assert told["pairs"] == 6 and told["low"] <= told["spearman"] <= told["high"]
    own = [row for row in found.points if row["method"] == "influence" and row["set"] == "a"]
    expected = spearman(torch.tensor([row["score"] for row in own]), torch.tensor([row["change"] for row in own]))
    assert told["by set"]["a"] == pytest.approx(expected)
    assert all(math.isfinite(row["score"]) for row in found.points)
    assert json.dumps(found.points)


def test_a_partition_is_needed_by_its_own_set(made):
    pool, index = made
    found = join(index, pool, SETS, methods=["bm25"], shown=False)
    for name in "ab":
        own = {row["partition"]: row["change"] for row in found.points if row["set"] == name}
        assert max(own, key=own.get) == name


def test_the_plot_is_one_picture_of_all_points(made):
    pool, index = made
    found = join(index, pool, SETS, methods=["influence", "bm25"], shown=False)
    picture = join_plot(found)
    assert picture.count("<circle") == len(found.points) + len(SETS) and "http" not in picture.split(">", 1)[1]
    assert "Spearman" in picture and picture.endswith("</svg>\n")


def test_mistakes_are_told(made, tmp_path):
    pool, index = made
    from dataclasses import replace

    two = replace(pool, members={name: pool.members[name] for name in "ab"})
    with pytest.raises(SettingError, match="2 members; to leave one out, three or more are expected"):
        join(index, two, SETS, shown=False)
    part = [row for row in ROWS if row["source"] != "c"]
    build_index(pool.parent, part, tmp_path / "index", max_tokens=32, progress=False)
    with pytest.raises(SettingError, match="the index has no row of the partition c"):
        join(open_index(tmp_path / "index"), pool, SETS, methods=["bm25"], shown=False)
