"""An index has one day and one chat template for ever, and one that older rules laid out says so."""

import datetime
import json

import pytest

from conftest import contents, save_tiny_llama
from whence.corpus import templates
from whence.errors import ManifestMismatchError, SettingError
from whence.indexing.build import append, index, verify
from whence.indexing.opening import open_index
from whence.indexing.store import Store
from whence.models.loading import load_model
from whence.models.training_state import IS_COMPLETE, RECORD
from whence.storage import Place
from whence.tracing.pipeline import trace

QUIET = {"width": 4, "codec": "float32", "progress": False}
DATED = "{{ strftime_now('%d%m') }}{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}</s>{% endfor %}"
OPEN = "{% if add_generation_prompt %}[a]{% endif %}"
ROWS = [{"id": str(n), "instruction": f"{n} and {n}?", "output": f"{2 * n}!"} for n in range(20)]


@pytest.fixture
def dated(tmp_path):
    model = save_tiny_llama(tmp_path / "model", chat=True)
    (model / "chat_template.jinja").write_text(DATED + OPEN)
    return model


@pytest.fixture
def on(monkeypatch):
    """Make another day today, for Whence and for transformers."""

    def move(day):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        monkeypatch.setattr(templates, "today", lambda: day)
        monkeypatch.setattr("whence.indexing.preparation.today", lambda: day)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)

    return move


def own_cosine(path, **how):
    (first, *_) = trace(path, ROWS[3]["instruction"], ROWS[3]["output"], top=1, null=False, **how).of(0)
    return first.id, round(first.score, 5)


def test_day_of_an_index_is_kept_by_queries_appends_repairs_and_resumed_builds(dated, tmp_path, on):
    out = tmp_path / "index"
    on("2026-11-28")
    index(dated, ROWS, out, **QUIET)
    before = contents(out)
    on("2027-03-09")
    assert own_cosine(out) == ("3", 1)
    index(dated, ROWS, out, **QUIET)
    shard = next(out.glob("checkpoint-000/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert "the same bytes" in verify(out, repair=True)[1][0]
    assert contents(out) == before
    append(out, [ROWS[3] | {"id": "again"}], progress=False)
    vectors = Store.open(out).vectors([3, 20])[0][0]
    assert vectors[0].allclose(vectors[1], atol=1e-5), "up to the rounding of another batch"
    with pytest.raises(SettingError, match=r"--date 2027-03-09: the rows of .* were written with 2026-11-28"):
        open_index(out, date="2027-03-09")
    index(dated, ROWS, tmp_path / "same", date="2026-11-28", **QUIET)
    assert contents(tmp_path / "same") == before


def test_day_of_a_training_is_that_of_what_is_made_of_its_run(dated, tmp_path, on, caplog):
    run = tmp_path / "run"
    run.mkdir()
    dated.rename(run / "checkpoint-4")
    Place.at(run).write_document(RECORD, {"date": "2020-01-02", IS_COMPLETE: True})
    on("2026-11-28")
    index(run, ROWS, tmp_path / "index", **QUIET)
    assert Store.open(tmp_path / "index").manifest.settings["date"] == "2020-01-02"
    assert load_model(run / "checkpoint-4").tokenizer.template_date == "2020-01-02"
    with templates.written_by(None, "2024-02-29"):
        assert load_model(run / "checkpoint-4").tokenizer.template_date == "2024-02-29"
    assert not caplog.messages
    index(run, ROWS, tmp_path / "other", date="2026-11-28", **QUIET)
    assert Store.open(tmp_path / "other").manifest.settings["date"] == "2026-11-28"
    assert "wrote the day 2020-01-02; here it writes 2026-11-28" in caplog.messages[0]


def test_index_with_another_template_answers_by_it_without_the_file(dated, tmp_path):
    (tmp_path / "plain.jinja").write_text(DATED.partition("}}")[2] + OPEN)
    out = tmp_path / "index"
    index(dated, ROWS, out, chat_template=tmp_path / "plain.jinja", **QUIET)
    (tmp_path / "plain.jinja").unlink()
    assert own_cosine(out) == ("3", 1)
    assert "date" not in Store.open(out).manifest.settings
    with pytest.raises(ManifestMismatchError, match=r"--chat-template is .* of digest .* there, not given here"):
        index(dated, ROWS, out, **QUIET)
    with pytest.raises(ManifestMismatchError, match="its tokenizer has digest"):
        own_cosine(out, chat_template=DATED)


def made_by_older_rules(path):
    """Take from a manifest what older versions did not keep."""
    store = Store.open(path)
    for name in ("layout_version", "date"):
        store.manifest.settings.pop(name, None)
    store._save(store.manifest)


def test_index_of_older_rules_says_so_only_if_its_rows_would_change(tmp_path, caplog):
    model = save_tiny_llama(tmp_path / "model", chat=True)
    for name, more in (("same", {}), ("other", {"system": "Be brief."})):
        index(model, [row | more for row in ROWS], tmp_path / name, **QUIET)
        made_by_older_rules(tmp_path / name)
        own_cosine(tmp_path / name)
    (message,) = caplog.messages
    assert "20 of the first 20 rows would be other tokens now" in message
    assert f"whence index MODEL CORPUS -o {tmp_path}/other --restart" in message


TURNS = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "yes"}]
PAIR = {"chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("version", "row", "more", "words"),
    [
        (2, {"messages": TURNS}, {"system": "Be brief."}, "a conversation's `system` is read;"),
        (3, {"instruction": "and?", "output": "yes"}, {"input": "no"}, "under a chat template an instruction and its"),
    ],
)
def test_index_of_older_rules_says_so_where_rows_are_read_otherwise(tmp_path, caplog, version, row, more, words):
    model = save_tiny_llama(tmp_path / "model", chat=True)
    for name, columns in (("same", row), ("other", row | more)):
        index(model, [columns] * 4, tmp_path / name, **QUIET)
        store = Store.open(tmp_path / name)
        assert store.manifest.settings["layout_version"] == 4
        store.manifest.settings["layout_version"] = version
        store._save(store.manifest)
        trace(tmp_path / name, "and?", "yes", top=1, null=False)
    (message,) = caplog.messages
    assert f"4 of the first 4 rows would be other tokens now ({words}" in message


@pytest.mark.parametrize(
    ("row", "column"), [(PAIR, "question"), (PAIR, "query"), (PAIR | {"prompt": "and?"}, "system")]
)
@pytest.mark.parametrize("chat", [True, False])
def test_index_of_pairs_whose_question_was_not_read_says_so(tmp_path, caplog, row, column, chat):
    """Their supervised tokens are as many as before; an index of today's rules is silent."""
    model = save_tiny_llama(tmp_path / "model", chat=chat)
    index(model, [row | {column: "and?"}] * 4, tmp_path / "index", **QUIET)
    open_index(tmp_path / "index").model()
    assert "laid out by older rules" not in caplog.text or (column == "system" and not chat)  # it keeps no version
    store = Store.open(tmp_path / "index")
    store.manifest.settings["layout"] = "prompt"
    store.manifest.settings.pop("layout_version", None)
    store._save(store.manifest)
    open_index(tmp_path / "index").model()
    assert "4 of the first 4 rows would be other tokens now" in caplog.text


def test_index_without_its_day_says_so_and_is_not_repaired_by_guess(dated, tmp_path, caplog, on):
    out = tmp_path / "index"
    on("2026-11-28")
    index(dated, ROWS, out, **QUIET)
    made_by_older_rules(out)
    on("2027-03-09")
    own_cosine(out)
    assert len(caplog.messages) == 1 and "does not say of which day its rows are" in caplog.messages[0]
    shard = next(out.glob("checkpoint-000/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ManifestMismatchError, match=r"cannot be computed as it was.*--date"):
        verify(out, repair=True)
    assert "the same bytes" in verify(out, repair=True, date="2026-11-28")[1][0]
    assert json.loads((out / "manifest.json").read_text())["settings"].get("date") is None
