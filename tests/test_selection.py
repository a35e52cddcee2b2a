"""The select job on a tiny index and on corpora: what is chosen, what is left out, what is refused."""

import json

import pytest
import torch

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence import catalogue
from whence.errors import CorpusError, SettingError
from whence.index import index, open_index
from whence.selection import composition, lengths, made_scorer, overlap, select
from whence.train import train
from whence.views import IndexView

POOL = corpus_rows(24)
TASKS = [
    {"task": "sums", "prompt": "3 and 4?", "completion": " yes, 7"},
    {"task": "sums", "prompt": "8 and 1?", "completion": " no, 9"},
    {"task": "else", "prompt": "What?", "completion": " it is so"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("selection") / "model"))


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("selection") / "index"
    index(model, POOL, out, width=8, progress=False)
    return str(out)


@pytest.mark.parametrize("method", [name for name, entry in catalogue.SCORERS.items() if entry.needs_index])
def test_methods_of_an_index_choose_rows_that_can_be_trained_on(built, method):
    found = select(built, TASKS, method=method, count=6)
    assert len(found.rows) == 6
    assert [row["id"] for row in found.rows] == [f"row-{number}" for number in found.selection.rows]
    scores = [row["whence_score"] for row in found.rows]
    assert scores == sorted(scores, reverse=True), "by the best over tasks, in rank order"
    again = select(built, TASKS, method=method, count=6)
    assert again.rows == found.rows
    assert all(
        row.items() >= POOL[number].items() for number, row in zip(found.selection.rows, found.rows, strict=True)
    )


def test_less_is_the_cosine_with_each_tasks_mean_gradient(built):
    """Against the index' own vectors, in a loop."""
    view, found = IndexView(open_index(built)), select(built, TASKS, method="less", count=24, duplicates=None)
    rows = torch.cat([vectors[0] for vectors, _ in view.vectors()])
    for name, members in (("sums", TASKS[:2]), ("else", TASKS[2:])):
        encoded = [next(iter(_encoded(view, row))) for row in members]
        mean = view.query_vectors(encoded)[0].mean(0)
        expected = torch.nn.functional.cosine_similarity(mean[None], rows)
        at = found.candidates.targets.index(name)
        assert torch.allclose(found.candidates.scores[at], expected, atol=0.01), "rows are stored in bfloat16"


def _encoded(view, row):
    from whence.tokens import encode

    yield encode(row, view.model().tokenizer)


def test_a_corpus_needs_no_model_for_words(tmp_path):
    pool = write_jsonl(tmp_path / "pool.jsonl", [*POOL, {"id": "it", "prompt": "What?", "completion": " it is so"}])
    found = select(pool, TASKS[2:], method="bm25", count=1)
    assert found.rows[0]["id"] == "it"
    with pytest.raises(SettingError, match=r"--tokens-budget 9: without a model .* add --model MODEL"):
        select(pool, TASKS, method="bm25", tokens_budget=9)
    with pytest.raises(SettingError, match="--method rds reads a model, and a corpus has none: add --model MODEL"):
        select(pool, TASKS, method="rds", count=1)
    with pytest.raises(
        SettingError, match=r"pool.jsonl: no index, which --method less needs. Make one with: whence index"
    ):
        select(pool, TASKS, method="less", count=1)


def test_targets_are_tasks_or_examples(built):
    by_task = select(built, TASKS, method="random", count=4, by="task")
    assert by_task.candidates.targets == ["sums", "else"]
    by_example = select(built, TASKS, method="random", count=4, by="example", selector="round_robin")
    assert by_example.candidates.targets == ["sums 0", "sums 1", "else 2"]
    assert by_example.selection.targets == ["sums 0", "sums 1", "else 2", "sums 0"]
    without = [{name: value for name, value in row.items() if name != "task"} for row in TASKS]
    assert select(built, without, method="random", count=4).candidates.targets == ["task"]


def test_rds_plus_takes_turns_by_example_unless_told(built):
    found = select(built, TASKS, method="rds+", count=3)
    assert len({*found.selection.targets}) == 3
    assert "round_robin over 3 examples" in found.settings["selector"]


def test_rows_that_say_nothing_are_left_out_with_their_reason(model):
    pool = [*POOL[:4], {"id": "none", "prompt": "so", "completion": ""}, {"id": "void", "prompt": "", "completion": ""},
            POOL[0] | {"id": "twin"}]  # fmt: skip
    found = select(pool, TASKS, method="loss", count=9, model=model)
    kept = {row["id"] for row in found.rows}
    assert "void" not in kept and len(kept & {"row-0", "twin"}) == 1
    assert found.selection.tally()["duplicate"] == 1
    assert any("no more rows may be" in note for note in found.selection.notes)
    both = select(pool, TASKS, method="loss", count=9, model=model, duplicates=None)
    assert {"row-0", "twin"} <= {row["id"] for row in both.rows}


def test_a_task_row_without_an_answer_is_left_out_and_told(built):
    found = select(built, [*TASKS, {"task": "sums", "text": None}], method="less", count=2)
    assert found.selection.notes[0].startswith("1 task rows")
    assert found.candidates.targets == ["sums", "else"]
    with pytest.raises(CorpusError, match="none of its 1 rows has a supervised token"):
        select(built, [{"text": None}], method="less", count=2)
    with pytest.raises(CorpusError, match="no rows"):
        select(built, [], method="less", count=2)
    with pytest.raises(SettingError, match="--method less compares rows with a task's examples: add --tasks FILE"):
        select(built, method="less", count=2)
    assert len(select(built, method="random", count=2).rows) == 2, "chance looks at no task"


def test_the_corpus_may_be_given_again(built, tmp_path):
    """Its columns may have grown; its ids may not have changed."""
    longer = write_jsonl(tmp_path / "pool.jsonl", [row | {"note": "new"} for row in POOL])
    found = select(built, TASKS, count=3, corpus=longer)
    assert all(row["note"] == "new" for row in found.rows)
    other = write_jsonl(tmp_path / "other.jsonl", [row | {"id": f"x{n}"} for n, row in enumerate(POOL)])
    with pytest.raises(SettingError, match=r"has the id x\d+, in the index it is row-"):
        select(built, TASKS, count=3, corpus=other)
    short = write_jsonl(tmp_path / "short.jsonl", POOL[:2])
    with pytest.raises(SettingError, match="fewer rows than the index, 24"):
        select(built, TASKS, count=24, duplicates=None, corpus=short)


def test_options_are_read_by_their_fields_types():
    assert made_scorer("dsir", 0, {"least_words": "3", "length_normalised": "true"}).least_words == 3
    assert made_scorer("bm25", 0, {"k1": "0.9"}).k1 == 0.9
    with pytest.raises(SettingError, match=r"--set k2: --method bm25 has no such option. It has: k1, b"):
        made_scorer("bm25", 0, {"k2": "1"})
    with pytest.raises(SettingError, match="--set k1=high: this option of --method bm25 is a float"):
        made_scorer("bm25", 0, {"k1": "high"})


def test_composition_and_lengths_by_hand(built):
    found = select(built, TASKS, method="random", count=6, caps={"s0": 2})
    lines = {line["source"]: line for line in composition(found)}
    assert lines["s0"]["rows"] <= 2 and lines["s0"]["rows"] + lines["s1"]["rows"] == 6
    assert lines["s1"]["lift"] == pytest.approx(lines["s1"]["rows"] / 6 / 0.5)
    tokens = found.candidates.tokens[found.selection.rows].double()
    assert lengths(found)["median_tokens"] == float(tokens.median())
    assert sum(line["tokens"] for line in lines.values()) == int(tokens.sum()) == found.selection.tokens
    assert overlap([], [1]) == 0.0 and overlap([1, 2], [2, 1]) == 1.0
    assert json.dumps(found.settings)


def test_the_whole_of_less_on_a_tiny_run(model, tmp_path):
    """Warm-up with LoRA, an index of Adam's view at both checkpoints, a choice; against the formula in a loop."""
    run = train(
        model, POOL, tmp_path / "run", lora_rank=2, max_steps=4, checkpoints=2, batch_size=4, lr=1e-2, progress=False
    )
    index(run, POOL, tmp_path / "less", view="adam", checkpoints="all", width=64, codec="float32", progress=False)
    found = select(tmp_path / "less", TASKS[:2], method="less", count=5)
    assert "view adam" in found.settings["gradients"]
    view = IndexView(open_index(tmp_path / "less"))
    assert len(view.weights) == 2 and float(view.weights.sum()) == pytest.approx(1)
    encoded = [next(_encoded(view, row)) for row in TASKS[:2]]
    rows = torch.cat([vectors for vectors, _ in view.vectors()], 1)
    targets = view.query_vectors(encoded).mean(1)
    cosines = torch.nn.functional.cosine_similarity(targets[:, None], rows, dim=2)
    expected = (view.weights[:, None] * cosines).sum(0)
    assert torch.allclose(found.candidates.scores[0], expected, atol=1e-5)
    assert found.selection.rows == expected.argsort(descending=True)[:5].tolist()
