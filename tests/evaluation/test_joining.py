"""The join on a tiny pool: sums and changes by hand, the correlation, the plot, the command."""

import json
import math

import pytest
import torch
from test_ablate import HELD, QUICK, ROWS

from conftest import save_tiny_llama, write_jsonl
from whence.ablation.heldout_losses import EvalSet
from whence.ablation.member_training import pool_partitions, train_pool
from whence.ablation.pipeline import ablate
from whence.corpus.reading import open_corpus
from whence.errors import ManifestMismatchError, SettingError
from whence.evaluation.joining import _row_shares, join
from whence.indexing.build import index as build_index
from whence.indexing.opening import open_index
from whence.numerics import spearman
from whence.reports.join_tables import join_plot
from whence.selection.pipeline import build_scorer, open_view, targets_of
from whence.selection.views import CorpusView
from whence.training.trainer import train

SETS = [EvalSet(name, tuple(rows)) for name, rows in HELD.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("joining")
    parent = str(save_tiny_llama(place / "parent"))
    pool = train_pool(parent, ROWS, place / "pool", progress=False, **QUICK)
    build_index(parent, ROWS, place / "index", max_tokens=32, progress=False)
    return pool, str(place / "index")


def test_sums_and_changes_by_hand(made):
    pool, index = made
    found = join(index, pool, SETS, methods=["influence", "bm25"], progress=False)
    assert len(found.points) == 2 * 3 * 2
    point = next(
        row for row in found.points if (row["method"], row["partition"], row["set"]) == ("influence", "b", "a")
    )
    mixtures = [{"name": "all", "weights": dict.fromkeys("abc", 1 / 3)}, {"name": "rest", "a": 0.5, "c": 0.5}]
    losses = {cell.mixture: cell.merged for cell in ablate(pool, SETS[:1], mixtures=mixtures, progress=False).cells}
    assert point["change"] == pytest.approx(losses["rest"] - losses["all"])
    view = open_view(index, "influence")
    targets, _ = targets_of(list(SETS[0].rows), view)
    scores = build_scorer("influence", 0, {})(view, targets)[0].double()
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


def test_replay_reads_a_run_in_the_index_place(made, tmp_path):
    pool, index = made
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run = train(pool.parent, rows, tmp_path / "run", epochs=2, replayable=True, max_tokens=32, progress=False)
    found = join(index, pool, SETS, methods=["replay", "bm25"], run=run, progress=False)
    point = next(row for row in found.points if (row["method"], row["partition"], row["set"]) == ("replay", "b", "a"))
    view = open_view(run, "replay")
    scores = build_scorer("replay", 0, {})(view, targets_of(list(SETS[0].rows), view)[0])[0].double()
    of_b = [number for number, row in enumerate(ROWS) if row["source"] == "b"]
    assert point["score"] == pytest.approx(float(scores[of_b].sum()), rel=1e-4)
    with pytest.raises(SettingError, match="add --run RUN"):
        join(index, pool, SETS, methods=["replay"], progress=False)


def test_a_partition_is_needed_by_its_own_set(made):
    pool, index = made
    found = join(index, pool, SETS, methods=["bm25"], progress=False)
    for name in "ab":
        own = {row["partition"]: row["change"] for row in found.points if row["set"] == name}
        assert max(own, key=own.get) == name


def test_the_plot_is_one_picture_of_all_points(made):
    pool, index = made
    found = join(index, pool, SETS, methods=["influence", "bm25"], progress=False)
    picture = join_plot(found)
    assert picture.count("<circle") == len(found.points) + len(SETS) and "http" not in picture.split(">", 1)[1]
    assert "Spearman" in picture and picture.endswith("</svg>\n")


def test_every_unit_has_its_own_rows(tmp_path):
    """Units of two, and a text that was cut between them: each has its share of it."""
    long = {"id": "long", "source": "a", "text": "aaa " * 60}
    rows = [*ROWS[:4], long, *ROWS[4:]]
    parent = str(save_tiny_llama(tmp_path / "parent"))
    pool = train_pool(parent, rows, tmp_path / "pool", progress=False, unit_tokens=200, **QUICK)
    assert pool.partitions == ["a/0", "a/1", "b", "c"]
    build_index(parent, rows, tmp_path / "index", max_tokens=96, progress=False)
    with pytest.raises(SettingError, match="does not know its corpus any more; give it with --corpus"):
        join(str(tmp_path / "index"), pool, SETS, methods=["bm25"], progress=False)
    with pytest.raises(ManifestMismatchError, match="the partition a/0 is 8 rows here, other ones than the 9"):
        join(str(tmp_path / "index"), pool, SETS, methods=["bm25"], corpus=rows[1:], progress=False)
    found = join(str(tmp_path / "index"), pool, SETS[:1], methods=["bm25"], corpus=rows, progress=False)
    view = open_view(str(tmp_path / "index"), "bm25")
    scores = build_scorer("bm25", 0, {})(view, targets_of(list(SETS[0].rows), view)[0])[0].double()
    lengths = [len(encoded.ids) for encoded in view.encoded()]
    parts = pool_partitions(pool, rows, pool.partitions)
    told = {row["partition"]: row["score"] for row in found.points}
    shares = {}
    for name, part in parts.items():
        own = [sum(piece.tokens for piece in part.pieces if piece.row["id"].split("#")[0] == row["id"]) for row in rows]
        total = [sum(piece.tokens for each in parts.values() for piece in each.pieces
                     if piece.row["id"].split("#")[0] == row["id"]) for row in rows]  # fmt: skip
        shares[name] = torch.tensor(own) / torch.tensor(total).double()
        expected = float((scores * shares[name]).sum()) * 200 / float((torch.tensor(lengths) * shares[name]).sum())
        assert told[name] == pytest.approx(expected)
    assert 0 < float(shares["a/0"][4]) < 1 and float(shares["a/0"][4] + shares["a/1"][4]) == pytest.approx(1)
    assert not (shares["a/0"][:4] * shares["a/1"][:4]).any() and told["a/0"] != told["a/1"]


def test_a_partition_with_a_slash_in_its_name_is_no_unit(tmp_path):
    """Rows of `a` are not those of `a/b`."""
    rows = [row | {"source": {"a": "a", "b": "a/b", "c": "c"}[row["source"]]} for row in ROWS]
    parent = str(save_tiny_llama(tmp_path / "parent"))
    pool = train_pool(parent, rows, tmp_path / "pool", progress=False, **QUICK)
    members = _row_shares(pool, CorpusView(open_corpus(rows)), None)
    for name, share in members.items():
        assert share.tolist() == [float(row["source"] == name) for row in rows]


def test_mistakes_are_told(made, tmp_path):
    pool, index = made
    from dataclasses import replace

    two = replace(pool, members={name: pool.members[name] for name in "ab"})
    with pytest.raises(SettingError, match="2 members; to leave one out, three or more are expected"):
        join(index, two, SETS, progress=False)
    part = [row for row in ROWS if row["source"] != "c"]
    build_index(pool.parent, part, tmp_path / "index", max_tokens=32, progress=False)
    with pytest.raises(SettingError, match="the index has no row of the partition c"):
        join(open_index(tmp_path / "index"), pool, SETS, methods=["bm25"], progress=False)
