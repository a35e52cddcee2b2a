"""Labels by the model: probabilities against a slow loop, both kinds of label, parts that go on, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from test_evidence import worded

from whence.corpus.reading import open_corpus
from whence.errors import CorpusError, ManifestMismatchError, SettingError
from whence.recovery.pseudo_labels import PROBABILITY, Labels, choice_probabilities, label_corpus
from whence.storage import Place

LABELS = Labels(choices=("yes", "no", "perhaps"), template="{text} Is it?")
ROWS = [
    {"id": "a", "source": "s", "text": "the sky is blue"},
    {"id": "b", "prompt": "one", "completion": "two"},
    {"id": "c", "instruction": "say", "input": "", "output": "hello"},
    {"id": "d", "text": "  "},
    {"id": "e", "messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]},
]
ASKED = ["the sky is blue Is it?", "one two Is it?", "say hello Is it?", "who me Is it?"]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr("whence.recovery.pseudo_labels.directory_digest", lambda path: f"digest of {path}")
    return worded("llama")


def labelled(model, place, rows=ROWS, labels=LABELS, **more):
    made = label_corpus(model, open_corpus(rows), labels, Place.at(place), digest="corpus", **more)
    return [example.row for example in made]


def by_hand(model, prompt):
    """P of each choice, from the logits of single sequences."""
    sums = []
    for choice in LABELS.choices:
        tokens = model.tokenizer(f"{prompt} {choice}")["input_ids"] + [model.tokenizer.eos_token_id]
        asked = len(model.tokenizer(prompt)["input_ids"])
        logp = model.model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(1)
        sums.append(sum(float(logp[t - 1, tokens[t]]) for t in range(asked, len(tokens))))
    return torch.tensor(sums, dtype=torch.float64).softmax(0)


def test_probabilities_are_those_of_single_sequences(model):
    found = choice_probabilities(model, [ROWS[0], ROWS[1]], LABELS, tokens_per_batch=64)
    for own, prompt in zip(found, ASKED, strict=False):
        torch.testing.assert_close(own, by_hand(model, prompt), rtol=1e-4, atol=1e-6)


def test_hard_labels_are_the_most_likely_and_rows_keep_their_names(model, tmp_path):
    rows = labelled(model, tmp_path)
    assert [row["id"] for row in rows] == ["a", "b", "c", "e"], "a row without text has nothing to label"
    assert [row["prompt"] for row in rows] == ASKED
    for row in rows:
        p = by_hand(model, row["prompt"])
        assert row["label"] == LABELS.choices[int(p.argmax())] and row["completion"] == f" {row['label']}"
        assert row[PROBABILITY] == pytest.approx(float(p.max()), rel=1e-4)
    assert rows[0]["source"] == "s" and "source" not in rows[1]


def test_sampled_labels_come_as_often_as_they_are_likely(model, tmp_path):
    rows = [{"id": str(n), "text": "the sky"} for n in range(3000)]
    p = choice_probabilities(model, rows[:1], LABELS)[0]
    found = labelled(model, tmp_path, rows, replace(LABELS, how="sampled"), tokens_per_batch=65536)
    shares = torch.tensor([sum(row["label"] == choice for row in found) / 3000 for choice in LABELS.choices])
    assert torch.allclose(shares.double(), p, atol=0.04)
    again = labelled(model, tmp_path / "again", rows[:600], replace(LABELS, how="sampled"))
    assert [row["label"] for row in again] == [row["label"] for row in found[:600]], "whatever the corpus' length"


def test_parts_that_are_there_are_kept_and_others_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.recovery.evidence.ROWS_PER_PART", 2)
    monkeypatch.setattr("whence.recovery.pseudo_labels.ROWS_PER_PART", 2)
    whole = labelled(model, tmp_path)
    (tmp_path / "rows" / "part-00002.jsonl").unlink()
    asked = []
    from whence.recovery import pseudo_labels as labelling

    made = labelling._labelled
    monkeypatch.setattr(
        labelling, "_labelled", lambda model, part, *rest: asked.append(len(part)) or made(model, part, *rest)
    )
    assert labelled(model, tmp_path) == whole and asked == [1]
    with pytest.raises(ManifestMismatchError, match="another template"):
        labelled(model, tmp_path, labels=replace(LABELS, template="{text}?"))


def test_mistakes_are_told(model, tmp_path):
    for changes, said in (
        ({"choices": ("yes",)}, "two or more different labels"),
        ({"choices": ("yes", "yes")}, "two or more different labels"),
        ({"template": "text"}, "{text} is expected in it, once"),
        ({"how": "soft"}, "--labels soft: choose one of hard, sampled"),
    ):
        with pytest.raises(SettingError, match=said):
            replace(LABELS, **changes)
    with pytest.raises(CorpusError, match="no row has text to label"):
        labelled(model, tmp_path, [{"id": "x", "text": ""}])
    assert replace(LABELS, template="{text}\n").completion("yes") == "yes"
    assert json.dumps(LABELS.choices)
