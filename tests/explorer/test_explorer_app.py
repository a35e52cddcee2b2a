"""The explorer's addresses: what a page asks is answered as the command line would, and nothing else is."""

import json
import queue

import pytest
from starlette.testclient import TestClient

from conftest import corpus_rows, plain_trainer_run
from whence import __version__
from whence.errors import ManifestMismatchError, SettingError
from whence.explorer.app import make_app
from whence.explorer.requests import MOST_CHARACTERS, AnswerRequest
from whence.explorer.serving import opened
from whence.explorer.views import MOST_SHOWN
from whence.explorer.waiting_line import Request
from whence.indexing.build import index
from whence.second_order.pipeline import curvature
from whence.tracing.pipeline import trace
from whence.training.trainer import train
from whence.turns import TURN

HALF = "half a pair \ud800"
HOSTILE = "<script>alert(1)</script> \x1b[31mred \u202egnirts javascript:alert(2)"
SAME = {"prompt": "7 and 7?", "completion": " yes, 14"}
ASKED = {"prompt": "5 and 3?", "completion": " yes, 12"}


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory):
    """An index of rows of two sources and two levels, some alike, one hostile, one long, one that cannot be ranked."""
    rows = [row | {"source": "sums" if n % 3 else None, "level": "easy" if n % 2 else "hard"}
            for n, row in enumerate(corpus_rows(40))]  # fmt: skip
    rows += [SAME | {"id": f"same-{n}", "source": "same"} for n in range(3)]
    rows += [{"id": "hostile", "prompt": HOSTILE, "completion": " no", "source": HOSTILE},
             {"id": "long", "prompt": "x" * 50_000, "completion": " no", "source": "long"},
             {"id": "half", "prompt": HALF, "completion": " no", "source": "half", "level": HALF},
             {"id": "bad", "prompt": "a", "completion": "b", "label": False}]  # fmt: skip
    out = tmp_path_factory.mktemp("explorer") / "index"
    index(tiny_llama, rows, out, max_tokens=64, progress=False)
    return out


@pytest.fixture(scope="module")
def app(place):
    app = make_app(opened([place]))
    yield app
    app.state.line.close()


@pytest.fixture(scope="module")
def page(app):
    with TestClient(app) as client:
        yield client


def events(page, path, **body):
    answer = page.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture(scope="module")
def answer(page):
    return events(page, "/api/answers", **ASKED)[-1]["answer"]


def ranking(page, answer, **body):
    found = page.post("/api/rankings", json={"answer": answer} | body)
    assert found.status_code == 200, found.text
    return found.json()


def ids(rows):
    return [row["id"] for row in rows]


# -- answers


def test_a_session_says_what_there_is(page, place):
    session = page.get("/api/session").json()
    (own,) = session["indexes"]
    assert (session["version"], own["name"], own["rows"], own["rankable"]) == (__version__, str(place), 47, 46)
    assert {"value": None, "rows": 15} in own["sources"]
    assert own["columns"] == [
        {
            "name": "level",
            "values": [{"value": value, "rows": n} for value, n in (("hard", 20), ("easy", 20), (HALF, 1))],
        }
    ]
    methods = {method["name"]: method for method in own["methods"]}
    assert methods["cosine"]["of_tokens"] and methods["bm25"]["is_ready"]
    ignored = {name: method["ignores"] for name, method in methods.items()}
    assert (ignored["cosine"], ignored["bm25"], ignored["ekfac"]) == ([], ["span", "contrast"], ["contrast"])
    assert not methods["ekfac"]["is_ready"] and "whence curvature" in methods["ekfac"]["note"]


def test_an_answer_comes_token_by_token(page):
    told = events(page, "/api/answers", prompt="5 and 3?", max_new_tokens=5)
    kinds = [event["type"] for event in told]
    assert kinds[0] == "queue" and kinds[-1] == "ready"
    said = [event for event in told if event["type"] == "token"]
    final = next(event["answer"] for event in told if event["type"] == "answer")
    assert [token["text"] for token in said][: len(final["tokens"])] == [token["text"] for token in final["tokens"]]
    assert [token["p"] for token in said][: len(final["tokens"])] == pytest.approx(
        [token["p"] for token in final["tokens"]], rel=1e-3
    )
    assert final["is_generated"] and final["id"] == told[-1]["answer"]


def test_a_given_completion_is_not_made(page):
    told = events(page, "/api/answers", **ASKED, contrast=" no, 7")
    assert "token" not in [event["type"] for event in told]
    final = next(event["answer"] for event in told if event["type"] == "answer")
    assert (final["completion"], final["contrast"]["completion"]) == (" yes, 12", " no, 7")


# -- rankings


@pytest.mark.parametrize("method", ["cosine", "dot"])
@pytest.mark.parametrize("tokens", [None, [[1, 3]]])
def test_a_stretch_is_ranked_as_a_trace_ranks_it(page, place, answer, method, tokens):
    span = None if tokens is None else tuple(tokens[0])
    traced = trace(place, *ASKED.values(), span=span, method=method, exact=False, top=5)
    found = ranking(page, answer, method=method, tokens=tokens, top=5, fold=False)
    for side, is_opposing in (("helpful", False), ("opposing", True)):
        hits = traced.of(0, opposing=is_opposing)
        assert ids(found[side]) == [hit.id for hit in hits]
        assert [row["score"] for row in found[side]] == pytest.approx([hit.score for hit in hits], rel=1e-3)
        assert [row["z"] for row in found[side]] == pytest.approx([hit.null.z for hit in hits], rel=1e-2)
        assert [row["rank"] for row in found[side]] == [hit.rank for hit in hits]
        below = [sum(score < hit.null.score for score in hit.null.scores) for hit in hits]
        assert [row["null"]["below"] for row in found[side]] == below, "of the unrelated questions, counted"
        assert [row["null"]["of"] for row in found[side]] == [len(hit.null.scores) for hit in hits]
    assert found["helpful"][0]["null"]["counts"] and len(found["helpful"][0]["null"]["edges"]) == 11


def test_chance_is_measured_once_asked_for(page, place, answer):
    assert ranking(page, answer, tokens=[[0, 1]])["level"] is None
    level = events(page, "/api/levels", answer=answer, tokens=[[0, 1]])[-1]["level"]
    traced = trace(place, *ASKED.values(), span=(0, 1), exact=False, top=10)
    assert level["z"] == pytest.approx(traced.levels[0], rel=1e-3)
    found = ranking(page, answer, tokens=[[0, 1]], fold=False, top=10)
    assert found["level"] == level and found["verdict"] == traced.verdicts[0]


def test_duplicates_are_folded_and_counted(page, answer):
    folded = ranking(page, answer, filters={"sources": ["same"]})
    assert (ids(folded["helpful"]), folded["helpful"][0]["copies"], folded["matching"]) == (["same-0"], 3, 3)
    assert len(ranking(page, answer, filters={"sources": ["same"]}, fold=False)["helpful"]) == 3


@pytest.mark.parametrize(("filters", "matching"), [
    ({}, 46),
    ({"sources": [None]}, 14),
    ({"sources": []}, 0),
    ({"columns": {"level": ["easy"]}}, 20),
    ({"columns": {"level": ["easy", "hard"]}}, 40),
    ({"text": "7 YES"}, None),
    ({"text": "nobody wrote this"}, 0),
    ({"sources": ["same"], "text": "14"}, 3),
])  # fmt: skip
def test_filters_choose_rows(page, answer, filters, matching):
    found = ranking(page, answer, filters=filters, fold=False, top=50)
    if matching is None:
        texts = [" ".join(part["text"] for part in row["parts"]).lower() for row in found["helpful"]]
        assert texts and all("7" in text and "yes" in text for text in texts)
    else:
        assert found["matching"] == matching
        assert len(found["helpful"]) == min(50, matching)


def test_hostile_and_long_rows_are_text(page, answer):
    (row,) = ranking(page, answer, filters={"sources": [HOSTILE]})["helpful"]
    assert row["parts"][0] == {"role": "prompt", "text": HOSTILE}
    (row,) = ranking(page, answer, filters={"sources": ["long"]})["helpful"]
    assert row["cut"] and sum(len(part["text"]) for part in row["parts"]) == MOST_SHOWN
    whole = page.get(f"/api/rows/0/{row['row']}").json()
    assert not whole["cut"] and whole["parts"][0]["text"] == "x" * 50_000


# -- more of an answer


def test_a_matrix_sums_to_the_exact_score(page, place, answer):
    rows = [row["row"] for row in ranking(page, answer, tokens=[[1, 3]], top=3)["helpful"]]
    found = [event for event in events(page, "/api/matrices", answer=answer, tokens=[[1, 3]], rows=rows)
             if event["type"] == "matrix"]  # fmt: skip
    assert [event["row"] for event in found] == rows
    exact = {hit.id: hit.exact for hit in trace(place, *ASKED.values(), span=(1, 3), exact=True, top=45).hits}
    for event in found:
        assert sum(token["share"] for token in event["train"]) == pytest.approx(event["exact"], abs=1e-5)
        assert sum(event["query"]) == pytest.approx(event["exact"], abs=1e-5)
        row = page.get(f"/api/rows/0/{event['row']}").json()
        assert event["exact"] == pytest.approx(exact[row["id"]], rel=1e-3)


def test_methods_stand_side_by_side(page, place, answer):
    told = events(
        page, "/api/comparisons", answer=answer, methods=["cosine", "bm25", "ekfac", "tracin"], top=4, fold=False
    )
    found = {event["method"]: event for event in told if event["type"] == "method"}
    assert [*found] == ["cosine", "bm25", "ekfac", "tracin"]
    for method in ("bm25", "tracin"):
        hits = trace(place, *ASKED.values(), method=method, top=4).of(0)
        assert ids(found[method]["helpful"]) == [hit.id for hit in hits]
    shared = {(each["a"], each["b"]): each for each in told[-1]["overlaps"]}
    both = {*ids(found["cosine"]["helpful"])} & {*ids(found["bm25"]["helpful"])}
    assert shared["cosine", "bm25"] == {"a": "cosine", "b": "bm25", "shared": len(both), "of": 4}
    assert ids(ranking(page, answer, method="bm25", top=4, fold=False)["helpful"]) == ids(found["bm25"]["helpful"])


@pytest.fixture(scope="module")
def run_place(tiny_llama, tmp_path_factory):
    """A run that can be replayed, and an index of it with a row that was not trained on."""
    root = tmp_path_factory.mktemp("run")
    rows = corpus_rows(12)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(tiny_llama, root / "rows.jsonl", root / "run", epochs=2, batch_size=4, lr=1e-3, replayable=True,
                progress=False)  # fmt: skip
    index(run, [{"id": "other", "prompt": "a", "completion": " no"}, *rows], root / "index", progress=False)
    return root


def test_methods_go_back_through_the_run_that_the_index_is_of(run_place):
    app = make_app(opened([run_place / "index"], run=str(run_place / "run")))
    with TestClient(app) as page:
        methods = {each["name"]: each for each in page.get("/api/session").json()["indexes"][0]["methods"]}
        assert methods["replay"]["is_ready"] and methods["source"]["is_ready"]
        answer = events(page, "/api/answers", **ASKED)[-1]["answer"]
        body = {"answer": answer, "methods": ["replay", "source"], "top": 4, "fold": False}
        told = events(page, "/api/comparisons", **body)
        assert {6} == {each["total"] for each in told if each.get("what") == "Replaying"}
        for event in (event for event in told if event["type"] == "method"):
            hits = trace(run_place / "run", *ASKED.values(), method=event["method"], top=4).hits
            for side, first in (("helpful", 1), ("opposing", -1)):
                expected = [(hit.id, hit.score) for hit in hits if hit.rank * first > 0]
                assert ids(event[side]) == [name for name, _ in expected]
                assert [row["score"] for row in event[side]] == pytest.approx([score for _, score in expected])
            assert event["notes"] == []
        assert methods["replay"]["ignores"] == methods["source"]["ignores"] == []
        found = ranking(page, answer, method="replay", top=20, fold=False)
        assert "other" not in ids(found["helpful"]) and found["matching"] == 12 and found["notes"] == []
        command = page.post("/api/commands", json={"answer": answer, "method": "replay", "top": 4}).json()["command"]
        assert command.startswith(f"whence trace {run_place / 'run'} ") and command.endswith("--method replay --top 4")
        report = page.post("/api/exports", json={"answer": answer, "method": "replay", "top": 2, "what": "report"})
        assert report.status_code == 200 and "6 of adamw" in report.text
    app.state.line.close()


@pytest.mark.parametrize("method", ["replay", "source", "tracin_cosine", "ekfac"])
def test_what_takes_long_answers_others_in_its_midst_and_is_what_it_was(run_place, method, monkeypatch, tmp_path):
    """Another viewer's question comes at each of its events: both get what they get alone."""
    store = curvature(run_place / "index", tmp_path / "curvature", progress=False)
    app = make_app(opened([run_place / "index"], curvature=store.place.root, run=str(run_place / "run")))
    tell, asked = Request.progress, []

    def disturbed(request, done, total, what):
        if request.is_long and len(asked) < 3 and not any(word in what for word in ("Ranking by", "Answering")):
            told = queue.Queue()
            asked.append((what, told))
            question = AnswerRequest(prompt="6 and 2?", max_new_tokens=4)
            app.state.line.enter(lambda own: answers.answer(own, question), told.put)
        tell(request, done, total, what)

    with TestClient(app) as page:
        answers = app.state.answers
        alone = events(page, "/api/answers", prompt="6 and 2?", max_new_tokens=4)
        answer = events(page, "/api/answers", **ASKED)[-1]["answer"]
        body = {"answer": answer, "methods": [method], "top": 12, "fold": False}
        (expected,) = (event for event in events(page, "/api/comparisons", **body) if event["type"] == "method")
        again = events(page, "/api/answers", **ASKED)[-1]["answer"]
        monkeypatch.setattr(Request, "progress", disturbed)
        (found,) = (event for event in events(page, "/api/comparisons", **body | {"answer": again})
                    if event["type"] == "method")  # fmt: skip
    assert [(row["id"], row["score"]) for row in found["helpful"]] == [
        (row["id"], pytest.approx(row["score"], rel=1e-5)) for row in expected["helpful"]
    ]
    assert asked, "it tells how far it is"
    for _, told in asked:
        said = [event for event in iter(told.get_nowait, None) if event["type"] == "token"]
        assert said == [event for event in alone if event["type"] == "token"]
    app.state.line.close()


def test_a_run_of_another_model_is_refused(run_place, place, tiny_llama, tmp_path):
    with pytest.raises(ManifestMismatchError, match=r"ends with other weights than those that .* is of"):
        opened([place], run=str(run_place / "run"))
    both = opened([place, run_place / "index"], run=str(run_place / "run"))
    assert [each.run is not None for each in both] == [False, True]
    edited = [corpus_rows(12)[0] | {"completion": " another"}, *corpus_rows(12)[1:]]
    for name, rows, what in (("fewer", edited[1:], "does not have"), ("edited", edited, "has with another content")):
        other = index(run_place / "run", rows, tmp_path / name, progress=False)
        with pytest.raises(ManifestMismatchError, match=rf"trained on row .*, which .* {what}"):
            opened([other.store.place.root], run=str(run_place / "run"))


def test_a_replay_of_a_contrast_is_of_the_contrast_and_leaves_no_files(run_place):
    app = make_app(opened([run_place / "index"], run=str(run_place / "run")))
    before = set((run_place / "run").rglob("*"))
    with TestClient(app) as page:
        answer = events(page, "/api/answers", **ASKED, contrast=" no, 3")[-1]["answer"]
        told = events(page, "/api/comparisons", answer=answer, methods=["replay"], top=3, fold=False)
    (event,) = (event for event in told if event["type"] == "method")
    hits = trace(run_place / "run", *ASKED.values(), contrast=" no, 3", method="replay", top=3).of(0)
    assert [(row["id"], row["score"]) for row in event["helpful"]] == [
        (hit.id, pytest.approx(hit.score)) for hit in hits
    ]
    assert set((run_place / "run").rglob("*")) == before
    app.state.line.close()


def test_a_corpus_belongs_to_a_run(place):
    with pytest.raises(SettingError, match=r"--corpus x\.jsonl: it belongs to --run RUN"):
        opened([place], corpus="x.jsonl")


def test_an_exploded_replay_says_so(run_place, monkeypatch):
    monkeypatch.setattr("whence.tracing.replaying.instability", lambda replayed, tokens: ["not to be believed"])
    app = make_app(opened([run_place / "index"], run=str(run_place / "run")))
    with TestClient(app) as page:
        answer = events(page, "/api/answers", **ASKED)[-1]["answer"]
        told = events(page, "/api/comparisons", answer=answer, methods=["replay"], top=3, fold=False)
        assert [event["notes"] for event in told if event["type"] == "method"] == [["not to be believed"]]
        assert ranking(page, answer, method="replay", top=3, fold=False)["notes"] == ["not to be believed"]
    app.state.line.close()


def test_without_a_run_replay_says_how(page, place, answer):
    methods = {each["name"]: each for each in page.get("/api/session").json()["indexes"][0]["methods"]}
    assert not methods["replay"]["is_ready"] and f"whence explore {place} --run RUN" in methods["replay"]["note"]
    assert f"whence explore {place} --curvature DIR" in methods["ekfac"]["note"]
    told = events(page, "/api/comparisons", answer=answer, methods=["replay"], top=4, fold=False)
    assert "whence explore INDEX --run RUN" in next(each["error"] for each in told if each["type"] == "method")


def test_verbatim_pieces_stand_in_their_rows(page):
    told = events(page, "/api/answers", prompt="Which?", completion=" 7 and 7? yes")
    found = page.post("/api/spans", json={"answer": told[-1]["answer"]}).json()
    assert "No piece" in found["words"]
    text = "x" * 30
    told = events(page, "/api/answers", prompt="Which?", completion=f"a {text} b")
    (span,) = page.post("/api/spans", json={"answer": told[-1]["answer"]}).json()["spans"]
    assert (span["text"], [row["id"] for row in span["rows"]]) == (text, ["long"])
    answer = next(event["answer"] for event in told if event["type"] == "answer")
    first, end = span["tokens"]
    assert text in "".join(token["text"] for token in answer["tokens"][first:end])


def test_the_corpus_is_searched(page):
    found = page.post("/api/search", json={"text": "7 and 7", "limit": 2, "offset": 1}).json()
    assert found["matching"] >= 3 and [row["rank"] for row in found["rows"]] == [2, 3]


# -- out of the page


def test_exports_are_rows_to_train_on(page, answer, place):
    asked = {"answer": answer, "top": 5}
    chosen = page.post("/api/exports", json=asked | {"what": "with"})
    assert "attachment" in chosen.headers["content-disposition"]
    shown = ranking(page, answer, top=5)["helpful"]
    rows = [json.loads(line) for line in chosen.text.splitlines()]
    assert [row["id"] for row in rows] == ids(shown)
    others = [
        json.loads(line) for line in page.post("/api/exports", json=asked | {"what": "without"}).text.splitlines()
    ]
    assert len(others) == 47 - sum(row["copies"] for row in shown)
    assert not {row["id"] for row in others} & {*ids(shown)}
    ranked = [json.loads(line) for line in page.post("/api/exports", json=asked | {"what": "rows"}).text.splitlines()]
    assert [row["rank"] for row in ranked] == [1, 2, 3, 4, 5, -1, -2, -3, -4, -5]
    report = page.post("/api/exports", json=asked | {"what": "report"})
    assert report.status_code == 200 and report.text.startswith("<!doctype html>")


def test_a_command_asks_the_same(page, answer, place):
    found = page.post("/api/commands", json={"answer": answer, "tokens": [[1, 3]], "top": 3}).json()
    assert found["command"].startswith(f"whence trace {place} --prompt '5 and 3?' --completion ' yes, 12'")
    assert "--span-tokens 1:3" in found["command"]
    names = {}
    exec(found["python"], names)
    shown = ranking(page, answer, tokens=[[1, 3]], top=3, fold=False)
    assert [hit.id for hit in names["found"].of(0)] == ids(shown["helpful"])
    chosen = page.post("/api/commands", json={"answer": answer, "filters": {"sources": ["same"]}})
    assert chosen.status_code == 422 and "clear the filters" in chosen.json()["error"]
    gaps = page.post("/api/commands", json={"answer": answer, "tokens": [[0, 1], [2, 3]]})
    assert gaps.status_code == 422 and "one stretch" in gaps.json()["error"]


# -- wrong use


@pytest.mark.parametrize(("path", "body", "status", "words"), [
    ("answers", {"prompt": ""}, 422, "prompt"),
    ("answers", {"prompt": "a", "completion": ""}, 422, "leave it out"),
    ("answers", {"prompt": "a" * (MOST_CHARACTERS + 1)}, 422, "prompt"),
    ("answers", {"prompt": "a", "index": 7}, 422, "no index 7"),
    ("answers", {"prompt": "a", "index": -1}, 422, "index"),
    ("answers", {"prompt": "a", "temperature": "hot"}, 422, "temperature"),
    ("answers", {"prompt": "a", "max_new_tokens": 10**9}, 422, "max_new_tokens"),
    ("answers", {"prompt": "a", "system": "b"}, 422, "conversations"),
    ("answers", {"prompt": "a", "path": "/etc/passwd"}, 422, "path"),
    ("rankings", {"answer": "../../etc/passwd"}, 410, "ask the question again"),
    ("rankings", {"tokens": [[5, 2]]}, 422, "none of the answer's"),
    ("rankings", {"tokens": [[0]]}, 422, "tokens"),
    ("rankings", {"method": "nope"}, 422, "no method 'nope'"),
    ("rankings", {"method": "tracin_cosine"}, 409, "ask for a comparison first"),
    ("rankings", {"top": 0}, 422, "top"),
    ("rankings", {"filters": {"columns": {"nope": ["a"]}}}, 422, "no column 'nope'"),
    ("exports", {"what": "all"}, 422, "what"),
    ("search", {"index": 3}, 422, "no index 3"),
    ("spans", {"answer": "none"}, 410, "ask the question again"),
])  # fmt: skip
def test_wrong_use_is_one_clear_line(page, answer, path, body, status, words):
    if path in ("rankings", "exports") and "answer" not in body:
        body = {"answer": answer} | body
    found = page.post(f"/api/{path}", json=body)
    assert found.status_code == status
    assert words in found.json()["error"] and "\n" not in found.json()["error"]


@pytest.mark.parametrize("path", [
    "/assets/../app.py", "/assets/..%2f..%2fapp.py", "/assets/%2e%2e%2fsecurity.py", "/assets//etc/passwd",
    "/assets/nothing.js", "/etc/passwd", "/api/rows/0/-1", "/api/rows/0/999", "/api/rows/9/0", "/api/rows/0/a",
    "/api/nothing", "/docs", "/openapi.json",
])  # fmt: skip
def test_no_path_of_a_request_is_opened(page, path):
    found = page.get(path)
    assert found.status_code in (404, 422) and "error" in found.json()


def test_a_query_that_the_model_cannot_take_says_why(page):
    told = events(page, "/api/answers", prompt="word " * 3000, completion=" no")
    assert told[-1]["type"] == "error" and "context" in told[-1]["error"]
    told = events(page, "/api/matrices", answer=events(page, "/api/answers", **ASKED)[-1]["answer"], rows=[99])
    assert told[-1] == {"type": "error", "error": "no row 99; the index has rows 0 to 46"}


def test_old_answers_make_room(page, app, monkeypatch):
    monkeypatch.setattr("whence.explorer.answers.MOST_ANSWERS", 2)
    first = events(page, "/api/answers", **ASKED)[-1]["answer"]
    for _ in range(2):
        last = events(page, "/api/answers", **ASKED)[-1]["answer"]
    assert page.post("/api/rankings", json={"answer": first}).status_code == 410
    assert page.post("/api/rankings", json={"answer": last}).status_code == 200


def test_rankings_do_not_wait_for_the_model(page):
    answer = events(page, "/api/answers", **ASKED)[-1]["answer"]
    with TURN:  # as while it answers another question
        assert ranking(page, answer)["helpful"]
        assert page.post("/api/search", json={"text": "7"}).json()["rows"]
        assert page.get("/api/rows/0/0").json()["parts"]


def test_an_answer_that_was_cut_is_the_same_when_it_is_given_back(page):
    told = events(page, "/api/answers", prompt="5 and 3?", max_new_tokens=3)
    own = next(event["answer"] for event in told if event["type"] == "answer")
    assert own["is_cut"] and len(own["tokens"]) == 3
    given = {"prompt": "5 and 3?", "completion": own["completion"]}
    for is_cut in (True, False):
        told = events(page, "/api/answers", **given, is_cut=is_cut)
        again = next(event["answer"] for event in told if event["type"] == "answer")
        assert len(again["tokens"]) == (3 if is_cut else 4)
        if is_cut:
            assert [token["text"] for token in again["tokens"]] == [token["text"] for token in own["tokens"]]
            same, first = ranking(page, again["id"]), ranking(page, own["id"])
            assert ids(same["helpful"]) == ids(first["helpful"])
            assert same["helpful"][0]["score"] == pytest.approx(first["helpful"][0]["score"], rel=1e-4)


def test_a_stretch_with_gaps_has_no_level(page):
    answer = events(page, "/api/answers", **ASKED)[-1]["answer"]
    assert events(page, "/api/levels", answer=answer, tokens=[[0, 1], [2, 3]])[-1] == {"type": "level", "level": None}


def test_words_are_few(page):
    found = page.post("/api/search", json={"text": " ".join(map(str, range(30)))})
    assert found.status_code == 422 and "20 at most" in found.json()["error"]


def test_an_index_without_controls_has_no_verdict(tmp_path):
    """Adam's view holds no gradients that could be queries: a row has no z, and so the answer no level."""
    plain_trainer_run(tmp_path / "run")
    index(tmp_path / "run", corpus_rows(40), tmp_path / "index", view="adam", progress=False)
    app = make_app(opened([tmp_path / "index"]))
    with TestClient(app) as page:
        answer = events(page, "/api/answers", **ASKED)[-1]["answer"]
        assert events(page, "/api/levels", answer=answer)[-1] == {"type": "level", "level": None}
        found = ranking(page, answer)
        assert found["helpful"][0]["z"] is None and found["verdict"] is None
        refused = events(page, "/api/matrices", answer=answer, rows=[0])[-1]
        assert "what an optimizer makes of them" in refused["error"]
    app.state.line.close()
