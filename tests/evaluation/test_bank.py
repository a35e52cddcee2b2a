"""A bank of a tiny run: members are what trainings give, it grows, goes on after a kill, and refuses others."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from conftest import contents, corpus_rows, save_tiny_llama, write_jsonl
from whence.corpus.tokens import encode
from whence.errors import ChecksumError, CorpusError, ManifestMismatchError, SettingError
from whence.evaluation import member_training
from whence.evaluation.bank_pipeline import bank, make_bank
from whence.evaluation.bank_spread import fall_of_loss, spreads, without_loss
from whence.evaluation.bank_store import open_bank, write_member
from whence.evaluation.left_out import listed_plan, random_plans
from whence.evaluation.member_training import WORK, MemberTraining
from whence.models.loading import load_model
from whence.models.runs import open_run
from whence.training.trainer import train

ROWS = corpus_rows(12)
QUERIES = corpus_rows(3, first=50)
RECIPE = {"batch_size": 4, "epochs": 2, "lr": 5e-3, "max_tokens": 32, "checkpoints": 1, "progress": False}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("bank") / "model")


@pytest.fixture(scope="module")
def run(parent, tmp_path_factory):
    return train(parent, ROWS, tmp_path_factory.mktemp("bank") / "run", **RECIPE)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """A bank of three subsets. Copy it before changing it."""
    return bank(run, ROWS, tmp_path_factory.mktemp("bank") / "bank", queries=QUERIES, subsets=3, progress=False)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of that bank."""
    return shutil.copytree(made.place.root, tmp_path / "copy")


def mean_losses(directory, queries=QUERIES):
    """Loss of each query by a model in a directory, a token at a time."""
    loaded, out = load_model(directory), []
    for query in queries:
        encoded = encode(query, loaded.tokenizer, 32)
        with torch.no_grad():
            logits = loaded.base(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        places = [place for place, is_supervised in enumerate(encoded.supervised) if is_supervised]
        out.append(-sum(logits[place - 1, encoded.ids[place]].item() for place in places) / len(places))
    return out


def test_full_and_parent_are_the_run_and_its_model(made, run, parent):
    last = open_run(run).checkpoints[-1].path
    assert made.full_losses.tolist() == pytest.approx(mean_losses(last), rel=1e-5)
    assert made.parent_losses.tolist() == pytest.approx(mean_losses(parent), rel=1e-5)
    assert (made.description.repetition.largest, made.description.repetition.cosine) == (0.0, 1.0)
    assert made.description.notes == () and made.full.steps == 6 and made.full.seconds > 0


def test_a_member_is_a_training_without_its_rows(made, run, tmp_path):
    member = made.members[0]
    assert member.name == "random-0000" and len(member.left_out) == 6
    from whence.training.repetition import repeatable, train_again

    trained = train_again(repeatable(run, ROWS), tmp_path / "e", left_out=member.left_out)
    trained.model.model.save_pretrained(tmp_path / "w")
    trained.model.tokenizer.save_pretrained(tmp_path / "w")
    assert made.losses()[0].tolist() == pytest.approx(mean_losses(tmp_path / "w"), rel=1e-5)


def test_drop_is_a_training_on_the_rest(made, run, parent, tmp_path):
    other = bank(run, ROWS, tmp_path / "bank", queries=QUERIES, subsets=2, leave_out="drop", progress=False)
    rest = [row for row, is_in in zip(ROWS, other.included()[1].tolist(), strict=True) if is_in]
    own = train(parent, rest, tmp_path / "run", **RECIPE)
    assert other.losses()[1].tolist() == pytest.approx(mean_losses(open_run(own).checkpoints[-1].path), rel=1e-5)
    assert other.members[1].left_out == made.members[1].left_out and other.members[1].steps == 4


def test_the_same_call_makes_nothing(made, run, copied):
    before = contents(copied)
    again = make_bank(run, ROWS, copied, queries=QUERIES, subsets=3, progress=False)
    assert (again.trained, again.measured) == ((), 0) and contents(copied) == before
    assert make_bank(run, ROWS, copied, subsets=2, progress=False).trained == ()


def test_a_bank_grows_and_keeps_its_members(made, run, copied, tmp_path):
    before = contents(copied)
    files = [write_jsonl(tmp_path / f"top-{n}.jsonl", [{"id": f"row-{i}", "rank": 1} for i in ids])
             for n, ids in enumerate(((3, 1), (4,)))]  # fmt: skip
    grown = make_bank(run, ROWS, copied, subsets=4, by="source", rows=files, progress=False)
    names = [name.rpartition("-")[0] for name in grown.trained]
    assert names == ["random", "group-source-s0", "group-source-s1", "rows-top-0", "rows-top-1"]
    assert {name: data for name, data in contents(copied).items() if name in before} == before
    by_label = {member.label: member for member in grown.bank.members}
    assert by_label["source s1"].left_out == (1, 3, 5, 7, 9, 11) and by_label["top-0.jsonl"].left_out == (1, 3)
    whole = bank(run, ROWS, tmp_path / "whole", queries=QUERIES, subsets=4, progress=False)
    assert torch.equal(whole.losses("random"), grown.bank.losses("random"))


def test_a_killed_bank_loses_one_training(made, run, tmp_path, monkeypatch):
    real, calls = MemberTraining.__call__, []

    def stop(self, plan, tick):
        calls.append(plan.name)
        if len(calls) == 3:
            (tmp_path / "bank" / f"{WORK}left").mkdir()
            raise KeyboardInterrupt
        return real(self, plan, tick)

    monkeypatch.setattr(MemberTraining, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        bank(run, ROWS, tmp_path / "bank", queries=QUERIES, subsets=3, progress=False)
    monkeypatch.setattr(MemberTraining, "__call__", real)
    assert open_bank(tmp_path / "bank").of_kind("random")[0].name == "random-0000"
    after = make_bank(run, ROWS, tmp_path / "bank", subsets=3, progress=False)
    assert after.trained == ("random-0001", "random-0002")
    assert torch.equal(after.bank.losses(), made.losses())
    assert not [*(tmp_path / "bank").glob(f"{WORK}*")]


def test_a_damaged_member_is_made_again(made, run, copied):
    file = copied / "members/random-0001/member.json"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ChecksumError, match=r"Remove members/random-0001, and run the same `whence bank`"):
        bank(run, ROWS, copied, subsets=3, progress=False)
    shutil.rmtree(file.parent)
    assert make_bank(run, ROWS, copied, subsets=3, progress=False).trained == ("random-0001",)


def test_other_queries_need_weights(made, run, copied, tmp_path):
    others = corpus_rows(2, first=70)
    with pytest.raises(SettingError, match="other queries than the bank's, whose members have no weights"):
        bank(run, ROWS, copied, queries=others, progress=False)
    kept = bank(run, ROWS, tmp_path / "kept", queries=QUERIES, subsets=2, keep_weights=True, progress=False)
    assert kept.losses().tolist() == made.losses()[:2].tolist()
    directory = kept.weights(kept.members[0])
    assert kept.losses()[0].tolist() == pytest.approx(mean_losses(directory), rel=1e-5)
    assert not [file for file in directory.iterdir() if file.name.startswith(("optimizer", "training_args"))]
    more = make_bank(run, ROWS, tmp_path / "kept", queries=others, progress=False)
    assert (more.trained, more.measured) == ((), 4) and more.bank.query_ids[3:] == ("row-70", "row-71")
    assert more.bank.losses()[0, 3:].tolist() == pytest.approx(mean_losses(directory, others), rel=1e-5)
    assert more.bank.parent_losses[3:].tolist() == pytest.approx(mean_losses(kept.protocol.model, others), rel=1e-5)
    assert make_bank(run, ROWS, tmp_path / "kept", queries=others, progress=False).measured == 0
    with pytest.raises(CorpusError, match="'row-71' is in the bank already"):
        bank(run, ROWS, tmp_path / "kept", queries=[*corpus_rows(1, first=90), others[1]], progress=False)
    first = more.bank.members[0]
    write_member(more.bank.place, replace(first, weights=None))
    with pytest.raises(SettingError, match="the weights of random-0000 are not kept, and queries were added since"):
        bank(run, ROWS, tmp_path / "kept", queries=corpus_rows(1, first=90), progress=False)
    write_member(more.bank.place, first)
    (directory / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ChecksumError, match=r"model.safetensors"):
        bank(run, ROWS, tmp_path / "kept", queries=corpus_rows(1, first=90), progress=False)


def test_a_bank_of_adapters_keeps_adapters(parent, tmp_path):
    run = train(parent, ROWS, tmp_path / "run", **RECIPE | {"epochs": 1}, lora_rank=2, lora_dropout=0.2)
    made = bank(run, ROWS, tmp_path / "bank", queries=QUERIES, subsets=2, keep_weights=True, progress=False)
    assert made.description.repetition.largest == 0.0
    assert made.full_losses.tolist() == pytest.approx(mean_losses(open_run(run).checkpoints[-1].path), rel=1e-5)
    for member, losses in zip(made.members, made.losses(), strict=True):
        assert losses.tolist() == pytest.approx(mean_losses(made.weights(member)), rel=1e-5)


def test_differences_are_named(made, run, parent, copied, tmp_path):
    other = train(parent, ROWS, tmp_path / "run", **RECIPE | {"lr": 1e-3})
    with pytest.raises(ManifestMismatchError, match=r"leave out zero there, drop here; keep weights False there, True"):
        bank(run, ROWS, copied, subsets=3, leave_out="drop", keep_weights=True, progress=False)
    with pytest.raises(
        ManifestMismatchError, match=r"run weights \w+... there, \w+... here; lr 0.005 there, 0.001 here"
    ):
        bank(other, ROWS, copied, subsets=3, progress=False)
    with pytest.raises(ManifestMismatchError, match=r"random subsets have --fraction 0.5 and --seed 0, not 0.25 and 0"):
        bank(run, ROWS, copied, subsets=3, fraction=0.25, progress=False)
    with pytest.raises(ManifestMismatchError, match=r"trained on 12 rows .* these are 11"):
        bank(run, ROWS[1:], copied, subsets=3, progress=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"subsets": 1}, "--subsets 1: two or more"),
        ({"subsets": 2, "fraction": 1.0}, "--fraction 1.0: a share above 0 and below 1"),
        ({"subsets": 2, "fraction": 0.01}, "--fraction 0.01 of 12 rows keeps 0; from 1 to 11"),
        ({"by": "shade", "fraction": 0.5}, "--fraction 0.5: it is of random subsets: add --subsets N, or leave it out"),
        ({"by": "shade", "seed": 3}, "--seed 3: it is of random subsets: add --subsets N, or leave it out"),
        ({"subsets": 2, "leave_out": "none"}, "--leave-out none: choose one of zero, drop"),
        ({}, "nothing to leave out"),
        ({"by": "colour"}, "--by colour: no row of the training has this column. The first rows have completion, id"),
        ({"by": "shade"}, "--by shade: all 12 rows with a value have 'x'; two groups"),
        ({"subsets": 2, "engine": "slurm"}, "--engine slurm"),
        ({"subsets": 2, "queries": None}, "--queries: a file of held-out rows is expected"),
    ],
)
def test_what_cannot_work_is_refused(run, tmp_path, settings, words):
    rows = [row | {"shade": "x"} for row in ROWS]
    with pytest.raises(SettingError, match=words):
        bank(run, rows, tmp_path / "bank", **{"queries": QUERIES, "progress": False} | settings)
    assert not (tmp_path / "bank").exists()


def test_files_of_ids_are_checked(made, tmp_path):
    for rows, words in (
        ([{"id": "nobody"}, {"id": "row-1"}], "'nobody' is of no row that the run was trained on, as are 1 of 2 ids"),
        ([{"name": 1}], "no `id`"),
        ([], "no rows"),
    ):
        with pytest.raises(CorpusError, match=words):
            listed_plan(write_jsonl(tmp_path / "f.jsonl", rows), made.rows, 0)
    with pytest.raises(SettingError, match="it lists all 12 rows of the training"):
        listed_plan(write_jsonl(tmp_path / "f.jsonl", ROWS), made.rows, 0)


def test_foreign_directories_and_twin_ids_are_refused(run, parent, tmp_path):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match=r"it holds notes.txt already, and no bank.json"):
        bank(run, ROWS, tmp_path / "bank", queries=QUERIES, subsets=2, progress=False)
    with pytest.raises(CorpusError, match="the id 'row-50' is given twice"):
        bank(run, ROWS, tmp_path / "other", queries=[QUERIES[0], QUERIES[0]], subsets=2, progress=False)
    twins = [ROWS[0], *ROWS[:11]]
    twice = train(parent, twins, tmp_path / "run", **RECIPE)
    with pytest.raises(CorpusError, match="the id 'row-0' is given twice"):
        bank(twice, twins, tmp_path / "other", queries=QUERIES, subsets=2, progress=False)


def test_queries_without_a_loss_are_nan_and_named(run, tmp_path, caplog):
    empty = {"id": "silent", "prompt": "x", "completion": None}
    with pytest.raises(CorpusError, match="1 query none has a supervised token"):
        bank(run, ROWS, tmp_path / "none", queries=[empty], subsets=2, progress=False)
    found = bank(run, ROWS, tmp_path / "bank", queries=[QUERIES[0], empty], subsets=2, progress=False)
    assert without_loss(found) == ["silent"] and found.losses()[:, 1].isnan().all()
    assert "1 of 2 have no loss in some member: silent" in caplog.text
    assert all(math.isfinite(value) for value in (*fall_of_loss(found), spreads(found)[0].loss))


def test_spread_by_hand(made):
    losses = [[1.0, 4.0], [3.0, 8.0]]
    members = [replace(one, losses=tuple(line)) for one, line in zip(made.members[:2], losses, strict=True)]
    full, before = replace(made.full, losses=(1.0, 2.0)), replace(made.parent, losses=(5.0, 7.0))
    two = replace(made, members=tuple(members), queries=made.queries[:2], full=full, parent=before)
    (spread,) = spreads(two)
    assert (spread.members, spread.kept, spread.loss) == (2, 6.0, 4.0)
    assert spread.of_mean == pytest.approx(3 / 2**0.5)  # of 2.5 and 5.5
    assert spread.of_query == pytest.approx((2**0.5 + 8**0.5) / 2)  # of 1 and 3, and of 4 and 8
    assert fall_of_loss(two) == (6.0, 1.5)


def test_subsets_are_the_same_whatever_their_number(made):
    few, many = (random_plans(12, count, made.description.subsets, 0) for count in (2, 5))
    assert many[:2] == few and len({plan.left_out for plan in many}) == 5
    assert [plan.left_out for plan in random_plans(12, 3, made.description.subsets, 0)] == [
        member.left_out for member in made.members
    ]


def test_another_end_than_the_runs_is_a_note(run, tmp_path, caplog, monkeypatch):
    from whence.evaluation.bank_store import Repetition

    monkeypatch.setattr(member_training, "repetition_of", lambda *_: Repetition(largest=0.4, cosine=0.91))
    found = bank(run, ROWS, tmp_path / "bank", queries=QUERIES, subsets=2, progress=False)
    assert found.description.notes[0].startswith("The training on all rows did not end as the run did: the cosine of")
    assert "0.9100" in caplog.text and json.loads((tmp_path / "bank/bank.json").read_text())["notes"]
