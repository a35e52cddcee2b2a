"""The ablate job on a tiny pool: losses against single sequences, truth, agreement by hand, what goes on, mistakes."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import save_tiny_llama
from whence.ablation.candidates import Candidate, read_candidates, usual_candidates
from whence.ablation.heldout_losses import EvalSet, Losses, content_name, measure, read_sets, stored_losses
from whence.ablation.member_training import PoolSettings, read_partitions, slug, train_pool
from whence.ablation.merged_files import write_merged
from whence.ablation.pipeline import ablate, own_partitions
from whence.ablation.pool import open_pool
from whence.ablation.rank_agreement import agreement, centred, groups, kendall
from whence.corpus.reading import open_corpus
from whence.errors import (
    ChecksumError,
    CorpusError,
    ManifestMismatchError,
    MissingIndexError,
    ModelError,
    SettingError,
)
from whence.models.loading import load_model
from whence.numerics import spearman
from whence.storage import Place

ROWS = [{"id": f"{s}{n}", "source": s, "text": f"{s * 3} {n * 7 % 11} " * (2 + n % 3)} for s in "abc" for n in range(9)]
HELD = {s: [{"source": s, "text": f"{s * 3} {n * 5 % 7} {s}"} for n in range(4)] for s in "ab"}
QUICK = {"tokens": 200, "steps": 4, "warmup_steps": 1, "max_tokens": 32, "lr": 5e-3, "dtype": "float32"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("ablation") / "parent"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("ablation") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    place = tmp_path_factory.mktemp("held")
    for name, rows in HELD.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def pool(parent, corpus, tmp_path_factory):
    return train_pool(parent, corpus, tmp_path_factory.mktemp("ablation") / "pool", progress=False, **QUICK)


def test_a_pool_has_a_member_for_each_partition_trained_on_equal_budgets(pool, parent):
    assert pool.partitions == ["a", "b", "c"]
    assert {member.tokens for member in pool.members.values()} == {200}
    assert open_pool(pool.place.root).members == pool.members
    assert not (Path(pool.place.root) / "work").exists() or not any((Path(pool.place.root) / "work").iterdir())
    for member in pool.members.values():
        assert math.isfinite(member.loss)


def test_a_stopped_pool_goes_on_and_new_partitions_join(parent, corpus, tmp_path, monkeypatch):
    from whence.ablation import member_training as job

    trained, made = job.train_model, []

    def stop(*given, **more):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(given[2].name)
        return trained(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(job, "train_model", stop)
        with pytest.raises(KeyboardInterrupt):
            train_pool(parent, corpus, tmp_path / "pool", progress=False, **QUICK)
    half = open_pool(tmp_path / "pool")
    assert half.partitions == ["a", "b"]
    monkeypatch.setattr(
        job, "train_model", lambda *given, **more: made.append(given[2].name) or trained(*given, **more)
    )
    more = [*ROWS, *({"id": f"d{n}", "source": "d", "text": f"ddd {n} ddd"} for n in range(8))]
    whole = train_pool(parent, more, tmp_path / "pool", progress=False, **QUICK)
    assert whole.partitions == ["a", "b", "c", "d"]
    assert made == [slug(name) for name in "abcd"], "each was trained once"
    assert all(whole.members[name] == half.members[name] for name in "ab")
    with pytest.raises(ManifestMismatchError, match=r"trained with lr 0\.005, not 0\.001"):
        train_pool(parent, corpus, tmp_path / "pool", progress=False, **QUICK | {"lr": 1e-3})


def test_a_resumed_pool_is_the_same_pool(pool, parent, corpus, tmp_path):
    again = train_pool(parent, corpus, tmp_path / "pool", progress=False, **QUICK)
    assert {name: member.sha256 for name, member in again.members.items()} == {
        name: member.sha256 for name, member in pool.members.items()
    }


def by_hand(model, rows, longest=32):
    """Nats and tokens of whole texts, which fit."""
    nats, tokens = 0.0, 0
    for row in rows:
        ids = [*model.tokenizer(row["text"])["input_ids"], model.tokenizer.eos_token_id]
        assert len(ids) <= longest
        logp = model.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
        nats -= sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)))
        tokens += len(ids) - 1
    return nats, tokens


def test_losses_are_those_of_written_models(pool, held, tmp_path):
    found = ablate(pool, held, progress=False)
    cells = {(cell.mixture, cell.set): cell for cell in found.cells}
    for name, weights in (("a", {"a": 1.0}), ("a + c", {"a": 0.5, "c": 0.5}), ("all", dict.fromkeys("abc", 1 / 3))):
        model = load_model(write_merged(pool, weights, tmp_path / name.replace(" ", "")), dtype="float32")
        for evaluated, rows in HELD.items():
            nats, tokens = by_hand(model, rows)
            cell = cells[name, evaluated]
            assert cell.merged == pytest.approx(nats / tokens, rel=1e-4)
            size = sum(len(row["text"].encode()) for row in rows)
            assert cell.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-4)
            assert cell.low <= cell.merged <= cell.high
    pair = cells["a + c", "b"]
    alone = [cells[name, "b"].merged for name in "ac"]
    assert pair.mean == pytest.approx(sum(alone) / 2) and pair.best == pytest.approx(min(alone))
    assert pair.mean_ppl == pytest.approx(math.log(sum(map(math.exp, alone)) / 2))
    assert pair.midpoint == pytest.approx((pair.merged + pair.mean) / 2) == pair.row()["midpoint"]
    parent_nats, parent_tokens = by_hand(load_model(pool.parent, dtype="float32"), HELD["b"])
    assert pair.parent == pytest.approx(parent_nats / parent_tokens, rel=1e-4)
    assert [cells[name, "a"].contained for name in ("a", "b", "a + c", "b + c", "all")] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert cells["a", "a"].merged < cells["c", "a"].merged and found.best()["a"] in ("a", "a + b", "a + c")
    assert cells["a", "a"].ngram < cells["c", "a"].ngram


def test_what_was_measured_is_not_measured_again(pool, held, monkeypatch):
    first = ablate(pool, held, progress=False)
    from whence.ablation import pipeline as ablation

    monkeypatch.setattr(ablation, "measure", lambda *given, **more: pytest.fail("it is kept"))
    assert [cell.merged for cell in ablate(pool, held, progress=False).cells] == [cell.merged for cell in first.cells]


def test_a_damaged_member_is_refused_and_its_losses_are_not_kept(pool, parent, corpus, held, tmp_path):
    """Losses used to be stored by the checksum that pool.json says, and were wrong after the member was mended too."""
    out = Path(shutil.copytree(pool.place.root, tmp_path / "pool"))
    shutil.rmtree(out / "losses", ignore_errors=True)
    whole = [cell.merged for cell in ablate(pool, held, progress=False).cells]
    files = [out / pool.members[name].file for name in "ab"]
    data = [file.read_bytes() for file in files]
    for file, wrong in zip(files, reversed(data), strict=True):
        file.write_bytes(wrong)
    with pytest.raises(ChecksumError, match="trains the member of the partition 'a' again"):
        ablate(out, held, progress=False)
    for file in files:
        file.unlink()
    train_pool(parent, corpus, out, progress=False, **QUICK)
    assert [cell.merged for cell in ablate(out, held, progress=False).cells] == whole


def test_a_member_that_is_not_finite_is_refused_each_time(pool, held, tmp_path):
    out = Path(shutil.copytree(pool.place.root, tmp_path / "pool"))
    opened = open_pool(out)
    file = out / opened.members["b"].file
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file)
    written = opened.place.write(opened.members["b"].file, [file.read_bytes()], total=1)
    replace(opened, members=opened.members | {"b": replace(opened.members["b"], **vars(written))}).write()
    for _ in range(2):
        with pytest.raises(ModelError, match="is not finite everywhere"):
            ablate(out, held, progress=False)


def test_stored_losses_that_were_edited_exchanged_or_never_checked_are_not_used(tmp_path):
    place, made = Place.at(tmp_path), Losses(torch.tensor([1.5]).double(), torch.tensor([3]), torch.tensor([9]))
    never = partial(pytest.fail, "it is stored")
    stored_losses(place, ["a"], lambda: made), stored_losses(place, ["b"], lambda: replace(made, nats=made.nats * 2))
    assert stored_losses(place, ["a"], never).loss == 0.5
    first, second = (tmp_path / f"{content_name([key])}.json" for key in "ab")
    whole = first.read_bytes()
    first.write_bytes(whole.replace(b"1.5", b"1.4"))
    with pytest.raises(ChecksumError, match="Remove it, and run the same command again"):
        stored_losses(place, ["a"], never)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ChecksumError, match="losses of another model or set"):
        stored_losses(place, ["a"], never)
    first.write_text(json.dumps({"key": ["a"], "nats": [9.0], "tokens": [3], "bytes": [9]}))  # of an older Whence
    assert stored_losses(place, ["a"], lambda: made).loss == 0.5 and first.read_bytes() == whole


def test_truth_is_the_model_that_is_trained_and_its_losses_are_kept(pool, held, monkeypatch):
    mixtures = [{"name": "both", "weights": {"a": 0.5, "b": 0.5}}, {"a": 1.0}, {"b": 1.0}, {"c": 1.0},
                {"a": 0.25, "c": 0.75, "budgets": 2}]  # fmt: skip
    found = ablate(pool, held, mixtures=mixtures, truth=True, progress=False)
    cells = {(cell.mixture, cell.set): cell for cell in found.cells}
    for name in "ab":
        alone = cells[f"1 {name}", name]
        assert alone.truth == pytest.approx(alone.merged, rel=1e-5), "a member is its own truth: same rows, same seed"
    assert cells["both", "a"].truth != pytest.approx(cells["both", "a"].merged, rel=1e-3)
    assert not any((Path(pool.place.root) / "truth").iterdir()), "weights are not kept"
    scores = found.agreements["a"]["all"]["merged"]
    own = [cell for cell in found.cells if cell.set == "a"]
    expected = spearman(torch.tensor([c.merged for c in own]), torch.tensor([c.truth for c in own]))
    assert scores.spearman == pytest.approx(expected) and scores.candidates == 5
    assert "parent" not in found.agreements["a"]["all"], "what is the same for all ranks nothing"
    assert found.cost["break-even candidates"] == pytest.approx(3 / ((2 + 1 + 1 + 1 + 2) / 5))
    from whence.ablation import pipeline as ablation

    monkeypatch.setattr(ablation, "true_model", lambda *given, **more: pytest.fail("its losses are kept"))
    again = ablate(pool, held, mixtures=mixtures, truth=True, progress=False)
    assert [cell.truth for cell in again.cells] == [cell.truth for cell in found.cells]


def test_truth_of_other_rows_of_the_same_size_is_trained_anew(pool, corpus, held, tmp_path, monkeypatch):
    from whence.ablation import pipeline as ablation

    pool = replace(pool, members={name: replace(member, digest=None) for name, member in pool.members.items()})
    asked = {"mixtures": [{"a": 1.0}], "truth": True, "progress": False}
    before = ablate(pool, held, corpus=corpus, **asked)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    first = next(row for row in rows if row["source"] == "a")
    first["text"] = first["text"][::-1]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained, real = [], ablation.true_model
    monkeypatch.setattr(ablation, "true_model", lambda *given, **more: trained.append(given) or real(*given, **more))
    after = ablate(pool, held, corpus=tmp_path / "rows.jsonl", **asked)
    assert len(trained) == 1
    assert [cell.truth for cell in after.cells] != [cell.truth for cell in before.cells]


def test_ties_cost_what_they_cost_on_average():
    assert agreement([1.0, 1.0, 2.0, 3.0], [3.0, 5.0, 4.0, 6.0]).regret == pytest.approx(1.0)
    assert agreement([1.0, 1.0, 2.0, 3.0], [5.0, 3.0, 4.0, 6.0]).regret == pytest.approx(1.0)


def test_over_sets_candidates_are_what_is_drawn_anew():
    """With an effect of the candidate that all sets share, its cells are no independent evidence."""
    draw = torch.Generator().manual_seed(0)
    missed = {"by candidate": 0, "by cell": 0}
    for _ in range(20):
        x, y = (torch.randn(8, generator=draw).double().repeat(10) + 0.1 * torch.randn(80, generator=draw).double()
                for _ in range(2))  # fmt: skip
        for name, sets in (("by candidate", 10), ("by cell", 1)):
            low, high = agreement(x.tolist(), y.tolist(), sets=sets).spearman_interval
            missed[name] += not low <= 0 <= high
    assert missed["by candidate"] <= 5 < 10 <= missed["by cell"]
    found = agreement([1.0, 2.0, 3.0, 4.0, 2.0, 1.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0, 1.0, 2.0, 3.0, 4.0], sets=2)
    assert found.candidates == 4 and found.regret == pytest.approx(0.5) and found.spread == pytest.approx(3.5)
    assert agreement([1.0, 2.0, 3.0] * 2, [1.0, 2.0, 3.0] * 2, sets=2) is None


def test_rows_without_a_token_are_in_no_interval(pool):
    held = EvalSet("a", ({"text": "aaa 1 aaa 2"}, {"text": None}, {"text": "aaa 3 a"}, {"text": ""}))
    cell = ablate(pool, [held], mixtures=[{"a": 1.0}], progress=False).cells[0]
    assert math.isfinite(cell.low) and cell.low <= cell.merged <= cell.high


@pytest.mark.parametrize("budgets", ["x", -1, "nan", "inf"])
def test_budgets_are_numbers_above_0(pool, budgets):
    with pytest.raises(SettingError, match=f"mixture 1: budgets {budgets!r}; a number above 0 is expected"):
        read_candidates(pool, [{"weights": {"a": 1.0}, "budgets": budgets}])


def test_files_are_partitions_where_that_is_asked(parent, tmp_path):
    for letter in "ab":
        rows = [{"id": row["id"], "text": row["text"]} for row in ROWS if row["source"] == letter]
        (tmp_path / f"{letter}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CorpusError, match="no 'source' to partition by"):
        train_pool(parent, tmp_path, tmp_path / "pool", progress=False, **QUICK)
    made = train_pool(parent, tmp_path, tmp_path / "pool", by="file", progress=False, **QUICK)
    assert made.partitions == ["a", "b"] and {member.rows for member in made.members.values()} == {9}
    assert made.members["a"].size == sum(part.tokens for part in [read_partitions(
        parent, open_corpus(tmp_path / "a.jsonl"), PoolSettings(by="file", max_tokens=32))["a"]])  # fmt: skip


def test_a_partition_whose_rows_have_changed_is_refused(parent, pool, corpus, held, tmp_path):
    changed = [row | {"text": row["text"][::-1]} if row["id"] == "b3" else row for row in ROWS]
    with pytest.raises(ManifestMismatchError, match="9 rows of the partition b are not the 9 that the member"):
        train_pool(parent, changed, pool.place.root, progress=False, **QUICK)
    with pytest.raises(ManifestMismatchError, match="rows of the partition b are not"):
        ablate(pool, held, corpus=changed, progress=False)
    (tmp_path / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    moved = replace(pool, corpus=str(tmp_path / "changed.jsonl"))
    with pytest.raises(ManifestMismatchError, match="rows of the partition b are not"):
        ablate(moved, held, truth=True, progress=False)
    found = ablate(moved, held, progress=False)  # averages need no corpus
    assert any("has other rows than members were trained on: no n-gram" in note for note in found.notes)
    assert {cell.ngram for cell in found.cells} == {None}
    less = [row for row in ROWS if row["source"] != "c"]
    with pytest.raises(SettingError, match="--truth: the corpus has no row of the partition c"):
        ablate(pool, held, mixtures=[{"c": 1.0}], truth=True, corpus=less, progress=False)
    found = ablate(pool, held, mixtures=[{"c": 1.0}], corpus=less, progress=False)
    assert any("no row of the partition c: no n-gram" in note for note in found.notes)


def test_agreement_by_hand():
    proxy, truth = [1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 1.0, 3.0, 2.0, 9.0]
    found = agreement(proxy, truth)
    assert found.spearman == pytest.approx(0.8) and found.kendall == pytest.approx(0.6)
    assert found.regret == pytest.approx(0.1) and found.spread == pytest.approx(8.0)
    x, y = torch.tensor(proxy), torch.tensor(truth)
    expected = float(((x - 3) * (y - y.mean())).sum() / ((x - 3).norm() * (y - y.mean()).norm()))
    assert found.pearson == pytest.approx(expected, rel=1e-5)
    low, high = found.spearman_interval
    assert low <= found.spearman <= high
    assert agreement(proxy[:3], truth[:3]) is None and agreement([1.0] * 5, truth) is None
    assert centred({"s": [1.0, 3.0], "t": [10.0, 20.0]}) == [-1.0, 1.0, -5.0, 5.0]
    assert groups(["x", "y"], lambda name: name == "y") == {"all": [0, 1], "contained": [1], "not contained": [0]}
    assert kendall(torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 1.0]).double()) == -1.0
    with pytest.raises(SettingError, match="losses of a proxy: 3, true ones: 5"):
        agreement(proxy[:3], truth)


def test_long_texts_are_read_in_windows_that_do_not_overlap(parent):
    model = load_model(parent, dtype="float32")
    text = "".join(chr(97 + n * 7 % 26) for n in range(70))
    found = measure(model, EvalSet("s", ({"text": text},)), max_tokens=32)
    parts = [text[:30], text[30:60], text[60:]]
    nats, tokens = by_hand(model, [{"text": part} for part in parts])
    for part in parts[:2]:  # only the last window is closed
        ids = [*model.tokenizer(part)["input_ids"], model.tokenizer.eos_token_id]
        logp = model.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
        nats, tokens = nats + float(logp[len(ids) - 2, ids[-1]]), tokens - 1
    assert int(found.tokens.sum()) == tokens and found.loss == pytest.approx(nats / tokens, rel=1e-4)
    assert int(found.bytes.sum()) == 70


def test_adapters_make_a_pool_too(parent, corpus, held, tmp_path):
    pool = train_pool(parent, corpus, tmp_path / "pool", progress=False, lora_rank=2, **QUICK)
    found = ablate(pool, held, progress=False)
    alone = {cell.mixture: cell.merged for cell in found.cells if cell.set == "a"}
    assert alone["a"] < min(alone["b"], alone["c"])


# -- candidates and mistakes


def test_candidates_come_from_files_of_either_form(pool, tmp_path):
    table = tmp_path / "mixtures.csv"
    table.write_text("name,a,b,c\nhalf,0.5,0.5,\nthree,0.2,0.3,0.5\n")
    found = read_candidates(pool, table)
    assert found == [
        Candidate("half", {"a": 0.5, "b": 0.5}, 2.0),
        Candidate("three", {"a": 0.2, "b": 0.3, "c": 0.5}, 3.0),
    ]
    assert [c.name for c in read_candidates(pool, [{"a": 0.25, "b": 0.75}])] == ["0.25 a + 0.75 b"]
    usual = usual_candidates(["a", "b", "c"])
    assert [c.name for c in usual] == ["a", "b", "c", "a + b", "a + c", "b + c", "all"]
    assert len(usual_candidates(["a", "b"])) == 3
    rows = ({"source": "b", "text": "x"},)
    assert own_partitions(pool, EvalSet("other", rows)) == ["b"] and own_partitions(pool, EvalSet("c", rows)) == [
        "b",
        "c",
    ]


def test_mistakes_are_told(pool, parent, corpus, held, tmp_path):
    for mixtures, said in (
        ([{"a": 0.5, "z": 0.5}], "mixture 1: no partition 'z'; the pool has a, b, c"),
        ([{"a": 0.5, "b": 0.1}], "its weights sum to 0.6"),
        ([{"a": "much"}], "a weight is not a number"),
        ([{"name": "x", "a": 1.0}, {"name": "x", "b": 1.0}], "two mixtures are called 'x'"),
    ):
        with pytest.raises(SettingError, match=said):
            ablate(pool, held, mixtures=mixtures, progress=False)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": null}\n')
    with pytest.raises(CorpusError, match="the evaluation set empty has no text"):
        ablate(pool, empty, progress=False)
    with pytest.raises(SettingError, match="there is a set a already"):
        read_sets([held, held / "a.jsonl"])
    with pytest.raises(MissingIndexError, match="no pool here"):
        ablate(tmp_path / "none", held, progress=False)
    with pytest.raises(CorpusError, match="has no 'topic' to partition by"):
        train_pool(parent, corpus, tmp_path / "other", by="topic", progress=False)
    with pytest.raises(SettingError, match="two or more are expected, to be mixed"):
        train_pool(parent, [row for row in ROWS if row["source"] == "a"], tmp_path / "one", progress=False, **QUICK)
    lost = replace(pool, corpus=None)
    with pytest.raises(SettingError, match="does not know its corpus any more"):
        ablate(lost, held, truth=True, progress=False)
    with pytest.raises(SettingError, match="--warmup-steps 48"):
        PoolSettings(warmup_steps=48)
