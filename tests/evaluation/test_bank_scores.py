"""What methods score a bank's rows by: its own rows, its queries as they were measured, its run wherever that is."""

import pytest
import torch
from graded_bank import QUERIES, make_bank, write_bank

from whence.evaluation.bank_scores import bank_scores, evaluate_lds
from whence.evaluation.bank_store import open_bank

SILENT = {"id": "silent", "text": ""}
"""A query without a supervised token: a bank keeps it, and its losses are NaN."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("bank_scores"))


def included_rows(members=12):
    return torch.rand(members, 18, generator=torch.Generator().manual_seed(1)) < 0.5


def test_queries_without_a_loss_have_no_scores_and_spoil_no_others(made, tmp_path):
    bank, index, model = made
    losses = torch.cat([open_bank(bank).losses(), torch.full((12, 1), torch.nan)], 1)[:, [0, 3, 1, 2]]
    included = open_bank(bank).included()
    write_bank(tmp_path / "bank", model, included, losses, queries=[QUERIES[0], SILENT, *QUERIES[1:]])
    found = {method.name: method.scores
             for method in bank_scores(open_bank(tmp_path / "bank"), ["exact-dot", "bm25"], index=index)}  # fmt: skip
    expected = {method.name: method.scores for method in bank_scores(open_bank(bank), ["exact-dot", "bm25"],
                                                                     index=index)}  # fmt: skip
    for name, scores in found.items():
        assert scores[1].isnan().all() and torch.equal(scores[[0, 2, 3]], expected[name])
    graded, whole = (evaluate_lds(one, ["exact-dot"], index=index, resamples=50) for one in (tmp_path / "bank", bank))
    assert graded.table.marks[0].spearman.value == pytest.approx(whole.table.marks[0].spearman.value)
    assert graded.table.marks[0].left_out == {"losses not finite": 1}
    assert not [note for note in graded.table.notes if "no score" in note]
