"""A Trainer's directory is a run: its checkpoints by step, weighted by the learning rates that led to each."""

import json

import pytest
import torch
import transformers

from whence.errors import ChecksumError, ModelError, SettingError
from whence.models.runs import Checkpoint, open_run
from whence.models.saved_files import list_files


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
    # Steps 1 to 10, of which 3, 6 and 9 are interpolated and 1 continues the first line: 0 1 2 3, 8 6, 4 2 1 0.
    rates = {2: 1e-3, 4: 3e-3, 5: 8e-3, 7: 4e-3, 8: 2e-3, 10: 0.0, 11: 9.0}
    checkpoints = open_run(trainer_directory(tmp_path, [10, 4, 6], rates), which="all").checkpoints
    assert [checkpoint.learning_rate for checkpoint in checkpoints] == pytest.approx([1.5e-3, 7e-3, 1.75e-3])
    assert [checkpoint.weight for checkpoint in checkpoints] == pytest.approx([6 / 41, 28 / 41, 7 / 41])
    assert sum(checkpoint.weight for checkpoint in checkpoints) == pytest.approx(1)


def schedule(kind, warmup, *, steps=60, peak=1e-3, **more):
    """The rate of every step, from torch and transformers."""
    weights = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    steps_of = {"num_warmup_steps": warmup, "num_training_steps": steps}
    scheduler = transformers.get_scheduler(kind, weights, **steps_of, scheduler_specific_kwargs=more)
    rates, states = [], []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        weights.step()
        scheduler.step()
        states.append(scheduler.state_dict())
    return rates, states


def trained(path, kind, warmup, logged, *, is_old=False, keeps_schedulers=True):
    """A directory with checkpoints at 20, 40 and 60 as transformers leaves it, and the true weights of these."""
    rates, states = schedule(kind, warmup)
    next_rates = [*rates[1:], states[-1]["_last_lr"][0]]
    run = trainer_directory(path, [20, 40, 60], {step: (next_rates if is_old else rates)[step - 1] for step in logged})
    for step in (20, 40, 60) if keeps_schedulers else ():
        torch.save(states[step - 1], run / f"checkpoint-{step}" / "scheduler.pt")
    file = run / "checkpoint-60" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_steps": 60}))
    return run, [sum(rates[end - 20 : end]) / sum(rates) for end in (20, 40, 60)]


@pytest.mark.parametrize("keeps_schedulers", [True, False])
@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("logged", [[20, 40, 60], [25, 50], [1, 15, 30, 45, 60], range(1, 61)])
@pytest.mark.parametrize(("kind", "warmup"), [("linear", 0), ("cosine", 0), ("cosine", 6), ("constant", 0)])
def test_weights_are_the_schedulers_own_however_seldom_rates_were_logged(
    tmp_path, kind, warmup, logged, is_old, keeps_schedulers
):
    run, weights = trained(tmp_path, kind, warmup, logged, is_old=is_old, keeps_schedulers=keeps_schedulers)
    found = [checkpoint.weight for checkpoint in open_run(run, which="all").checkpoints]
    assert found == pytest.approx(weights)


def test_a_warm_up_that_no_log_saw_shows_in_the_peak_of_a_scheduler(tmp_path):
    run, weights = trained(tmp_path, "linear", 12, [])
    assert [checkpoint.weight for checkpoint in open_run(run, which="all").checkpoints] == pytest.approx(weights)


def test_other_schedules_are_interpolated_and_a_note_says_so(tmp_path):
    run, weights = trained(tmp_path, "inverse_sqrt", 4, [10, 20, 30, 40, 50, 60])
    opened = open_run(run, which="all")
    assert [checkpoint.weight for checkpoint in opened.checkpoints] == pytest.approx(weights, abs=0.03)
    assert "on file for 9 of 60 steps; the others are taken to be interpolated" in opened.notes[0]


def weights_of(rates, ends):
    """Shares of the sums of rates between ends."""
    sums = [sum(rates[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return [value / sum(rates) for value in sums]


def left_by_trainer(path, rates, *, save, log, is_old=False, peak=1e-3, keeps_schedulers=True):
    """Checkpoints at every `save` steps with logs at every `log` steps; `rates` has one more than steps."""
    steps = len(rates) - 1
    ends = list(range(save, steps + 1, save))
    logged = {step: rates[step - 1 + is_old] for step in range(log, steps + 1, log)}
    run = trainer_directory(path, ends, logged)
    state = run / f"checkpoint-{steps}" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"max_steps": steps}))
    for end in ends if keeps_schedulers else ():
        peaks = {} if peak is None else {"base_lrs": [peak]}
        torch.save({"_last_lr": [rates[end]], **peaks}, run / f"checkpoint-{end}" / "scheduler.pt")
    opened = open_run(run, which="all")
    return [checkpoint.weight for checkpoint in opened.checkpoints], weights_of(rates[:-1], ends), opened.notes


def test_a_drop_at_a_checkpoint_is_no_slope_of_the_interval_before(tmp_path):
    rates = [1e-3] * 50 + [5e-4] * 50 + [2.5e-4]  # ReduceLROnPlateau, whose state has no peak
    found, true, (note,) = left_by_trainer(tmp_path, rates, save=50, log=50, peak=None)
    assert found == pytest.approx(true)
    assert "before step 50 on the line from step 100, at most 0.001" in note


def test_restarts_are_a_schedule(tmp_path):
    rates, states = schedule("cosine_with_restarts", 0, steps=100, num_cycles=2)
    found, true, _ = left_by_trainer(tmp_path, [*rates, states[-1]["_last_lr"][0]], save=50, log=50)
    assert found == pytest.approx(true)


def test_rates_that_stay_the_same_do_not_show_which_step_a_log_is_of(tmp_path):
    rates, _ = schedule("constant_with_warmup", 10, steps=101)
    found, true, (note,) = left_by_trainer(tmp_path, rates, save=25, log=10)
    assert found == pytest.approx(true)
    assert "a constant schedule with 10 warm-up steps, on which" in note


@pytest.mark.parametrize(("is_old", "keeps_schedulers"), [(False, False), (True, True)])
def test_a_schedule_with_as_many_parameters_as_rates_is_not_asserted(tmp_path, is_old, keeps_schedulers):
    # Constant, then a cosine to 0 in the last 20 steps: a cosine with a warm-up of 75, or a line with one of 50, fits.
    rates, states = schedule("warmup_stable_decay", 0, steps=100, num_decay_steps=20)
    rates = [*rates, states[-1]["_last_lr"][0]]
    how = {"is_old": is_old, "keeps_schedulers": keeps_schedulers}
    found, true, notes = left_by_trainer(tmp_path, rates, save=50, log=50, **how)
    assert "the others are taken to be interpolated between these, before step 5" in notes[-1]
    assert found == pytest.approx(true, abs=0.12)


def test_shapes_that_the_rates_cannot_tell_apart_are_named(tmp_path):
    rates, states = schedule("cosine", 0, steps=100)
    found, _, notes = left_by_trainer(
        tmp_path, [*rates, states[-1]["_last_lr"][0]], save=50, log=50, is_old=True, keeps_schedulers=False
    )
    assert found == pytest.approx([0.75, 0.25], abs=0.01)
    assert "a linear schedule with 0 warm-up steps (or up to 50)" in notes[-1]
    assert "as they do on cosine ones: linear is the Trainer's default" in notes[-1]


@pytest.mark.parametrize("which", ["all", "last"])
def test_checkpoints_without_logs_of_two_trainings_are_refused_by_their_peaks(tmp_path, which):
    trainer_directory(tmp_path, [100, 200, 300, 400], {})
    for step, peak in ((100, 1e-4), (200, 1e-4), (300, 1e-4), (400, 1e-3)):
        state = {"_last_lr": [peak * (1 - step / 400)], "base_lrs": [peak]}
        torch.save(state, tmp_path / f"checkpoint-{step}" / "scheduler.pt")
    with pytest.raises(ModelError, match=r"checkpoint-100 and checkpoint-400 are .*: the peak .* 0.0001 in .* 0.001"):
        open_run(tmp_path, which=which)


def test_an_empty_log_is_not_the_beginning_of_one_with_earlier_lines(tmp_path):
    with_log(tmp_path, 300, [1e-3] * 3)
    with_log(tmp_path, 50, [])
    assert open_run(tmp_path).checkpoints[0].step == 300
    with_log(tmp_path, 250, [])
    with pytest.raises(ModelError, match=r"checkpoint-250 and checkpoint-300 are of two .*: entry 1 .* is missing"):
        open_run(tmp_path)


def test_a_single_rate_is_taken_for_the_default_schedule_and_a_note_says_so(tmp_path):
    run, weights = trained(tmp_path, "linear", 0, [50], keeps_schedulers=False)
    opened = open_run(run, which="all")
    assert [checkpoint.weight for checkpoint in opened.checkpoints] == pytest.approx(weights)
    assert "a linear schedule with 0 warm-up steps" in opened.notes[0]


def test_rates_that_are_all_on_file_need_no_note(tmp_path):
    assert not open_run(trained(tmp_path, "linear", 3, range(1, 61))[0], which="all").notes


def test_a_checkpoint_of_weight_zero_is_left_out(tmp_path):
    run = open_run(trainer_directory(tmp_path, [1, 2, 3], {1: 0.0, 2: 2e-3, 3: 1e-3}), which="all")
    assert [(checkpoint.step, checkpoint.weight) for checkpoint in run.checkpoints] == [
        (2, pytest.approx(2 / 3)),
        (3, pytest.approx(1 / 3)),
    ]
    assert "0 up to checkpoint-1, of weight 0: left out" in run.notes[0]


def with_log(path, step, rates):
    """One checkpoint whose state logs a rate at every 100th step."""
    entries = [{"step": 100 * (n + 1), "learning_rate": rate, "loss": 1.0} for n, rate in enumerate(rates)]
    (path / f"checkpoint-{step}").mkdir()
    (path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("later", [[1e-5] * 3, [1e-3] * 2 + [1e-5], [1e-3] * 2])
def test_checkpoints_of_two_trainings_in_one_directory_are_refused_by_name(tmp_path, which, later):
    with_log(tmp_path, 700, [1e-3] * 7)
    with_log(tmp_path, 600, [1e-3] * 6)
    open_run(tmp_path, which=which)
    with_log(tmp_path, 350, later)
    with pytest.raises(ModelError, match=r"checkpoint-350 and checkpoint-700 are of two trainings: entry [1-3] of"):
        open_run(tmp_path, which=which)


def test_a_log_line_written_after_its_checkpoint_is_no_contradiction(tmp_path):
    with_log(tmp_path, 200, [1e-3])  # the line of step 200 came later
    with_log(tmp_path, 300, [1e-3, float("nan"), 1e-3])
    with_log(tmp_path, 250, [1e-3, float("nan")])
    assert open_run(tmp_path).checkpoints[0].step == 300


def test_last_is_the_newest_checkpoint_with_the_whole_weight(tmp_path):
    run = open_run(trainer_directory(tmp_path, [10, 9], {3: 5.0, 9: 1.0, 10: 2.0}))
    assert run.path == str(tmp_path)
    assert run.checkpoints == (Checkpoint(str(tmp_path / "checkpoint-10"), 10, 2.0, 1.0),)


def test_final_model_beside_checkpoints_does_not_count(tmp_path):
    trainer_directory(tmp_path, [3], {3: 1.0})
    (tmp_path / "model.safetensors").touch()
    assert open_run(tmp_path).checkpoints[0].path.endswith("checkpoint-3")


def test_learning_rates_that_are_all_zero_are_refused_for_all(tmp_path):
    run = trainer_directory(tmp_path, [2, 4], {2: 0.0, 4: 0.0})
    with pytest.raises(ModelError, match=r"no learning rate above 0 .* up to checkpoint-4"):
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
        b'{"log_history": [{"learning_rate": 1.0, "step": Infinity}]}',
        b'{"log_history": [1]}',
    ],
)
@pytest.mark.parametrize("which", ["all", "last"])
def test_corrupt_state_names_its_file(tmp_path, state, which):
    file = trainer_directory(tmp_path, [3], {3: 1.0}) / "checkpoint-3" / "trainer_state.json"
    file.write_bytes(state)
    with pytest.raises(ModelError, match="not a Trainer's state") as caught:
        open_run(tmp_path, which=which)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["trainer_state.json", "scheduler.pt"])
def test_damaged_learning_rates_are_not_weights(tmp_path, name):
    checkpoint = trainer_directory(tmp_path, [3], {3: 1.0}) / "checkpoint-3"
    torch.save({"_last_lr": [0.5], "base_lrs": [1.0]}, checkpoint / "scheduler.pt")
    list_files(checkpoint)
    assert open_run(tmp_path, which="all").checkpoints[0].weight == 1
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data.replace(b"1.0", b"9.0", 1) if name.endswith("json") else data[:-1] + b"?")
    with pytest.raises(ChecksumError, match=f"{name} is not what was written"):
        open_run(tmp_path, which="all")


def test_unknown_choice_of_checkpoints_is_refused(tmp_path):
    with pytest.raises(SettingError, match="choose all or last"):
        open_run(tmp_path, which="first")


def test_a_state_beside_the_checkpoints_is_read_where_they_have_none(tmp_path):
    rates = {2: 1e-3, 4: 1e-3, 6: 5e-4}
    expected = open_run(trainer_directory(tmp_path, [4, 6], rates), which="all").checkpoints
    (tmp_path / "checkpoint-6" / "trainer_state.json").rename(tmp_path / "trainer_state.json")
    assert open_run(tmp_path, which="all").checkpoints == expected


def test_all_checkpoints_of_accelerate_are_refused_by_their_names(tmp_path):
    for name in ("epoch_0", "epoch_10", "epoch_2"):
        (tmp_path / name).mkdir()
    assert [checkpoint.path for checkpoint in open_run(tmp_path).checkpoints] == [str(tmp_path)]
    with pytest.raises(ModelError, match=r"its checkpoints are epoch_0 to epoch_10, of which no file says"):
        open_run(tmp_path, which="all")
