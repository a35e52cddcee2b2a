"""A Trainer's directory is a run: its checkpoints by step, weighted by the learning rates that led to each."""

import json

import pytest

from whence.errors import ModelError, SettingError
from whence.models.runs import Checkpoint, open_run


def trainer_directory(path, steps, rates):
    """Checkpoints at `steps`; the newest state logs `rates`, a mapping of step to learning rate."""
    for step in steps:
        (path / f"checkpoint-{step}").mkdir(parents=True)
    history = [{"step": step, "learning_rate": rate, "loss": 1.0} for step, rate in rates.items()]
    history.insert(1, {"step": 1, "eval_loss": 2.0})
    state = {"global_step": max(steps), "log_history": history}
    (path / f"checkpoint-{max(steps)}" / "trainer_state.json").write_text(json.dumps(state))
    return path


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path):
    run = trainer_directory(tmp_path, [1000, 5, 200], {5: 1.0, 200: 1.0, 1000: 1.0})
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    found = open_run(run, which="all")
    assert [checkpoint.step for checkpoint in found.checkpoints] == [5, 200, 1000]
    assert [checkpoint.path for checkpoint in found.checkpoints] == [
        str(tmp_path / name) for name in ("checkpoint-5", "checkpoint-200", "checkpoint-1000")
    ]


def test_weights_are_shares_of_the_interval_mean_learning_rates(tmp_path):
    # Intervals (0, 4], (4, 6], (6, 10]: means of 1, 3; of 8; and of 4, 2, 0. Sum 2 + 8 + 2.
    rates = {2: 1e-3, 4: 3e-3, 5: 8e-3, 7: 4e-3, 8: 2e-3, 10: 0.0, 11: 9.0}
    found = open_run(trainer_directory(tmp_path, [10, 4, 6], rates), which="all").checkpoints
    assert [checkpoint.learning_rate for checkpoint in found] == pytest.approx([2e-3, 8e-3, 2e-3])
    assert [checkpoint.weight for checkpoint in found] == pytest.approx([2 / 12, 8 / 12, 2 / 12])
    assert sum(checkpoint.weight for checkpoint in found) == pytest.approx(1)


def test_last_is_the_newest_checkpoint_with_the_whole_weight(tmp_path):
    run = open_run(trainer_directory(tmp_path, [10, 9], {3: 5.0, 9: 1.0, 10: 2.0}))
    assert run.path == str(tmp_path)
    assert run.checkpoints == (Checkpoint(str(tmp_path / "checkpoint-10"), 10, 2.0, 1.0),)


def test_final_model_beside_checkpoints_does_not_count(tmp_path):
    trainer_directory(tmp_path, [3], {3: 1.0})
    (tmp_path / "model.safetensors").touch()
    assert open_run(tmp_path).checkpoints[0].path.endswith("checkpoint-3")


def test_missing_learning_rates_are_refused_for_all_and_named(tmp_path):
    run = trainer_directory(tmp_path, [2, 4, 6], {1: 1e-3, 6: 1e-3})
    with pytest.raises(ModelError, match=r"before checkpoint-4, .* --checkpoints last"):
        open_run(run, which="all")
    assert open_run(run).checkpoints[0].learning_rate == 1e-3


def test_learning_rates_that_are_all_zero_are_refused_for_all(tmp_path):
    run = trainer_directory(tmp_path, [2, 4], {2: 0.0, 4: 0.0})
    with pytest.raises(ModelError, match="checkpoint-2, checkpoint-4"):
        open_run(run, which="all")


def test_checkpoints_without_a_state_have_no_learning_rate(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert open_run(tmp_path).checkpoints[0].learning_rate is None
    with pytest.raises(ModelError, match=r"trainer_state\.json: there is no such file.* --checkpoints last"):
        open_run(tmp_path, which="all")


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("path", ["a/hub-name", "{tmp}", "{tmp}/checkpoint-4"])
def test_anything_else_is_a_run_of_one(tmp_path, which, path):
    trainer_directory(tmp_path / "inner", [4], {4: 1.0})
    path = path.format(tmp=tmp_path) if "checkpoint" not in path else str(tmp_path / "inner" / "checkpoint-4")
    assert open_run(path, which=which).checkpoints == (Checkpoint(path, None, None, 1.0),)


@pytest.mark.parametrize(
    "state",
    [
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"log_history": null}',
        b'{"log_history": [{"learning_rate": 1.0}]}',
        b'{"log_history": [{"learning_rate": null, "step": 1}]}',
        b'{"log_history": [{"learning_rate": 1.0, "step": [1]}]}',
    ],
)
@pytest.mark.parametrize("which", ["all", "last"])
def test_corrupt_state_names_its_file(tmp_path, state, which):
    file = trainer_directory(tmp_path, [3], {3: 1.0}) / "checkpoint-3" / "trainer_state.json"
    file.write_bytes(state)
    with pytest.raises(ModelError, match="not a Trainer's state") as caught:
        open_run(tmp_path, which=which)
    assert str(file) in str(caught.value)


def test_unknown_choice_of_checkpoints_is_refused(tmp_path):
    with pytest.raises(SettingError, match="choose all or last"):
        open_run(tmp_path, which="first")
