"""What a training keeps so that it can be replayed, and that replays go by it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_in_run import save_model
from test_trainer import stop_at

from conftest import corpus_rows, write_jsonl
from whence import catalogue, open_result, select, trace
from whence.corpus.tokens import encode
from whence.errors import ChecksumError, ManifestMismatchError, MissingLogError, ModelError, SettingError
from whence.explorer.serving import opened
from whence.gradients.exact import sequences_of
from whence.indexing.build import index
from whence.models.loading import load_model
from whence.models.training_state import RECORD
from whence.storage import Place
from whence.training import replay as replay_module
from whence.training import unfinished_replay
from whence.training.dry_run import plan_training
from whence.training.replay import Replayed, replay
from whence.training.replayed_run import open_replayable
from whence.training.step_log import FOLDER, StepRecorder, open_log
from whence.training.trainer import train

ROWS, QUERIES = corpus_rows(20), corpus_rows(3, first=50)
QUICK = {"batch_size": 6, "lr": 1e-2, "warmup": 0.0, "epochs": 2, "progress": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"llama": save_model(root / "llama", "llama"), "gpt2": save_model(root / "gpt2", "gpt2", dropout=0.2)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def run(models, corpus, tmp_path_factory):
    return train(models["llama"], corpus, tmp_path_factory.mktemp("runs") / "run", **QUICK, replayable=True)


def files_of(run):
    return {file.name: file.read_bytes() for file in sorted((run / FOLDER).iterdir())}


def weights_of(run):
    return load_file(max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:])) / "model.safetensors")


def scores_of(opened, **options):
    targets = [[sequences_of(encode(row, opened.model.tokenizer))] for row in QUERIES]
    return replay(opened.losses, opened.log, targets, progress=False, **options)


def test_keeping_a_log_changes_no_weight(models, corpus, run, tmp_path):
    plain = train(models["llama"], corpus, tmp_path / "plain", **QUICK)
    one, other = weights_of(plain), weights_of(run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "replayable" not in json.loads((plain / RECORD).read_text())
    log = open_log(run)
    assert len(log.steps) == 8 and log.stored == tuple(range(9)), "8 states of a tiny model take no room"
    assert sorted(row for step in log.steps[:4] for row in step.rows) == list(range(20)), "an epoch has every row"
    last = log.state(8)
    assert all(torch.equal(last.weights[name], other[name]) for name in last.weights)


def test_pieces_that_are_trained_again_give_the_same_scores(models, corpus, run, tmp_path):
    rare = train(models["llama"], corpus, tmp_path / "rare", **QUICK, replayable=True, replay_every=3, micro_batch=2)
    few, all_stored = scores_of(open_replayable(rare)), scores_of(open_replayable(run))
    assert [step for step, _ in few.drifts] == [8, 6, 3] and all(drift < 1e-3 for _, drift in few.drifts)
    assert [step for step, _ in all_stored.drifts] == [8, 7, 6, 5, 4, 3, 2, 1], "every stored step is held to both"
    assert all(drift < 1e-3 for _, drift in all_stored.drifts)
    assert torch.equal(few.scores.abs() > 0, torch.ones(3, 20, dtype=torch.bool))
    difference = (few.scores - all_stored.scores).norm() / all_stored.scores.norm()
    assert difference < 0.02, difference


@pytest.mark.parametrize("every", [None, 3])
def test_a_plan_counts_the_states(models, corpus, tmp_path, every):
    settings = QUICK | {"replayable": True, "replay_every": every, "optimizer": "adamw"}
    planned = plan_training(
        models["llama"], corpus, tmp_path / "run", **{k: v for k, v in settings.items() if k != "progress"}
    )
    run = train(models["llama"], corpus, tmp_path / "run", **settings)
    stored = sum(file.stat().st_size for file in (run / FOLDER).glob("state-*"))
    assert planned.disk["states to replay"] == pytest.approx(stored, rel=0.1), "headers are not counted"


def test_a_stopped_training_keeps_the_same_log(models, corpus, tmp_path, monkeypatch):
    settings = QUICK | {"checkpoints": 3, "replayable": True, "replay_every": 2}
    whole = train(models["llama"], corpus, tmp_path / "whole", **settings)
    out = tmp_path / "stopped"
    for step in (1, 4, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(models["llama"], corpus, out, **settings)
    with pytest.raises(MissingLogError, match="--replayable"):
        open_log(out)
    train(models["llama"], corpus, out, **settings)
    assert files_of(out) == files_of(whole)
    for name in ("replay.json", "steps.parquet"):  # lost after the last checkpoint: written again, without training
        (out / FOLDER / name).unlink()
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        train(models["llama"], corpus, out, **settings)
    assert files_of(out) == files_of(whole)


def test_dropout_is_turned_off_and_said(models, corpus, tmp_path, caplog):
    run = train(models["gpt2"], corpus, tmp_path / "run", **QUICK | {"epochs": 1}, replayable=True)
    assert "trains without its dropout" in caplog.text
    assert scores_of(open_replayable(run)).scores.isfinite().all()
    with pytest.raises(SettingError, match="dropout cannot be --replayable"):
        train(models["gpt2"], corpus, tmp_path / "other", **QUICK, lora_rank=2, lora_dropout=0.1, replayable=True)


def test_the_model_is_left_as_it_was(run):
    opened = open_replayable(run)
    before = {name: weight.clone() for name, weight in opened.losses.weights.items()}
    scores_of(opened)
    assert all(torch.equal(before[name], weight) for name, weight in opened.losses.weights.items())
    assert not any(weight.requires_grad for weight in opened.model.model.parameters())


@pytest.mark.parametrize("damage", ["state", "steps", "missing"])
def test_a_damaged_log_is_refused(models, corpus, tmp_path, damage):
    run = train(models["llama"], corpus, tmp_path / "run", **QUICK | {"epochs": 1}, replayable=True)
    file = run / FOLDER / {"state": "state-00000001.safetensors"}.get(damage, "steps.parquet")
    if damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(ChecksumError, match=file.name):
        open_log(run)


def test_a_damaged_state_is_not_sealed_by_the_same_command(models, corpus, tmp_path):
    run = train(models["llama"], corpus, tmp_path / "run", **QUICK | {"epochs": 1}, replayable=True)
    file = run / FOLDER / "state-00000002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for _ in range(2):
        with pytest.raises(ChecksumError, match=file.name):
            train(models["llama"], corpus, run, **QUICK | {"epochs": 1}, replayable=True)
    with pytest.raises(ChecksumError, match=file.name):
        open_log(run)


def test_rows_with_one_id_keep_their_places(models, tmp_path):
    rows = [dict(row, id="x") for row in ROWS]
    corpus = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = train(models["llama"], corpus, tmp_path / "run", **QUICK | {"epochs": 1}, fraction=0.5, replayable=True)
    opened, tokenizer = open_replayable(run), load_model(models["llama"]).tokenizer
    for place, row in zip(opened.places.tolist(), opened.losses.rows, strict=True):
        assert encode(rows[place], tokenizer).ids == row.ids


def test_what_cannot_be_replayed_is_refused_before_it_trains(models, corpus, tmp_path):
    with pytest.raises(SettingError, match=r"--mix: .* cannot be --replayable"):
        train(models["llama"], corpus, tmp_path / "run", **QUICK, mix="online", replayable=True)
    assert not (tmp_path / "run").exists()


def test_other_rows_are_refused(run, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", corpus_rows(19))
    with pytest.raises(ManifestMismatchError, match="was trained on 20 rows"):
        open_replayable(run, other)


def test_a_training_without_a_log_is_refused(models, corpus, tmp_path, command):
    plain = train(models["llama"], corpus, tmp_path / "plain", **QUICK | {"epochs": 1})
    code, _, err = command("trace", plain, "--method", "replay", "--prompt", "1 and 2?")
    assert code == 2 and "no training that can be replayed" in err and "--replayable" in err


def test_trace_and_select_by_replay_agree(run):
    found = trace(run, queries=QUERIES, method="replay", top=20)
    assert found.method == "replay" and found.rows == 20 and not found.levels
    scores = scores_of(open_replayable(run)).scores
    ids = [row["id"] for row in ROWS]
    for query in range(3):
        for hit in found.of(query):
            assert hit.score == pytest.approx(float(scores[query, ids.index(hit.id)]), rel=1e-4)
    chosen = select(run, QUERIES, method="replay", count=5)
    best = scores.mean(0).argsort(descending=True)[:5].tolist()
    assert chosen.selection.rows == best, "one task: the mean loss of its examples"


def test_rows_that_were_not_trained_on_are_not_ranked(models, tmp_path):
    corpus = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run = train(models["llama"], corpus, tmp_path / "run", **QUICK | {"epochs": 1}, fraction=0.5, replayable=True)
    opened = open_replayable(run)
    assert [ROWS[place]["id"] for place in opened.places.tolist()] == list(opened.ids)
    chosen = select(run, QUERIES, method="replay", count=20)
    assert {row["id"] for row in chosen.rows} == {*opened.ids}


@pytest.mark.parametrize("differences", [True, False])
@pytest.mark.parametrize("damage", [False, True])
def test_a_stopped_replay_goes_on(models, corpus, tmp_path, monkeypatch, damage, differences):
    run = train(models["llama"], corpus, tmp_path / "run", **QUICK, replayable=True, replay_every=3)
    whole = scores_of(open_replayable(run), differences=differences)
    monkeypatch.setattr(unfinished_replay, "EVERY", 0.0)
    real, made = replay_module._WayBack.go_back, []

    def stopped(self, number):
        if number == 1 and not made.count(1):
            made.append(1)
            raise KeyboardInterrupt
        made.append(number)
        return real(self, number)

    monkeypatch.setattr(replay_module._WayBack, "go_back", stopped)
    with pytest.raises(KeyboardInterrupt):
        scores_of(open_replayable(run), is_resumable=True, differences=differences)
    folder = run / FOLDER / unfinished_replay.FOLDER
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".safetensors"], "one standing is kept"
    (standing,) = folder.glob("*.json")
    described = json.loads(standing.read_text())
    assert 0 < described["seconds"] < 60
    described.pop("checksum")
    Place.at(folder).write_document(standing.name, described | {"seconds": 100.0})
    if damage:
        (file,) = folder.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    made.clear()
    made.append(1)
    again = scores_of(open_replayable(run), is_resumable=True, differences=differences)
    assert made[1:] == (list(range(8))[::-1] if damage else [2, 1, 0]), "from the stored state after step 3 on"
    assert torch.equal(again.scores, whole.scores) and [step for step, _ in again.drifts] == [8, 6, 3]
    assert again.error == whole.error and (again.error is not None) == differences
    assert again.seconds_before == (0 if damage else 100), "what the stopped call took counts"
    assert 0 < again.seconds - again.seconds_before < 60 and not folder.exists()
    with pytest.raises(KeyboardInterrupt):
        made.clear()
        scores_of(open_replayable(run), is_resumable=True, differences=differences)
    other = [[sequences_of(encode(QUERIES[0], open_replayable(run).model.tokenizer))]]
    opened = open_replayable(run)
    found = replay(opened.losses, opened.log, other, is_resumable=True, progress=False, differences=differences)
    assert torch.allclose(found.scores[0], whole.scores[0], rtol=1e-2 if differences else 1e-3), (
        "another question has a standing of its own"
    )


def test_a_replay_that_gave_up_differences_goes_on_without(models, corpus, tmp_path, monkeypatch):
    run = train(models["llama"], corpus, tmp_path / "run", **QUICK, replayable=True, replay_every=3)
    errors = iter([0.01, 0.2] * 2)
    monkeypatch.setattr(replay_module, "error_of_differences", lambda *_: next(errors))
    whole = scores_of(open_replayable(run))
    monkeypatch.setattr(unfinished_replay, "EVERY", 0.0)
    real = replay_module._WayBack.go_back

    def stopped(self, number):
        if number == 1:
            raise KeyboardInterrupt
        real(self, number)

    monkeypatch.setattr(replay_module._WayBack, "go_back", stopped)
    with pytest.raises(KeyboardInterrupt):
        scores_of(open_replayable(run), is_resumable=True)
    monkeypatch.setattr(replay_module._WayBack, "go_back", real)
    again = scores_of(open_replayable(run), is_resumable=True)
    assert torch.equal(again.scores, whole.scores) and again.error == whole.error == 0.2


@pytest.mark.parametrize(("every", "options"), [(4, {}), (1, {}), (4, {"optimizer": "sgd"}), (1, {"optimizer": "sgd"})])
def test_a_run_that_does_not_come_out_is_refused(models, corpus, tmp_path, every, options):
    run = train(models["llama"], corpus, tmp_path / "run", **QUICK | options, replayable=True, replay_every=every)
    opened = open_replayable(run)
    stored = opened.log.state

    def moved(after, device="cpu"):
        state = stored(after, device)
        if after == 8:
            (state.first or state.weights)["model.norm.weight"].add_(0.5)
        return state

    object.__setattr__(opened.log, "state", moved)
    with pytest.raises(ModelError, match=r"that after step 8 is \d+\.\d% off the stored one"):
        scores_of(opened)


def test_scores_of_a_derivative_that_exploded_are_not_to_be_believed(run, monkeypatch, caplog):
    """A loss moves by no more than a guess has: half the length of a loss's scores is what random halves would do."""
    assert Replayed(torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64), (), ()).of_a_half.tolist() == [
        2.5,
        0.5,
    ]
    found = trace(run, queries=QUERIES, method="replay", top=3)
    select(run, QUERIES, method="replay", count=5)
    assert not any("not to be believed" in note for note in [*found.notes, *caplog.messages])

    def exploded(*args, **more):
        replayed = replay(*args, **more)
        return replace(replayed, scores=replayed.scores * 1000 / replayed.of_a_half.max())

    monkeypatch.setattr("whence.tracing.replaying.replay", exploded)
    monkeypatch.setattr("whence.selection.scorers.replay.replay", exploded)
    notes = trace(run, queries=QUERIES, method="replay", top=3).notes
    assert any("random half of the rows would move a loss by 1,000 nats, and a guess" in note for note in notes)
    select(run, QUERIES, method="replay", count=5)
    assert "not to be believed" in caplog.text


def test_a_trace_by_replay_is_drawn_and_stored(run, tmp_path):
    found = trace(run, ROWS[0]["prompt"], ROWS[0]["completion"], method="replay", top=3)
    found.save(tmp_path / "trace.json")
    again = open_result(tmp_path / "trace.json")
    assert [hit.as_row() for hit in again.hits] == [hit.as_row() for hit in found.hits]
    found.save(tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text()
    assert "replay" in page and found.hits[0].id in page
    assert "differences, up to 0.0" in page and "off where second derivatives were taken" in page
    exact = trace(run, ROWS[0]["prompt"], ROWS[0]["completion"], method="replay", options={"differences": False}, top=3)
    assert exact.settings["options"] == "differences=False" and "derivatives of steps" not in exact.settings
    assert [hit.score for hit in exact.hits] == pytest.approx([hit.score for hit in found.hits], rel=0.05, abs=1e-4)
    found.save(tmp_path / "trace.csv")
    assert len((tmp_path / "trace.csv").read_text().splitlines()) == 7


def test_the_command_line(run, tmp_path, printed):
    code, out, _ = printed("trace", run, "--method", "replay", "--prompt", ROWS[0]["prompt"], "--completion",
                           ROWS[0]["completion"], "--top", 3)  # fmt: skip
    assert code == 0 and "without it this answer's loss" in " ".join(out.split())
    tasks = write_jsonl(tmp_path / "tasks.jsonl", QUERIES)
    chosen = tmp_path / "chosen.jsonl"
    code, _, _ = printed("select", run, "--method", "replay", "--tasks", tasks, "--count", 4, "-o", chosen)
    assert code == 0 and len(chosen.read_text().splitlines()) == 4
    for words in (
        ("--exact",),
        ("--objective", "margin"),
        ("--shortlist", 5),
        ("--controls", tasks),
        ("--dtype", "float32"),
    ):
        code, _, err = printed("trace", run, "--method", "replay", "--prompt", "a", *words)
        assert code == 2 and words[0] in err


def test_a_parent_that_moved_is_named(models, corpus, tmp_path, command):
    parent = shutil.copytree(models["llama"], tmp_path / "parent")
    run = train(parent, corpus, tmp_path / "run", **QUICK | {"epochs": 1}, replayable=True)
    parent.rename(tmp_path / "moved")
    words = ("trace", run, "--method", "replay", "--prompt", "a", "--completion", " yes")
    code, _, err = command(*words)
    assert code and "--model" in err
    code, _, _ = command(*words, "--model", tmp_path / "moved")
    assert code == 0
    code, _, err = command("trace", run, "--prompt", "a", "--corpus", corpus)
    assert code == 2


def test_a_parent_that_moved_is_named_where_the_run_stands_beside_an_index(models, corpus, tmp_path, command):
    parent = shutil.copytree(models["llama"], tmp_path / "parent")
    run = train(parent, corpus, tmp_path / "run", **QUICK | {"epochs": 1}, replayable=True)
    built = index(run, corpus, tmp_path / "index", progress=False).store.place.root
    parent.rename(tmp_path / "moved")
    asking = [row | {"relevant": [ROWS[number]["id"]]} for number, row in enumerate(QUERIES)]
    queries = write_jsonl(tmp_path / "queries.jsonl", asking)
    tasks = (
        "--tasks",
        f"a={queries}",
        "--graded",
        f"a={queries}",
        "--steps",
        1,
        "--seeds",
        2,
        "--work",
        tmp_path / "w",
    )
    for words in (
        ("evaluate", "retrieval", queries, built, "--methods", "replay", "--run", run),
        ("evaluate", "tail-patch", run, queries, built, "--methods", "replay", "--top", 1),
        ("evaluate", "selection", models["llama"], built, *tasks, "--methods", "replay", "--run", run),
        ("explore", built, "--run", run),
    ):
        code, _, err = command(*words)
        assert code == 2 and err.endswith(f"is not at {parent} any more. Name it by --parent."), (words, err)
    for words in (
        ("evaluate", "retrieval", queries, built, "--methods", "replay", "--run", run),
        ("evaluate", "tail-patch", run, queries, built, "--methods", "replay", "--top", 1),
    ):
        code, out, err = command(*words, "--parent", tmp_path / "moved")
        assert code == 0 and "replay" in out, err
    (explored,) = opened([built], run=str(run), parent=str(tmp_path / "moved"))
    assert explored.run is not None
    code, _, err = command("explore", built, "--parent", tmp_path / "moved")
    assert code == 2 and "it belongs to --run RUN" in err


def test_with_a_contrast_it_is_about_the_difference(run, printed):
    code, out, _ = printed(
        "trace", run, "--method", "replay", "--prompt", "5 and 3?", "--completion", " yes", "--contrast", " no"
    )
    assert code == 0 and ("this answer's loss less the other's" in " ".join(out.split()) or "ranks first;" in out)


def test_the_catalogue_says_so():
    assert catalogue.scorer_entry("replay").needs_run and catalogue.trace_method("replay").needs_run


def test_steps_with_several_rates_are_refused(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(2))
    recorder = StepRecorder({"weight": weight}, tmp_path, 1, None)
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.1}])
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.2})
    with pytest.raises(SettingError, match="one learning rate"):
        recorder.step(optimizer)
    with pytest.raises(SettingError, match="Adagrad"):
        StepRecorder({"weight": weight}, tmp_path, 1, None).step(torch.optim.Adagrad([weight]))
    with pytest.raises(SettingError, match="SGD with momentum"):
        StepRecorder({"weight": weight}, tmp_path, 1, None).step(torch.optim.SGD([weight], lr=1.0, momentum=0.9))


def test_a_run_on_rows_in_memory_asks_for_them(models, tmp_path):
    rows = [{"prompt": f"{n} and 2?", "completion": f" yes, {n + 2}"} for n in range(6)]
    run = train(models["llama"], rows, tmp_path / "run", **QUICK, replayable=True)
    with pytest.raises(SettingError, match=r"trained on 6 rows in memory, which no file holds: .* --corpus FILE"):
        open_replayable(run)
    assert len(open_replayable(run, rows).ids) == 6
