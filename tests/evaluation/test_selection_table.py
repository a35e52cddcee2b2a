"""Grades against a slow loop, and a table whose numbers can be worked by hand."""

import json

import pytest
import torch

from conftest import corpus_rows, random_examples, save_tiny_llama, tiny_model, write_jsonl
from whence.errors import CorpusError, ManifestMismatchError, SettingError
from whence.evaluation import selection as measures
from whence.evaluation.cells import Cell, Costs, Seconds, stored_cells
from whence.evaluation.choices import Choice, Method, selection_methods
from whence.evaluation.selection import Recipe, evaluate_selection, grade
from whence.numerics import crossed_bootstrap_interval
from whence.selection.pipeline import select
from whence.storage import Place
from whence.training.trainer import train

QUICK = Recipe(steps=2, batch_size=2, lr=1e-2)
POOL = corpus_rows(12)
GRADED = {"yes": corpus_rows(3, first=50), "no": corpus_rows(4, first=70)}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("measures") / "model"))


def methods():
    return {
        "first": Method(lambda task, seed: Choice(POOL[:4] if task == "yes" else POOL[4:8])),
        "random": Method(lambda task, seed: Choice(POOL[seed::3]), per_task=False),
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_grades_are_those_of_a_loop(architecture):
    model, rows = tiny_model(architecture), random_examples(9, seed=3)
    with torch.no_grad():
        for n, row in enumerate(rows):  # let some rows be right: the model's own choices become their targets
            if n % 3 == 0:
                for t in range(1, len(row.ids)):
                    if row.supervised[t]:
                        row.ids[t] = int(model.model(torch.tensor([row.ids[:t]])).logits[0, -1].argmax())
    found = grade(model, rows, tokens_per_batch=40)
    for n, row in enumerate(rows):
        logits = model.model(torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
        targets = [t for t in range(1, len(row.ids)) if row.supervised[t]]
        loss = -sum(float(logits[t - 1, row.ids[t]]) for t in targets) / len(targets)
        assert found.loss[n] == pytest.approx(loss, rel=1e-5)
        assert bool(found.exact[n]) == all(int(logits[t - 1].argmax()) == row.ids[t] for t in targets)
    assert found.exact.any() and not found.exact.all()


def test_a_table_has_every_method_and_the_gain_over_chance(parent, tmp_path):
    told = []
    table = evaluate_selection(
        parent, methods(), GRADED, work=tmp_path / "work", recipe=QUICK, seeds=(0, 1), say=told.append
    )
    assert [(line.task, line.method) for line in table.lines] == [
        (task, name) for task in GRADED for name in ("nothing", "first", "random")
    ]
    assert len(told) == 2 * 3, "two choices of `first`, one of `random`, for each seed"
    by_name = {(line.method, line.task): line for line in table.lines}
    assert by_name["random", "yes"].gain is None
    first, chance = by_name["first", "yes"], by_name["random", "yes"]
    assert first.gain == pytest.approx(chance.loss - first.loss, abs=1e-6)
    assert first.gain_interval[0] <= first.gain <= first.gain_interval[1]
    assert (first.seeds, first.rows, by_name["nothing", "yes"].seeds) == (2, 4, 1)
    assert not list((tmp_path / "work").glob("training-*")), "trainings are removed once graded"


def test_a_stopped_table_goes_on(parent, tmp_path, monkeypatch):
    work, made, real = tmp_path / "work", [], measures.train

    def counted(*args, **kwargs):
        made.append(kwargs["seed"])
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(measures, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_selection(parent, methods(), GRADED, work=work, recipe=QUICK, seeds=(0, 1))
    assert not list(work.glob("training-*"))
    stopped = evaluate_selection(parent, methods(), GRADED, work=work, recipe=QUICK, seeds=(0, 1))
    assert len(made) == 1 + 6, "the two finished cells are not made again"
    (leftover := work / "training-of-a-killed-process").mkdir()
    other = tmp_path / "other"
    whole = evaluate_selection(parent, methods(), GRADED, work=other, recipe=QUICK, seeds=(0, 1))
    assert [line.loss for line in stopped.lines] == [line.loss for line in whole.lines]
    cells = sorted(file.name for file in other.glob("cell-*.json"))
    assert [(work / name).read_bytes() for name in cells] == [(other / name).read_bytes() for name in cells]
    with Place.at(work).locked(), pytest.raises(ManifestMismatchError, match="Another process is writing"):
        evaluate_selection(parent, methods(), GRADED, work=work, recipe=QUICK, seeds=(0, 1))
    again = evaluate_selection(parent, methods(), GRADED, work=work, recipe=QUICK, seeds=(0, 1))
    assert not leftover.exists()
    assert [line.train_seconds > 0 for line in again.lines] == [line.method != "nothing" for line in again.lines]


def test_cells_with_their_wall_times_of_an_older_whence_are_taken(parent, tmp_path):
    place = Place.at(tmp_path)
    cell = Cell("m", "t", 0, rows=1, tokens=9, loss=[2.0], exact=[0.0], inputs="ab")
    place.write_document(cell.file, vars(cell) | {"train_seconds": 3.5, "select_seconds": 0.5})
    assert stored_cells(place, "m", 0, "ab", {"t": [0]}) == [cell]
    assert Costs.read(place).of(cell.file) == Seconds(3.5, 0.5)


def test_a_cell_is_of_its_models_weights_and_its_own_choice(tmp_path):
    model, work = save_tiny_llama(tmp_path / "model"), tmp_path / "work"

    def losses(directory, chosen):
        ways = methods() | {"first": Method(lambda task, seed: Choice(POOL[:chosen]))}
        table = evaluate_selection(str(model), ways, GRADED, work=directory, recipe=QUICK, seeds=(0, 1))
        return [(line.rows, line.loss) for line in table.lines]

    first = losses(work, 4)
    assert losses(work, 8) == losses(tmp_path / "eight", 8) != first
    save_tiny_llama(model, seed=5)
    assert losses(work, 4) == losses(tmp_path / "other", 4) != first


def test_choices_are_stored_by_what_they_are_made_of(parent, tmp_path):
    for name, rows in (("pool", POOL), ("task", GRADED["yes"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def chosen(work="work", fraction=0.25):
        ways, _ = selection_methods(["bm25"], tmp_path / "pool.jsonl", {"t": tmp_path / "task.jsonl"},
                                             fraction=fraction, work=tmp_path / work, model=parent)  # fmt: skip
        return ways["bm25"].choose("t", 0).rows

    first = chosen()
    (tmp_path / "task.jsonl").write_text(json.dumps(POOL[7]) + "\n")
    assert chosen() == chosen("fresh") != first


def test_replay_chooses_by_a_run_on_the_pool(parent, tmp_path):
    pool, task = write_jsonl(tmp_path / "pool.jsonl", POOL), write_jsonl(tmp_path / "task.jsonl", GRADED["yes"])
    run = train(parent, pool, tmp_path / "run", epochs=2, replayable=True, max_tokens=64, progress=False)
    asked = {"fraction": 0.3, "model": parent}
    ways, budget = selection_methods(["bm25", "replay"], pool, {"t": task}, run=run, work=tmp_path / "work", **asked)
    rows = ways["replay"].choose("t", 0).rows
    expected = select(str(run), str(task), method="replay", tokens_budget=budget).rows
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    assert {row["id"] for row in rows} != {row["id"] for row in ways["bm25"].choose("t", 0).rows}
    with pytest.raises(SettingError, match=r"--methods replay: .* none is given: add --run RUN"):
        selection_methods(["replay"], pool, {"t": task}, **asked)
    other = write_jsonl(tmp_path / "other.jsonl", POOL[:6])
    with pytest.raises(SettingError, match=r"pool\.jsonl, whose rows are not those that are chosen from"):
        selection_methods(["replay"], other, {"t": task}, run=run, **asked)


def test_another_table_is_refused(parent, tmp_path):
    work = tmp_path / "work"
    evaluate_selection(parent, methods(), GRADED, work=work, recipe=QUICK, seeds=(0, 1))
    with pytest.raises(SettingError, match=r"another recipe .*\"steps\": 2.*\"steps\": 3"):
        evaluate_selection(parent, methods(), GRADED, work=work, recipe=Recipe(steps=3), seeds=(0, 1))
    with pytest.raises(SettingError, match="another graded"):
        evaluate_selection(parent, methods(), {"yes": POOL}, work=work, recipe=QUICK, seeds=(0, 1))


def test_what_cannot_be_told_is_refused(parent, tmp_path):
    with pytest.raises(SettingError, match="two or more"):
        evaluate_selection(parent, methods(), GRADED, work=tmp_path / "a", recipe=QUICK, seeds=(1, 1))
    with pytest.raises(SettingError, match="'random'"):
        evaluate_selection(parent, {}, GRADED, work=tmp_path / "b", recipe=QUICK)
    with pytest.raises(CorpusError, match="none of its 0 rows"):
        evaluate_selection(parent, methods(), {"none": []}, work=tmp_path / "c", recipe=QUICK)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists(), "nothing is made for what is refused"


def test_a_gain_worked_by_hand(tmp_path):
    def cell(method, seed, loss):
        return Cell(method, "t", seed, rows=1, tokens=9, loss=loss, exact=[0.0, 1.0])

    cells = [cell("random", 0, [2.0, 4.0]), cell("random", 1, [4.0, 6.0])]
    cells += [cell("m", 0, [1.0, 3.0]), cell("m", 1, [3.0, 5.0])]
    line = measures._line("m", "t", cells, Costs(), 0)
    assert (line.loss, line.gain, line.gain_interval, line.exact) == (3.0, 1.0, (1.0, 1.0), 0.5)
    untrained = [*cells, cell("nothing", 0, [5.0, 7.0])]
    assert measures._line("nothing", "t", untrained, Costs(), 0).gain == -2.0
    assert json.loads(json.dumps(line.__dict__))["gain"] == 1.0


def test_crossed_bootstrap_covers_both_kinds_of_chance():
    rng = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(100):
        values = sum(torch.randn(*shape, generator=rng) for shape in ((8, 1), (1, 30), (8, 30)))
        low, high = crossed_bootstrap_interval(values, seed=trial, resamples=400)
        covered += low <= 0 <= high
    assert 88 <= covered <= 100
    assert crossed_bootstrap_interval(torch.ones(2, 3), seed=0) == (1.0, 1.0)
    for wrong in (torch.ones(1, 5), torch.ones(5, 1), torch.tensor([[1.0, float("nan")], [1.0, 2.0]])):
        with pytest.raises(ValueError, match="bootstrap"):
            crossed_bootstrap_interval(wrong, seed=0)
