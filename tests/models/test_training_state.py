"""A training that is not finished is told, and a checkpoint that is named itself is not."""

import json
import logging
import shutil

import pytest

from conftest import save_tiny_run
from whence.models.training_state import best_note, unfinished_note
from whence.storage import Place


@pytest.mark.parametrize(
    ("is_complete", "steps", "note"),
    [
        (False, 16, "a training that is not finished (checkpoint 8 of 16): `whence train` with the same settings goes"),
        (True, 16, None),
        (None, 16, "a training that ended before its last step (checkpoint 8 of 16): stopped early, or not finished"),
        (None, 8, None),
        (None, None, None),
    ],
)
def test_an_unfinished_training_is_told(tmp_path, is_complete, steps, note):
    checkpoint = tmp_path / "run" / "checkpoint-8"
    checkpoint.mkdir(parents=True)
    state = {"global_step": 8, "log_history": []} | ({} if steps is None else {"max_steps": steps})
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    if is_complete is not None:
        Place.at(tmp_path / "run").write_document("whence_train.json", {"is_complete": is_complete})
    found = unfinished_note(tmp_path / "run")
    assert found is None if note is None else note in found
    assert unfinished_note(checkpoint) is None


def test_index_and_recover_tell_it(tmp_path, tiny_corpus, tiny_llama, caplog):
    from whence.indexing.build import index
    from whence.recovery.case import open_case
    from whence.recovery.settings import RecoverSettings

    run = save_tiny_run(tmp_path / "run")
    file = run / "checkpoint-4" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 4, "max_steps": 9}))
    with caplog.at_level(logging.WARNING):
        index(run, tiny_corpus, tmp_path / "index", projection="two_sided", width=8, progress=False)
    assert "(checkpoint 4 of 9)" in caplog.text
    assert "(checkpoint 4 of 9)" in open_case(str(tiny_llama), str(run), RecoverSettings()).notes[0]


def test_a_run_whose_best_checkpoint_is_not_its_last_tells_which_is_taken(tmp_path, tiny_llama, tiny_corpus, caplog):
    """As `load_best_model_at_end` leaves it: the best weights beside the checkpoints."""
    from whence.indexing.build import index

    run = save_tiny_run(tmp_path / "run")
    file = run / "checkpoint-4" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best_model_checkpoint": "out/checkpoint-2"}))
    assert best_note(run) is None, "there is no model beside the checkpoints"
    shutil.copytree(run / "checkpoint-4", run, dirs_exist_ok=True)
    assert best_note(run) is None, "the model beside the checkpoints is the last"
    shutil.copytree(run / "checkpoint-2", run, dirs_exist_ok=True)
    assert best_note(run / "checkpoint-4") is None
    with caplog.at_level(logging.WARNING):
        index(run, tiny_corpus, tmp_path / "index", projection="two_sided", width=8, progress=False)
    assert f"checkpoint-4 is taken; for the best, name {run / 'checkpoint-2'}." in caplog.text
    shutil.rmtree(run / "checkpoint-2")  # `save_total_limit` may have
    assert "copy the model's own files to another directory" in best_note(run)
