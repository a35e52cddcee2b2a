"""Tail-patch: the step equals torch's own, the change is the inner product for a small one, weights come back."""

import json
import math
from dataclasses import replace

import pytest
import torch
from graded_bank import QUERIES, ROWS

from conftest import plain_trainer_run, write_jsonl
from tiny_tokenizers import byte_level
from whence.corpus.tokens import collate, encode
from whence.errors import ModelError, SettingError
from whence.evaluation.method_scores import RANDOM
from whence.evaluation.tail_patch import _require_same_tokens, best_rows, evaluate_tail_patch, patcher
from whence.reports.existing_files import is_written_by_whence
from whence.reports.tail_patch_tables import tail_patch_answer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tail")
    plain_trainer_run(folder / "run", steps=4, weight_decay=0.0)
    write_jsonl(folder / "queries.jsonl", QUERIES)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder / "run"


def loss_of(patch, row):
    """The mean loss of a row by transformers' own forward."""
    batch = collate([row])
    labels = batch.ids.masked_fill(~batch.supervised, -100)
    return patch.model.model(input_ids=batch.ids, labels=labels).loss


def test_adamws_step_is_torchs_with_the_runs_own_state(run):
    patch = patcher(run, lr=3e-3, step="adamw")
    row = encode(ROWS[0], patch.model.tokenizer, None)
    update = patch.update(row)
    theirs = patcher(run, lr=3e-3).model.model.requires_grad_(True)
    named = dict(theirs.named_parameters())
    saved = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)
    groups = [[weight for name, weight in named.items() if ("norm" in name) == is_norm] for is_norm in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)
    optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 3e-3, 0.0
    before = {name: weight.detach().clone() for name, weight in named.items()}
    batch = collate([row])
    theirs(input_ids=batch.ids, labels=batch.ids.masked_fill(~batch.supervised, -100)).loss.backward()
    optimizer.step()
    for name, weight in named.items():
        torch.testing.assert_close(update[name], weight.detach() - before[name], rtol=1e-3, atol=1e-7)


def test_a_small_step_of_sgd_changes_a_query_by_the_inner_product_of_gradients(run):
    patch = patcher(run, lr=1e-4, step="sgd")
    row, query = (encode(one, patch.model.tokenizer, None) for one in (ROWS[0], QUERIES[0]))
    before = patch.losses([query])
    with patch.stepped(row):
        change = float(before - patch.losses([query]))
    gradients = []
    for each in (row, query):
        patch.model.model.requires_grad_(True)
        loss = loss_of(patch, each)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(patch.weights.values()))]))
        patch.model.model.requires_grad_(False)
    assert change == pytest.approx(1e-4 * float(gradients[0] @ gradients[1]), rel=0.05)
    assert float(before) == pytest.approx(float(loss_of(patch, query)), rel=1e-5)


def test_weights_come_back_bit_for_bit(run):
    patch = patcher(run, lr=0.1)
    row = encode(ROWS[0], patch.model.tokenizer, None)
    before = {name: weight.clone() for name, weight in patch.weights.items()}
    with pytest.raises(RuntimeError, match="stopped"), patch.stepped(row):
        assert any(not torch.equal(weight, before[name]) for name, weight in patch.weights.items())
        raise RuntimeError("stopped")
    assert all(torch.equal(weight, before[name]) and not weight.requires_grad
               for name, weight in patch.weights.items())  # fmt: skip


def test_best_rows_by_hand():
    scores = torch.tensor([[1.0, 5.0, 3.0, torch.nan], [2.0, 0.0, 2.0, 9.0]])
    assert best_rows(scores, [0, 2, 3], 2) == [[2, 0], [3, 0]]


def test_a_method_that_knows_the_answer_is_above_random_rows(run, tmp_path):
    lines = [{"query": query["id"], "id": row["id"], "score": float(row["source"] == query["id"][1])}
             for query in QUERIES for row in ROWS]  # fmt: skip
    write_jsonl(tmp_path / "same.jsonl", lines)
    table = evaluate_tail_patch(run, QUERIES, ROWS, ["bm25"], scores={"same": str(tmp_path / "same.jsonl")}, top=4,
                                lr=1e-3, step="sgd", costs={"same": 2.5})  # fmt: skip
    by_name = {marks.method: marks for marks in table.marks}
    assert {*by_name} == {"bm25", "same", RANDOM} and by_name["same"].seconds == 2.5
    assert by_name["same"].change.value > by_name[RANDOM].change.value
    gap = by_name["same"].change.value - by_name[RANDOM].change.value
    assert by_name["same"].over_random.value == pytest.approx(gap) and by_name[RANDOM].over_random.value == 0
    patch = patcher(run, lr=1e-3, step="sgd")
    rows = [encode(row, patch.model.tokenizer, None) for row in ROWS]
    query = encode(QUERIES[0], patch.model.tokenizer, None)
    before, slow = float(patch.losses([query])), []
    for row in rows[:4]:  # the first four rows of source a
        with patch.stepped(row):
            slow.append(before - float(patch.losses([query])))
    assert by_name["same"].by_query[0] == pytest.approx(sum(slow) / 4, abs=1e-6)
    assert (table.settings["step"], table.settings["lr"], table.settings["top"]) == ("sgd", 1e-3, 4)


def test_defaults_are_the_runs_own(run):
    patch = patcher(run)
    assert patch.step == "adamw" and 0 < patch.lr < 1e-2  # the schedule falls from 1e-2
    base = str(run) + "-base"
    assert patcher(base, lr=1.0).step == "sgd"
    with pytest.raises(SettingError, match="no file of it says a learning rate; name one above 0 with --lr"):
        patcher(base)
    with pytest.raises(ModelError, match="--step sgd needs no optimizer file"):
        patcher(base, lr=1.0, step="adamw")
    with pytest.raises(SettingError, match="--step adam: choose adamw or sgd"):
        patcher(run, step="adam")
    with pytest.raises(SettingError, match="a learning rate of nan"):
        patcher(run, lr=math.nan)


def test_tokens_of_another_tokenizer_are_refused(run):
    model = patcher(run).model
    _require_same_tokens(model, model)
    with pytest.raises(SettingError, match=r"its tokenizer is not that of .*, whose tokens the rows of the index are"):
        _require_same_tokens(replace(model, tokenizer=byte_level(chat=True)), model)


def test_refusals(run):
    with pytest.raises(SettingError, match="no method to grade"):
        evaluate_tail_patch(run, QUERIES, ROWS)
    with pytest.raises(SettingError, match="--scores random: the table has a line of that name already; give the file"):
        evaluate_tail_patch(run, QUERIES, ROWS, ["bm25"], scores={"random": "x.jsonl"})
    with pytest.raises(SettingError, match="--top 0"):
        evaluate_tail_patch(run, QUERIES, ROWS, ["bm25"], top=0)


def test_the_command(run, command, tmp_path):
    words = ["evaluate", "tail-patch", run, run.parent / "queries.jsonl", run.parent / "rows.jsonl", "--methods",
             "bm25,exact-dot", "--top", 2]  # fmt: skip
    code, said, complaint = command(*words, "-o", tmp_path / "t.svg")
    assert code == 0 and "helps the answers most" in said and "One step of adamw" in " ".join(said.split()), complaint
    assert is_written_by_whence(str(tmp_path / "t.svg"))
    for ending in ("jsonl", "csv", "parquet"):
        assert command(*words, "-o", tmp_path / f"t.{ending}")[0] == 0
        assert is_written_by_whence(str(tmp_path / f"t.{ending}"))
    document = json.loads(command(*words, "--json")[1])
    assert {row["method"] for row in document["rows"]} == {"bm25", "exact-dot", "random"}
    assert document["settings"]["step"] == "adamw"
    code, said, complaint = command(*words, "--step", "adam")
    assert code == 2 and "choose adamw or sgd" in complaint


def test_the_answer_says_what_may_be_chance(run):
    alone = evaluate_tail_patch(run, QUERIES[:1], ROWS, ["bm25"], top=1)
    assert tail_patch_answer(alone).endswith("which may be chance.")
    assert alone.marks[0].change.interval is None
