"""The driver of DATE-LM on files of its form that are made here: formats, metrics by hand, stages, refusals."""

import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from benchmarks.evaluation.date_lm import graded, main, trapezoidal_auprc
from benchmarks.evaluation.date_lm_data import chosen, read_scores, read_task, relevant

from conftest import save_tiny_llama, write_jsonl
from whence.errors import CorpusError, SettingError
from whence.numerics import generator


def fact(n, entity, true, **more):
    return {"prompt": f"Where is {true} {n}?", "response": f"In {entity}.", "counterfactual_entity": entity,
            "true_entity": true, **more}  # fmt: skip


COUNTERFACT = {
    "train": [fact(0, "Rome", "Paris"), fact(1, "Oslo", "Paris"), fact(2, "Rome", "Paris"), fact(3, "Rome", "Bonn")],
    "ref": [fact(9, "Rome", "Paris"), fact(8, "Oslo", "Paris"), fact(7, "Lima", "Bonn")],
}
FTRACE = {
    "train": [{"prompt": "a", "response": "b", "facts": facts} for facts in (["f1", "f2"], ["f2"], ["f3"])],
    "ref": [{"prompt": "c", "response": "d", "facts": facts} for facts in (["f2", "f3"], ["f1"])],
}
TOXICITY = {
    "train": [{"prompt": f"p{n}", "response": f"r{n}", "type": kind}
              for n, kind in enumerate(("Unsafe", "Benign", "Unsafe", "Safe"))],
    "ref": [{"prompt": "p", "response": "r"}, {"prompt": "s", "response": "t"}],
}  # fmt: skip
KINDS = {"counterfact": COUNTERFACT, "ftrace": FTRACE, "toxicity": TOXICITY}


@pytest.fixture
def data(tmp_path):
    """A directory of each task, as `datasets` would save its splits."""
    for name, splits in KINDS.items():
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", splits["train"])
        table = pyarrow.Table.from_pylist(splits["ref"])
        pyarrow.parquet.write_table(table, tmp_path / name / "ref.parquet")
    return tmp_path


def test_relevant_rows_by_hand(data):
    found = {name: relevant(read_task(name, data / name)).int().tolist() for name in KINDS}
    assert found["counterfact"] == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found["ftrace"] == [[1, 1, 0], [1, 0, 0]]
    assert found["toxicity"] == [[1, 0, 1, 0]]


def test_factual_metrics_by_hand(data):
    task = read_task("counterfact", data / "counterfact")
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0], [1.0, 4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    marks = graded(task, scores)
    assert marks["mrr"] == pytest.approx((1 / 3 + 1) / 2) and marks["recall@50"] == 1
    assert (marks["references"], marks["left_out"]) == (2, 1)
    assert marks["mrr_interval"] == pytest.approx([1 / 3, 1])


def test_recall_at_50_counts_the_first_fifty(tmp_path):
    rows = [fact(n, "Rome" if n in (0, 59) else "Oslo", "Paris") for n in range(60)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "ref.jsonl", [fact(99, "Rome", "Paris")])
    marks = graded(read_task("counterfact", tmp_path), -torch.arange(60.0)[None])
    assert marks["recall@50"] == 0.5 and marks["mrr"] == 1


def test_auprc_equals_a_loop_over_thresholds():
    for seed in range(10):
        rng = generator(seed, "auprc")
        scores = torch.randint(6, (20,), generator=rng).double()
        truth = torch.randint(2, (20,), generator=rng).bool()
        truth[0] = True
        points = [(0.0, 1.0)]
        for threshold in sorted({*scores.tolist()}, reverse=True):
            taken = scores >= threshold
            points.append((float((taken & truth).sum() / truth.sum()), float((taken & truth).sum() / taken.sum())))
        area = sum((r2 - r1) * (p1 + p2) / 2 for (r1, p1), (r2, p2) in itertools.pairwise(points))
        assert trapezoidal_auprc(scores, truth) == pytest.approx(area, rel=1e-6)


def test_toxicity_by_hand(data):
    marks = graded(read_task("toxicity", data / "toxicity"), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    assert marks["auprc"] == pytest.approx(0.5 + (1 / 2 + 2 / 3) / 2 / 2)
    assert marks["average_precision"] == pytest.approx((1 + 2 / 3) / 2) and marks["unsafe"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_methods_write_files_of_the_form_that_is_graded(data, kind, capsys):
    model = save_tiny_llama(data / "model")
    out = data / f"scores-{kind}"
    words = ["score", kind, str(data / kind), "--model", str(model), "--methods", "bm25,exact-cosine,random"]
    assert main([*words, "-o", str(out)]) == 0
    files = sorted(out.glob("*.json"))
    assert [file.stem for file in files] == ["bm25", "exact-cosine", "random"]
    read = json.loads(files[0].read_text())
    train, ref = KINDS[kind]["train"], KINDS[kind]["ref"]
    if kind == "toxicity":
        assert len(read) == len(train) and isinstance(read[0], float)
    else:
        assert len(read) == len(ref) and all(len(line) == len(train) for line in read)
    results = data / "results.json"
    assert main(["grade", kind, str(data / kind), *map(str, files), "-o", str(results)]) == 0
    document = json.loads(results.read_text())
    assert {*document["methods"]} == {"bm25", "exact-cosine", "random"} and document["task"] == kind
    assert "auprc" in document["methods"]["bm25"] or "recall@50" in document["methods"]["bm25"]
    assert kind in capsys.readouterr().out


def test_a_choice_is_written_and_its_noise_is_seeded(data, tmp_path):
    scores = tmp_path / "s.npy"
    np.save(scores, np.array([0.1, 0.9, 0.4], dtype=np.float32))
    out = tmp_path / "chosen.jsonl"
    assert (
        main(["select", str(data / "ftrace"), str(scores), "--count", "2", "--temperature", "0", "-o", str(out)]) == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["train-1", "train-2"]
    assert rows[0]["prompt"] == "<|user|>\na\n<|assistant|>\n" and rows[0]["completion"] == "b"
    values = list(np.linspace(0, 1, 50))
    assert chosen(values, 10, 0.5) == chosen(values, 10, 0.5) != chosen(values, 10, 0.5, seed=1)
    assert np.mean(chosen(values, 10, 0.5)) > 25 and chosen(values, 3, 0.0) == [47, 48, 49]


def test_refusals_are_one_line(data, capsys):
    task = read_task("counterfact", data / "counterfact")
    (data / "few.json").write_text(json.dumps([[1.0, 2.0]]))
    with pytest.raises(SettingError, match=r"1 x 2 scores, where 3 x 4 are expected for counterfact"):
        read_scores(task, data / "few.json")
    (data / "pickled.npy").write_bytes(b"\x80\x04N.")
    with pytest.raises(SettingError, match="scores cannot be read"):
        read_scores(task, data / "pickled.npy")
    with pytest.raises(CorpusError, match="row 0 of train lacks counterfactual_entity, true_entity"):
        read_task("counterfact", data / "ftrace")
    with pytest.raises(SettingError, match=r"no train\.parquet"):
        read_task("ftrace", data)
    with pytest.raises(SettingError, match="no task of DATE-LM"):
        read_task("other", data)
    assert main(["grade", "counterfact", str(data / "counterfact"), str(data / "few.json")]) == 2
    assert "1 x 2 scores" in capsys.readouterr().err
