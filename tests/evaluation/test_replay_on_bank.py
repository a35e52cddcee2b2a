"""Replay against real retrainings by the Trainer: each row left out, and random halves.

A row is a twelfth of each step here, so that leaving it out is a small change, and gradients are not clipped. (Of a
batch of four AdamW's first steps, which go by the gradient's sign, make something else than of three: no derivative
can tell that.)
"""

import pytest
import torch

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence import bank
from whence.corpus.tokens import encode
from whence.evaluation.bank_scores import evaluate_lds
from whence.gradients.exact import sequences_of
from whence.training import trainer
from whence.training.replay import replay
from whence.training.replayed_run import open_replayable
from whence.training.trainer import train

ROWS, QUERIES = corpus_rows(12), corpus_rows(3, first=40)


WAYS = {
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "sgd, lora": {"optimizer": "sgd", "lr": 0.5, "lora_rank": 2},
}


@pytest.fixture(scope="module", params=WAYS)
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    model = save_tiny_llama(root / "model", scale=0.02)
    corpus, queries = write_jsonl(root / "rows.jsonl", ROWS), write_jsonl(root / "queries.jsonl", QUERIES)
    arguments = trainer._arguments

    def unclipped(*args):
        made = arguments(*args)
        made.max_grad_norm = 1e3
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_arguments", unclipped)
        return made_by(root, model, corpus, queries, WAYS[request.param])


def made_by(root, model, corpus, queries, way):
    """A run and its bank."""
    run = train(model, corpus, root / "run", batch_size=12, epochs=6, replayable=True, progress=False,
                **way)  # fmt: skip
    made = bank(run, corpus, root / "bank", queries=queries, by="id", subsets=8, fraction=0.5, progress=False)
    return run, made


def test_scores_are_what_leaving_each_row_out_adds_to_the_loss(made):
    run, of_run = made
    opened = open_replayable(run)
    targets = [[sequences_of(encode(row, opened.model.tokenizer))] for row in QUERIES]
    scores = replay(opened.losses, opened.log, targets, progress=False).scores
    members = of_run.of_kind("group")
    assert len(members) == 12
    changes = torch.zeros(3, 12, dtype=torch.float64)
    for member in members:
        (row,) = member.left_out
        changes[:, row] = torch.tensor(member.losses, dtype=torch.float64) - of_run.full_losses
    error = (scores - changes).norm() / changes.norm()
    assert error < 0.2, (error, scores, changes)


def test_replay_predicts_halves(made):
    _, of_run = made
    found = evaluate_lds(of_run, ["replay", "replay:hessian=false", "random"], resamples=50)
    marks = {mark.method: mark for mark in found.table.marks}
    assert marks["replay"].spearman.value > 0.9, found.rows()
    assert found.costs["replay"] > 0
