"""The select job on a tiny index and on corpora: what is chosen, what is left out, what is refused."""

import io
import json

import pytest
import torch
from rich.console import Console

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence import catalogue
from whence.corpus.tokens import encode
from whence.errors import CorpusError, SettingError
from whence.indexing.build import index
from whence.indexing.opening import open_index
from whence.models.loading import load_model
from whence.reports.select_page import select_page
from whence.reports.select_tables import select_tables
from whence.selection.description import composition, lengths, nearness, overlap
from whence.selection.pipeline import build_scorer, open_view, select, select_each
from whence.selection.scorers.lexical import kl_reduction
from whence.selection.views import IndexView
from whence.training.trainer import train

POOL = corpus_rows(24)
TASKS = [
    {"task": "sums", "prompt": "3 and 4?", "completion": " yes, 7"},
    {"task": "sums", "prompt": "8 and 1?", "completion": " no, 9"},
    {"task": "else", "prompt": "What?", "completion": " it is so"},
]
PUBLISHED = {"by": "task", "selector": "max"}
"""LESS's way; the default takes turns by example."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("selection") / "model"))


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("selection") / "index"
    index(model, POOL, out, projection="two_sided", width=8, progress=False)
    return str(out)


@pytest.mark.parametrize("method", [name for name, entry in catalogue.SCORERS.items() if entry.needs_index])
def test_methods_of_an_index_choose_rows_that_can_be_trained_on(built, method):
    found = select(built, TASKS, method=method, count=6, **PUBLISHED)
    assert len(found.rows) == 6
    assert [row["id"] for row in found.rows] == [f"row-{number}" for number in found.selection.rows]
    scores = [row["whence_score"] for row in found.rows]
    assert scores == sorted(scores, reverse=True), "by the best over tasks, in rank order"
    again = select(built, TASKS, method=method, count=6, **PUBLISHED)
    assert again.rows == found.rows
    assert all(
        row.items() >= POOL[number].items() for number, row in zip(found.selection.rows, found.rows, strict=True)
    )


def test_less_is_the_cosine_with_each_tasks_mean_gradient(built):
    """Against the index' own vectors, in a loop."""
    view, found = (
        IndexView(open_index(built)),
        select(built, TASKS, method="less", count=24, **PUBLISHED, duplicates=None),
    )
    rows = torch.cat([vectors[0] for vectors, _ in view.vectors()])
    for name, members in (("sums", TASKS[:2]), ("else", TASKS[2:])):
        encoded = [next(iter(_encoded(view, row))) for row in members]
        mean = view.query_vectors(encoded)[0].mean(0)
        expected = torch.nn.functional.cosine_similarity(mean[None], rows)
        at = found.candidates.targets.index(name)
        assert torch.allclose(found.candidates.scores[at], expected, atol=0.01), "rows are stored in bfloat16"


def _encoded(view, row):
    from whence.corpus.tokens import encode

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


@pytest.mark.parametrize("method", ["less", "influence", "datainf", "reach"])
def test_methods_of_gradients_give_each_example_its_turn_unless_told(built, method):
    chosen = select(built, TASKS, method=method, count=6)
    assert sorted(chosen.selection.targets) == sorted([f"sums {n}" for n in (0, 1)] * 2 + ["else 2"] * 2)
    assert chosen.settings["selector"] == "round_robin over 3 examples"


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


def test_the_model_of_a_corpus_may_be_a_run(tiny_run):
    checkpoints = sorted(tiny_run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    found, expected = (
        select(POOL, TASKS, method="loss", count=4, model=str(path)) for path in (tiny_run, checkpoints[-1])
    )
    assert torch.equal(found.candidates.scores, expected.candidates.scores)


def test_a_task_row_without_an_answer_is_left_out_and_told(built):
    found = select(built, [*TASKS, {"task": "sums", "text": None}], method="less", count=2, **PUBLISHED)
    assert found.selection.notes[0].endswith("no supervised token: 1 task row.")
    assert found.candidates.targets == ["sums", "else"]
    with pytest.raises(CorpusError, match="none of its 1 row has a supervised token"):
        select(built, [{"text": None}], method="less", count=2, **PUBLISHED)
    with pytest.raises(CorpusError, match="no rows"):
        select(built, [], method="less", count=2, **PUBLISHED)
    with pytest.raises(SettingError, match="--method less compares rows with a task's examples: add --tasks FILE"):
        select(built, method="less", count=2, **PUBLISHED)
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
    assert build_scorer("dsir", 0, {"least_words": "3", "length_normalised": "true"}).least_words == 3
    assert build_scorer("bm25", 0, {"k1": "0.9"}).k1 == 0.9
    with pytest.raises(SettingError, match=r"--set k2: --method bm25 has no such option. It has: k1, b"):
        build_scorer("bm25", 0, {"k2": "1"})
    with pytest.raises(SettingError, match="--set k1=high: this option of --method bm25 is a float"):
        build_scorer("bm25", 0, {"k1": "high"})


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
    found = select(tmp_path / "less", TASKS[:2], method="less", count=5, **PUBLISHED)
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


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """An index of a model with a word that makes the loss NaN, and rows with that word."""
    folder = tmp_path_factory.mktemp("broken")
    save_tiny_llama(folder / "model")
    loaded = load_model(folder / "model")
    word = encode(POOL[0], loaded.tokenizer).ids[-2]
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[word] = torch.nan
    loaded.model.save_pretrained(folder / "model")
    index(folder / "model", POOL, folder / "index", projection="two_sided", width=8, progress=False)
    return str(folder / "index")


@pytest.mark.parametrize("method", [name for name, entry in catalogue.SCORERS.items() if entry.needs_index])
def test_nan_rows_of_the_pool_and_of_tasks_are_left_out(broken, method):
    """In LESS' released code one NaN example makes every score NaN, and NaN rows are chosen first (its bug 6)."""
    source = broken
    spoilt = sorted({*range(len(POOL))} - {*open_index(source).store.rankable().tolist()})
    assert spoilt and 0 in spoilt
    fine = next(row for number, row in enumerate(POOL) if number not in spoilt)
    nan = POOL[0] | {"task": "sums"}
    found = select(source, [nan, fine | {"task": "sums"}], method=method, count=99, **PUBLISHED)
    assert not {*found.selection.rows} & {*spoilt}
    assert found.selection.tally()["no finite score"] == len(spoilt)
    alone = select(source, [fine | {"task": "sums"}], method=method, count=99, **PUBLISHED)
    assert found.selection.rows == alone.selection.rows
    with pytest.raises(SettingError, match="none of its 1 examples has a finite gradient"):
        select(source, [nan], method=method, count=2, **PUBLISHED)


def test_a_task_in_another_language_shares_no_word_and_that_is_told(model):
    other = [{"prompt": "\u306f\u3044\u3001\u305d\u3046\u3067\u3059\u304b", "completion": "\u3044\u3044\u3048"}]
    found = select(POOL, other, method="bm25", count=3)
    assert found.selection.rows == [0, 1, 2]
    assert any("21 more rows score 0 as the last one chosen does" in note for note in found.selection.notes)
    by_model = select(POOL, other, method="rds", count=3, model=model)
    assert len(by_model.rows) == 3 and not by_model.selection.notes


def test_a_task_of_one_example_and_a_budget_above_the_pool(built):
    found = select(built, TASKS[2:], count=99)
    assert len(found.rows) == 24 and "1 example" in found.settings["selector"]
    assert any("24 of 99 rows are chosen" in note for note in found.selection.notes)


def test_nearness_is_dsirs_kl_reduction_and_is_told(model):
    pool = [{"text": "red green blue"}] * 3 + [{"text": "one two three four"}] * 3
    found = select(
        pool, [{"text": "one two three"}], method="dsir", options={"least_words": 1}, count=3, duplicates=None
    )
    texts = [row["text"] for row in pool]
    assert nearness(found) == kl_reduction([texts[row] for row in found.selection.rows], ["one two three"], texts) > 0
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(select_tables(found))
    assert "nats nearer to the task's than the pool's are" in console.export_text()
    assert nearness(select(pool, method="random", count=3)) is None


def test_several_tasks_share_one_scoring(built, monkeypatch):
    view, calls = open_view(built, "less"), []
    scores = IndexView.scores
    monkeypatch.setattr(IndexView, "scores", lambda *given, **more: calls.append(1) or scores(*given, **more))
    both = select_each(view, {"a": TASKS[:2], "b": TASKS[2:]}, method="less", count=4)
    assert len(calls) == 1
    for name, rows in (("a", TASKS[:2]), ("b", TASKS[2:])):
        alone = select(view, rows, method="less", count=4)
        assert alone.selection.rows == both[name].selection.rows and alone.settings == both[name].settings
        assert both[name].selection.scores == pytest.approx(alone.selection.scores, rel=1e-4)


def test_the_page_escapes_what_the_corpus_says(built):
    pool = [row | {"prompt": f"<script>alert({n})</script>&amp;", "source": "<b>"} for n, row in enumerate(POOL)]
    found = select(pool, TASKS, method="bm25", count=6)
    page = select_page(found, {"random": 0.25, "<i>": 0.5})
    assert page.count("<script") == 2 and "<b>&" not in page and "<i>&" not in page  # the page's own, and its numbers
    assert "&lt;script&gt;alert(" in page and "&lt;b&gt;" in page and "&lt;i&gt;" in page
    assert "script-src 'sha256-" in page and " style=" not in page, "the policy would not apply it"
    for words in ("6 of 24 rows", "Where the rows come from", "Chosen first", "Best of those below", "Left out", "25%"):
        assert words in page
    of_index = select_page(select(built, TASKS, count=6))
    for words in ("Length in tokens", "What the rows were taken for", "gradients"):
        assert words in of_index


def test_a_page_of_equal_scores_and_lone_surrogates_can_be_written():
    pool = [{"text": f"a\ud800b {n}"} for n in range(3)]
    page = select_page(select(pool, [{"text": "zebra"}], method="bm25", count=2))
    assert page.encode() and "All are 0." in page
