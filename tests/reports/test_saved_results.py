"""A result is a table, a file and a notebook's view; from its .json it opens as it was, and from nothing else."""

import csv
import json
import math
import re
from dataclasses import replace

import pandas
import pyarrow.parquet
import pytest
import torch
from test_ablate_page import ablated
from test_recover_page import recovered
from test_trace_page import HOSTILE, hostile_trace, small_trace

import whence
from conftest import corpus_rows, write_jsonl
from whence.ablation.pipeline import Ablation
from whence.errors import ChecksumError, FormatVersionError, SettingError
from whence.recovery.shadow_model import Recipe, Shadow
from whence.reports.result_json import plain
from whence.tracing.results import Trace


def chosen():
    return whence.select(corpus_rows(60), method="random", count=25)


def odd_trace():
    """Numbers and text that JSON has no words for."""
    row = {"text": "a\ud800 \u202e", "n": math.nan, "$float": "inf", "of": {"$tensor": 1, "x": [-math.inf]}}
    hits = [replace(small_trace().hits[0], row=row, score=math.nan, by_token=[math.inf, 1e-320, 0.1 + 0.2])]
    return replace(small_trace(), hits=hits)


def recovered_with_adapter():
    """A recovery whose shadow has a type and an adapter, with rows that have no evidence."""
    whole = recovered()
    recipe = Recipe(rows=50, stored=torch.bfloat16, lora={"lora_rank": 4}, lr=0.1)
    scores = whole.scores.clone()
    scores[-3:] = -math.inf
    learned = replace(whole.learned, shadow=Shadow("run", recipe, 1.0, math.inf))
    return replace(whole, scores=scores, learned=learned, members=(20.5, 10.0, 30.0), columns={"prompt": "question"})


RESULTS = {
    "trace": small_trace,
    "odd trace": odd_trace,
    "hostile trace": hostile_trace,
    "selection": chosen,
    "recovery": recovered_with_adapter,
    "ablation": ablated,
}


@pytest.fixture(params=RESULTS)
def result(request):
    return RESULTS[request.param]()


def test_a_result_opens_from_its_json_as_it_was(result, tmp_path):
    result.save(tmp_path / "result.json")
    again = whence.open_result(tmp_path / "result.json")
    assert type(again) is type(result) and plain(again) == plain(result) and repr(again) == repr(result)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "result.json").read_bytes()
    for each, name in ((result, "first.html"), (again, "second.html")):
        each.save(tmp_path / name)
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()
    assert again.to_arrow().equals(result.to_arrow()) and again._repr_html_() == result._repr_html_()


def test_numbers_and_text_that_json_lacks_come_back(tmp_path):
    odd_trace().save(tmp_path / "odd.json")
    json.loads((tmp_path / "odd.json").read_text(), parse_constant=pytest.fail)  # for readers in other languages
    hit, row = whence.open_result(tmp_path / "odd.json").hits[0], odd_trace().hits[0].row
    assert math.isnan(hit.score) and hit.by_token == [math.inf, 1e-320, 0.1 + 0.2]
    assert math.isnan(hit.row.pop("n")) and row.pop("n") and hit.row == row
    assert hit.tokens.matrix.dtype == torch.float32 and hit.tokens.matrix.equal(odd_trace().hits[0].tokens.matrix)
    assert hit.null == odd_trace().hits[0].null


def test_a_table_has_the_columns_and_rows_of_the_file(result, tmp_path):
    for ending in ("csv", "jsonl", "parquet"):
        result.save(tmp_path / f"rows.{ending}")
    frame, table = result.to_pandas(), result.to_arrow()
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == list(frame.columns) == table.column_names
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len((tmp_path / "rows.jsonl").read_text().splitlines())
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").equals(table)


def test_a_table_without_rows_has_its_columns():
    empty = Trace([], [], "cosine", 3).to_pandas()
    assert list(empty.columns) == ["query", "rank", "id", "score", "source"] and empty["rank"].dtype == "int64"
    assert {"mixture", "set", "merged"} <= {*Ablation([], []).to_arrow().column_names}
    assert recovered(count=0).to_arrow().column_names == ["whence_score", "whence_p"]
    assert "<table" not in Ablation([], [])._repr_html_() and "No example" in Trace([], [], "cosine", 3)._repr_html_()


def test_rows_are_written_under_their_own_names():
    assert "question" in recovered_with_adapter().to_arrow().column_names


def test_a_file_that_is_not_whences_stays(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"mine": 1}')
    with pytest.raises(SettingError, match=r"there is a file that Whence did not write.* or add force=True to"):
        small_trace().save(file)
    small_trace().save(file, force=True)
    chosen().save(file)  # over Whence's own
    assert len(whence.open_result(file).rows) == 25
    with pytest.raises(SettingError, match=r"is written to \.jsonl, \.csv, \.parquet, \.html or \.json"):
        small_trace().save(tmp_path / "trace.txt")


def changed(file, change):
    """The file's document with a change made to it."""
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: d.pop("whence_result"), SettingError, r"not a whole result.*--report NAME\.json"),
        (lambda d: d.update(format=2), FormatVersionError, "in format 2; this version"),
        (lambda d: d.update(whence_result="poem"), FormatVersionError, "kind 'poem'"),
        (lambda d: d["fields"].update(more=1), ChecksumError, "fields.more is none of its entries"),
        (lambda d: d["fields"].update(rows="many"), ChecksumError, 'fields.rows is "many"'),
        (lambda d: d["fields"]["hits"][0].pop("id"), ChecksumError, r"fields.hits\[0\].id is missing"),
        (lambda d: d["fields"]["hits"][0]["tokens"]["matrix"].update(shape=[9]), ChecksumError, r"\$tensor"),
        (lambda d: d["fields"]["hits"][0]["tokens"].update(matrix=[1]), ChecksumError, r"tokens.matrix is \[1\]"),
        (lambda d: d["fields"]["hits"][0].update(score={"$eval": "1"}), ChecksumError, r"\$eval is no value"),
    ],
)
def test_what_a_result_was_not_saved_as_is_refused_in_a_line(change, error, words, tmp_path):
    file = tmp_path / "result.json"
    small_trace().save(file)
    changed(file, change)
    with pytest.raises(error, match=words) as refusal:
        whence.open_result(file)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "change", "words"),
    [
        (small_trace, lambda f: f.update(levels=[]), "fields.levels is empty"),
        (small_trace, lambda f: f["hits"][0].update(query=9), r"fields.hits\[0\].query names 9"),
        (small_trace, lambda f: f["hits"][0].update(row={}), r"fields.hits\[0\].row is no row of a corpus"),
        (small_trace, lambda f: f["hits"][0]["tokens"]["matrix"].update(values=[10**400]), r"\$tensor is no value"),
        (chosen, lambda f: f["selection"].update(scores=[]), "fields.selection.scores has 0 entries"),
        (recovered, lambda f: f["rows"].insert(1, {}), r"fields.rows\[1\].whence_p is missing"),
        (recovered, lambda f: f["mixture"][0].update(low="x"), r'fields.mixture\[0\].low is "x"'),
        (recovered, lambda f: f["settings"].pop("method"), "fields.settings.method is missing"),
        (recovered_with_adapter, lambda f: f["members"].pop(), r"fields.members is \[20"),
        (ablated, lambda f: f["cells"].pop(), "fields.cells is not one of each mixture and set"),
    ],
)
def test_fields_that_do_not_belong_together_are_refused_when_the_file_is_opened(make, change, words, tmp_path):
    file = tmp_path / "result.json"
    make().save(file)
    changed(file, lambda document: change(document["fields"]))
    with pytest.raises(ChecksumError, match=words):
        whence.open_result(file)


def test_a_format_that_is_no_number_is_another(tmp_path):
    file = tmp_path / "result.json"
    small_trace().save(file)
    for version in ({"$tensor": "float32", "shape": [2], "values": [1, 2]}, True, 1.0):
        changed(file, lambda document, version=version: document.update(format=version))
        with pytest.raises(FormatVersionError, match="in format "):
            whence.open_result(file)


def test_bytes_of_a_row_become_text(tmp_path):
    made = chosen()
    made.rows[0] |= {"blob": b"caf\xc3\xa9 \xff", "others": [bytearray(b"a")]}
    made.save(tmp_path / "result.json")
    row = whence.open_result(tmp_path / "result.json").rows[0]
    assert row["blob"] == "café \\xff" and row["others"] == ["a"]


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(SettingError, match="no file here that can be read"):
        whence.open_result(tmp_path / "none.json")
    for data in (b"PK\x03\x04", b"[" * 100_000, b"[1]"):
        (tmp_path / "other.json").write_bytes(data)
        with pytest.raises(SettingError, match="not a whole result"):
            whence.open_result(tmp_path / "other.json")


# -- in a notebook


def test_a_notebook_shows_the_first_rows(result):
    shown = result._repr_html_()
    assert len(shown) < 100_000 and "<table class=" in shown
    assert not any(part in shown for part in ("<script", "<img", "<iframe", "<a ", "<svg", "\ud800"))


def test_a_notebook_shows_first_what_ranks():
    trace = small_trace()
    exact = [replace(hit, exact=0.5, exact_rank_score=0.5) for hit in trace.hits]
    for shown, names in ((replace(trace, hits=exact), "exact compressed"), (trace, "score exact")):
        heads = re.findall(r"<th class=n>(.*?)</th>", shown._repr_html_())
        assert names in " ".join(heads), heads


def test_a_notebook_shows_little_of_a_large_result():
    rows = [row | {"prompt": "<" * 9_000, "source": "&" * 200 + row["id"]} for row in corpus_rows(60)]
    large = whence.select(rows, method="random", count=40)
    trace = replace(
        hostile_trace(),
        answers=hostile_trace().answers * 40,
        hits=[replace(hostile_trace().hits[1], query=query, rank=rank) for query in range(80) for rank in range(1, 9)],
        verdicts=["v"] * 80,
        levels=[4.0] * 80,
        notes=["<" * 9_000],
    )
    assert len(large._repr_html_()) < 100_000 and len(trace._repr_html_()) < 100_000
    assert "75 more answers" in trace._repr_html_() and "30 more rows" in large._repr_html_()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_notebook_is_readable_at_every_width(scheme, tmp_path, browser):
    """In a page of another, whose paper and ink it takes; hostile text stays text."""
    paper, ink = ("#ffffff", "#111111") if scheme == "light" else ("#111111", "#eeeeee")
    shown = "".join(make()._repr_html_() for make in RESULTS.values())
    file = tmp_path / "notebook.html"
    file.write_text(f"<meta charset=utf-8><body style='background:{paper};color:{ink};margin:12px'>{shown}", "utf-8")
    for width in (390, 1280):
        browser.open(file, width=width)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth"), f"{width} px"
    assert browser.value("document.documentElement.dataset.owned") is None
    assert browser.value("document.querySelectorAll('script, img, iframe, a, svg').length") == 0
    inks = browser.value("[...new Set([...document.querySelectorAll('td')].map((e) => getComputedStyle(e).color))]")
    assert inks == [f"rgb({', '.join(str(int(ink[place : place + 2], 16)) for place in (1, 3, 5))})"]
    assert HOSTILE[0] in browser.value("document.body.innerText") and not browser.errors()


# -- from the functions and the commands


def test_an_open_index_traces_and_selects(tiny_index, tmp_path):
    opened, calls = whence.open_index(tiny_index), []
    traced = opened.trace("0 and 0?", " no, 0", top=2, null=False, progress=lambda *call: calls.append(call))
    assert plain(traced) == plain(whence.trace(opened, "0 and 0?", " no, 0", top=2, null=False))
    assert calls[0][0] == 0 and calls[-1][:2] == (20, 20) and "Ranking" in {words for *_, words in calls}
    tasks = write_jsonl(tmp_path / "tasks.jsonl", corpus_rows(3))
    picked = opened.select(tasks, method="bm25", count=4)
    assert plain(picked) == plain(whence.select(opened, tasks, method="bm25", count=4))
    traced.save(tmp_path / "trace.json")
    assert plain(whence.open_result(tmp_path / "trace.json")) == plain(traced)


@pytest.mark.parametrize("method", ["less", "rds", "density", "loss", "bm25"])
def test_methods_that_read_gradients_or_run_a_model_say_how_far_they_are(method, tiny_index, tmp_path):
    tasks, calls = write_jsonl(tmp_path / "tasks.jsonl", corpus_rows(3)), []
    whence.select(tiny_index, tasks, method=method, count=4, progress=lambda *call: calls.append(call))
    if method == "bm25":
        assert not calls
        return
    assert calls[0][0] == 0 and calls[-1][:2] == (20, 20)
    ends = [calls[place - 1] for place, (done, *_) in enumerate(calls) if done == 0 and place]
    assert all(done == total for done, total, _ in ends)


def test_commands_write_whole_results(tiny_index, tiny_corpus, tmp_path, command):
    asked = ("trace", tiny_index, "--prompt", "0 and 0?", "--completion", " no, 0", "--top", "2", "--no-null")
    assert command(*asked, "-o", tmp_path / "trace.json")[0] == 0
    assert len(whence.open_result(tmp_path / "trace.json").hits) == 4
    out = tmp_path / "chosen.json"
    assert command("select", tiny_corpus, "--method", "random", "--count", "3", "--report", out)[0] == 0
    assert len(whence.open_result(out).rows) == 3
    _, said, _ = command(*asked, "--json")
    (tmp_path / "printed.json").write_text(said)
    with pytest.raises(SettingError, match="what --json prints has only what a person reads"):
        whence.open_result(tmp_path / "printed.json")
