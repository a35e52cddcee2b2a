"""SOURCE: one segment against steps of gradient descent, and a whole training against its replay."""

import json

import pytest
import torch
from small_views import Rows, each, query

from conftest import corpus_rows, save_tiny_llama, write_jsonl
from whence.errors import SettingError
from whence.second_order.eigen import LayerCurvature
from whence.selection.run_view import RunView
from whence.selection.scorers.replay import Replay
from whence.selection.scorers.source import SOURCE, flow, segments_of
from whence.training.trainer import train


def test_a_segment_is_many_small_steps_under_one_curvature():
    rng = torch.Generator().manual_seed(0)
    inputs, slopes = (torch.linalg.qr(torch.randn(size, size, generator=rng))[0] for size in (4, 3))
    eigenvalues = torch.rand(3, 4, generator=rng) * torch.tensor([0.0, 1.0, 10.0, 100.0])
    asked = torch.randn(2, 3, 4, generator=rng)
    basis = torch.kron(slopes, inputs).double()
    matrix = basis @ eigenvalues.double().flatten().diag() @ basis.T
    rate, steps = 1e-4, 4000
    one_step = torch.eye(12, dtype=torch.float64) - rate * matrix
    pushed, s = torch.zeros(2, 12, dtype=torch.float64), asked.double().flatten(1)
    for _ in range(steps):  # backward: what is asked of a step, and then of the one before
        pushed, s = pushed + rate * s, s @ one_step
    found = flow(LayerCurvature(inputs, slopes, eigenvalues), rate * steps, asked)
    for one, expected in zip(found, (pushed, s), strict=True):
        torch.testing.assert_close(
            one.double().flatten(1), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A replayable training by each optimizer, and its corpus."""
    home = tmp_path_factory.mktemp("source")
    model, rows = save_tiny_llama(home / "model"), write_jsonl(home / "rows.jsonl", corpus_rows(16))
    common = {"epochs": 4, "batch_size": 4, "replayable": True, "progress": False}
    for name, more in {"sgd": {"optimizer": "sgd", "lr": 0.1}, "adamw": {"lr": 3e-3}}.items():
        train(model, rows, home / name, **common, **more)
    return home


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_agrees_with_a_replay_of_a_short_training(runs, optimizer):
    view = RunView.of(runs / optimizer)
    before = {name: weight.clone() for name, weight in view.run.losses.weights.items()}
    asked = each([query(row, view.model()) for row in corpus_rows(16)[5:8]])
    found, expected = SOURCE()(view, asked), Replay()(view, asked)
    assert found.isfinite().all()
    for one, other in zip(found, expected, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.7
    for name, weight in view.run.losses.weights.items():
        assert torch.equal(weight, before[name]), "the weights are put back"


def test_segments_share_out_the_steps(runs):
    log = RunView.of(runs / "sgd").run.log
    segments = segments_of(log, 3)
    assert sum(segment.rates for segment in segments) == pytest.approx(sum(step.rate for step in log.steps))
    assert [segment.state for segment in segments] == sorted({segment.state for segment in segments})
    assert len(segments_of(log, 99)) == len(log.steps)


def test_what_cannot_be_scored_is_refused(runs):
    with pytest.raises(SettingError, match="segments 0 of source: at least 1"):
        SOURCE(segments=0)
    with pytest.raises(SettingError, match="--method source reads a run of `whence train --replayable`"):
        SOURCE()(Rows(corpus_rows(2), RunView.of(runs / "sgd").model()), [])


def test_trace_asks_a_run_by_its_segments(runs, command):
    row = corpus_rows(16)[5]
    words = "--prompt", row["prompt"], "--completion", row["completion"], "--method", "source", "--top", "3"
    code, out, err = command("trace", runs / "sgd", *words, "--json")
    assert code == 0, err
    view = RunView.of(runs / "sgd")
    (scores,) = SOURCE()(view, each([query(row, view.model())]))
    rows = json.loads(out)["rows"]
    best = [hit for hit in rows if hit["rank"] > 0]
    order = scores.argsort(descending=True)[:3].tolist()
    assert [hit["id"] for hit in best] == [f"row-{number}" for number in order]
    assert [hit["score"] for hit in best] == pytest.approx([float(scores[number]) for number in order], rel=1e-3)
    code, text, _ = command("trace", runs / "sgd", *words)
    assert code == 0 and "source over 16 examples" in text and "nats" not in text.splitlines()[-1]
    assert "source predicts retrainings of a fine-tuned model by 0.45 of 1, of one from scratch by 0.29" in text
