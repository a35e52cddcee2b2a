"""Pairs of answers in an index: the chosen one, or the contrast of the two; and questions of the same pairs."""

import json

import pytest
import torch

from conftest import save_tiny_llama, write_jsonl
from whence.corpus.tokens import encode
from whence.errors import CorpusError, SettingError
from whence.indexing.build import append, index
from whence.indexing.opening import open_index
from whence.selection.pipeline import select
from whence.tracing.pipeline import trace

PAIRS = [{"id": f"p{n}", "prompt": f"{n} and {n}?", "chosen": f"{2 * n}!", "rejected": f"no {n}"} for n in range(12)]
TURNS = [
    {"id": f"t{n}", "prompt": [{"role": "user", "content": f"{n}?"}], "chosen": [{"role": "assistant", "content": "y"}],
     "rejected": [{"role": "assistant", "content": f"no {n}"}]} for n in range(4)
]  # fmt: skip
OPTIONS = {"width": 8, "codec": "float32", "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("chat") / "model", chat=True)


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    return index(model, PAIRS, tmp_path_factory.mktemp("contrasts") / "index", preferences="contrast", **OPTIONS)


def vectors_of(path, rows, model, **options):
    return index(model, rows, path, **OPTIONS, **options).store.shard(0, 0).vectors


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_stored_row_is_the_difference_of_the_two_answers_rows(model, tmp_path, reduction):
    """The projection is linear: what is stored of a contrast is what is stored of one answer less the other's."""
    sides = [[{"prompt": row["prompt"], "completion": row[side]} for row in PAIRS] for side in ("chosen", "rejected")]
    chosen, rejected = (vectors_of(tmp_path / f"{n}", side, model, reduction=reduction) for n, side in enumerate(sides))
    contrasts = vectors_of(tmp_path / "both", PAIRS, model, reduction=reduction, preferences="contrast")
    torch.testing.assert_close(contrasts, chosen - rejected, rtol=1e-4, atol=1e-4)
    if reduction == "mean":
        torch.testing.assert_close(vectors_of(tmp_path / "default", PAIRS, model), chosen, rtol=1e-5, atol=1e-5)


def test_the_same_pair_as_a_question_is_its_row(built, model, tmp_path):
    result = trace(built, queries=[PAIRS[5]], top=2, null=False, exact=True, tokens=True, shortlist=2)
    assert result.of(0)[0].id == "p5" and result.of(0)[0].exact == pytest.approx(1, abs=1e-4)
    assert (result.answers[0].completion, result.answers[0].contrast) == ("10!", "no 5")
    for hit in result.of(0):
        assert hit.tokens.matrix.sum() == pytest.approx(hit.exact, rel=1e-4, abs=1e-5)
        assert hit.as_row()["rejected"].startswith("no ")
        assert "".join(hit.tokens.shown_train()).endswith(f"and not: <s>{hit.row['prompt']}{hit.row['rejected']}</s>")
    for method in ("cosine", "tracin_cosine"):
        result = trace(built, queries=[PAIRS[5]], top=1, null=False, method=method)
        assert (result.of(0)[0].id, result.of(0)[0].score) == ("p5", pytest.approx(1, abs=1e-4))
    assert result.settings["pairs of answers"] == "contrasts"
    one = trace(built, queries=[PAIRS[5]], preferences="chosen", top=1, null=False)
    assert one.answers[0].contrast is None and one.of(0)[0].score < 0.999
    given = trace(built, PAIRS[5]["prompt"], "10!", contrast="no 5", top=1, null=False)
    assert given.of(0)[0].score == pytest.approx(1, abs=1e-4), "as --contrast has it"
    conversations = index(model, TURNS, tmp_path / "turns", preferences="contrast", **OPTIONS)
    (first, *_) = trace(conversations, queries=TURNS[2:3], top=1, null=False).of(0)
    assert (first.id, first.score) == ("t2", pytest.approx(1, abs=1e-4))


def test_a_pair_without_one_of_its_answers_is_never_ranked(built, model, tmp_path):
    rows = [*PAIRS[:3], PAIRS[3] | {"rejected": None}, PAIRS[4] | {"chosen": None}, {"id": "x", "text": "plain"}]
    store = index(model, rows, tmp_path / "index", preferences="contrast", **OPTIONS).store
    assert store.shard(0, 0).status.tolist() == [0, 0, 0, 1, 1, 0]
    (query,) = [encode(PAIRS[0], built.model().tokenizer)]
    assert query.supervised_count == len("0!") + 1 + len("no 0") + 1
    assert store.shard(0, 0).tokens.tolist()[0] == query.supervised_count


def test_pairs_that_are_conversations_too_are_contrasts(model, tmp_path):
    """As UltraFeedback has them, whose `messages` are the chosen side."""
    rows = [row | {"messages": row["prompt"] + row["chosen"]} for row in TURNS]
    expected = vectors_of(tmp_path / "pairs", TURNS, model, preferences="contrast")
    torch.testing.assert_close(vectors_of(tmp_path / "both", rows, model, preferences="contrast"), expected)
    plain = [{"id": row["id"], "messages": row["messages"]} for row in rows]
    with pytest.raises(CorpusError, match="no row has a preferred and a rejected answer, as `chosen` and `rejected`"):
        index(model, plain, tmp_path / "none", preferences="contrast", **OPTIONS)
    assert not (tmp_path / "none").exists()


def test_tasks_are_contrasts_too(built):
    chosen = select(built, PAIRS[7:8], count=1)
    assert chosen.rows[0]["id"] == "p7" and chosen.selection.scores[0] == pytest.approx(1, abs=1e-4)
    assert chosen.rows[0]["rejected"] == "no 7", "a row comes back as it came"
    (alone,) = select(built, PAIRS[7:8], count=1, preferences="chosen").selection.scores
    assert alone < 0.999
    (other,) = select(built, PAIRS[7:8], count=1, method="reach").selection.scores
    assert other > 0


def test_it_is_remembered_and_what_cannot_compare_is_refused(command, built, model, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    rows, more = write_jsonl(tmp_path / "rows.jsonl", PAIRS[:8]), write_jsonl(tmp_path / "more.jsonl", PAIRS[8:])
    flag = ("--preferences", "contrast")
    code, out, err = command("index", model, rows, "-o", "index", "--width", 8, "--codec", "float32", *flag)
    assert code == 0 and "contrasts" in out, err
    assert "8 of 8 rows are read as contrasts of pairs of answers (`prompt`, `rejected` and `chosen`)" in caplog.text
    assert command("append", "index", more)[0] == 0
    stored = open_index("index").store
    expected = [built.store.vectors([row])[0] for row in (2, 9)]
    torch.testing.assert_close(stored.vectors([2, 9])[0], torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    code, out, _ = command("trace", "index", "--queries", more, "--top", 1, "--no-null", "--json")
    assert [row["id"] for row in json.loads(out)["rows"] if row["rank"] == 1] == ["p8", "p9", "p10", "p11"]
    one = write_jsonl(tmp_path / "one.jsonl", PAIRS[8:9])
    assert command("trace", "index", "--queries", one, "--top", 1, "--no-null", "-o", "page.html")[0] == 0
    assert "and not" in (tmp_path / "page.html").read_text()
    assert command("select", "index", "--tasks", more, *flag, "--count", 1)[0] == 0
    with pytest.raises(SettingError, match=r"--preferences chosen: the rows of .* were read with contrast"):
        append("index", TURNS, preferences="chosen")
    refused = {
        ("append", "index", more, "--preferences", "chosen"): "were read with contrast. Leave it out",
        ("index", model, rows, "-o", "index"): '--preferences is "contrast" there, not given here',
        ("index", model, rows, "-o", "new", "--preferences", "both"): "both: choose one of chosen, contrast",
        ("trace", "index", "--prompt", "a", "--method", "bm25"): "are contrasts of two. Use --method cosine",
        ("select", "index", "--tasks", more, "--count", 1, "--method", "rds"): "one answer of a row. Use --method less",
        ("select", rows, "--tasks", more, *flag, "--count", 1, "--method", "bm25"): "reads one answer of a row",
        ("train", model, rows, "-o", "run", *flag): "Train with TRL's DPOTrainer",
        ("recover", model, model, rows, *flag): "reads the chosen answers of pairs",
        ("evaluate", "selection", model, "index", "--tasks", more, "--graded", more, "--fraction", "0.5"):
            "its rows are contrasts of two answers",
    }  # fmt: skip
    for words, message in refused.items():
        code, _, err = command(*words)
        assert code == 2 and message in err, (words, err)
