"""A dry run of `train`, `pool train` and `recover` says what they then write and do, and writes nothing itself."""

import json

import pytest

from conftest import contents, corpus_rows, save_tiny_llama, write_jsonl
from whence.ablation.dry_run import plan_pool
from whence.ablation.member_training import train_pool
from whence.errors import SettingError
from whence.indexing.planning import TIME
from whence.recovery.dry_run import plan_recovery, shadow_trainings
from whence.recovery.pipeline import recover
from whence.recovery.settings import RecoverSettings
from whence.training.dry_run import plan_training, steps_of
from whence.training.recipe import TrainSettings
from whence.training.trainer import train

ROWS = corpus_rows(60)
SHORT = {"batch_size": 8, "max_steps": 9, "checkpoints": 2}


def written(path, start=""):
    """Bytes of a directory's files below a name."""
    return sum(len(data) for name, data in contents(path).items() if name.startswith(start))


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}, {"optimizer": "sgd", "micro_batch": 4}], ids=str)
def test_a_training_takes_the_steps_and_bytes_of_its_plan(tiny_llama, tmp_path, more):
    out = tmp_path / "run"
    plan = plan_training(tiny_llama, ROWS, out, **SHORT, **more)
    assert not out.exists() and plan.phases[1].about == "9 steps" and plan.phases[1].seconds > 0
    run = train(tiny_llama, ROWS, out, progress=False, **SHORT, **more)
    assert len([*run.glob("checkpoint-*")]) == 2 and "2 checkpoints" in plan.about
    assert plan.disk["checkpoints"] == pytest.approx(written(run, "checkpoint-"), rel=0.2)
    rest = plan_training(tiny_llama, ROWS, out, **SHORT, **more)
    assert rest.disk_bytes == rest.phases[1].seconds == 0 and "9 steps of 9 are done" in rest.notes[-1]
    with pytest.raises(SettingError, match="holds a training with other settings: --lr is"):
        plan_training(tiny_llama, ROWS, out, **SHORT, **more, lr=1.0)


def test_checkpoints_are_counted_as_the_trainer_writes_them():
    assert steps_of(TrainSettings(epochs=2, batch_size=8), 20) == (6, [3, 6])
    assert steps_of(TrainSettings(max_steps=7, batch_size=8, checkpoints=2), 20) == (7, [4, 7])
    assert steps_of(TrainSettings(epochs=2.5, batch_size=10), 20) == (5, [2, 4, 5])


def test_a_plan_has_the_followers_of_a_training(tiny_llama, tmp_path):
    plan = plan_training(tiny_llama, ROWS, tmp_path / "run", in_run=ROWS[:8], mix="online", **SHORT)
    assert plan.phases[1].about == "9 steps" and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("more", [{}, {"dtype": "float32"}, {"lora_rank": 2}], ids=str)
def test_a_pool_takes_the_members_and_bytes_of_its_plan(tiny_llama, tmp_path, more):
    settings = {"tokens": 300, "steps": 4, "warmup_steps": 1, **more}
    plan = plan_pool(tiny_llama, ROWS, tmp_path / "pool", **settings)
    assert not [*tmp_path.iterdir()] and plan.about.startswith("2 members of 2 to train, each 4 steps")
    train_pool(tiny_llama, ROWS, tmp_path / "pool", progress=False, **settings)
    members = sum(len(data) for name, data in contents(tmp_path / "pool").items() if name.endswith(".safetensors"))
    assert plan.disk["members"] == pytest.approx(members, rel=0.2)
    done = plan_pool(tiny_llama, ROWS, tmp_path / "pool", **settings)
    assert done.disk_bytes == 0 and done.about.startswith("0 members of 2") and done.phases[2].seconds == 0


def test_a_recovery_names_its_phases_and_the_bytes_of_its_evidence(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    final = train(base, ROWS[:20], tmp_path / "final", lr=1e-3, epochs=1.0, batch_size=4, progress=False)
    known = {"optimizer": "adamw", "epochs": 1.0, "batch_size": 4, "lr": 1e-3, "width": 256}
    plan = plan_recovery(base, final, ROWS, count=20, work=tmp_path / "work", **known)
    assert not (tmp_path / "work").exists() and plan.limit == TIME
    assert [(phase.name, phase.about) for phase in plan.phases[1:]] == [
        ("reading the corpus", "60 rows at 2 points"),
        ("shadow models", "1 training on 20 rows"),
        ("reading for the shadow", "60 rows at 1 point"),
        ("models of each source", "5 trainings"),
    ]
    assert all(phase.seconds > 0 for phase in plan.phases)
    recover(base, final, ROWS, count=20, work=tmp_path / "work", progress=False, **known)
    evidence = written(tmp_path / "work", "evidence") + written(tmp_path / "work", "shadow/evidence")
    assert plan.disk["evidence"] == pytest.approx(evidence, rel=0.2)
    shadow = written(tmp_path / "work", "shadow/") - written(tmp_path / "work", "shadow/evidence")
    assert plan.disk["shadow models"] == pytest.approx(shadow, rel=0.25)
    alone = plan_recovery(base, final, ROWS, count=20, method="nnls", work=tmp_path / "work", width=256)
    assert [phase.name for phase in alone.phases[1:]] == ["reading the corpus"]


def test_a_shadow_whose_recipe_is_guessed_is_trained_several_times():
    assert shadow_trainings(RecoverSettings(lr=1e-4)) == ([2.0, 2.0, 1.0, 1.0, 2.0, 5.0, 5.0], 0)
    plan_rounds = RecoverSettings(method="nnls", rounds=2, epochs=3.0, batch_size=4, optimizer="sgd")
    assert shadow_trainings(plan_rounds) == ([3.0], 3)


def test_the_flag_prints_the_plan_and_the_command_without_it(printed, tiny_llama, tmp_path):
    corpus = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    before = contents(tmp_path)
    train_words = ("train", tiny_llama, corpus, "-o", tmp_path / "run", "--max-steps", 9)
    pool_words = ("pool", "train", tiny_llama, corpus, "-o", tmp_path / "pool", "--tokens", 300, "--steps", 4,
                  "--warmup-steps", 1)  # fmt: skip
    for words in (train_words, pool_words):
        code, out, _ = printed(*words, "--dry-run")
        assert code == 0 and out.splitlines()[-1].endswith(" ".join(["whence", *map(str, words)]))
        assert "time" in out and "at the peak" in out
        document = json.loads(printed(*words, "--dry-run", "--json")[1])
        assert document["fits"] and document["seconds"] == sum(phase["seconds"] for phase in document["phases"])
    assert contents(tmp_path) == before
