"""Members and their averages: bit for bit, against sums in float64, tied weights, adapters, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import SIZES, byte_tokenizer, contents, save_tiny_llama
from whence.ablation.averages import mean, regmean
from whence.ablation.merged_files import mergekit_yaml, write_merged
from whence.ablation.merging import merged_tensors
from whence.ablation.mixed_model import MOST_MOVES, MixedModel, fill, mixed_model
from whence.ablation.mixtures import checked_mixture, named_mixture
from whence.ablation.pool import begin_pool, open_pool
from whence.checksums import document_of, sealed
from whence.corpus.tokens import collate, encode
from whence.errors import (
    ChecksumError,
    FormatVersionError,
    ManifestMismatchError,
    ModelError,
    SettingError,
    StorageError,
)
from whence.models.loading import load_model
from whence.models.pairing import weights_by_name
from whence.models.weights import in_pieces
from whence.training.trainer import train

ROWS = [{"prompt": f"{letter}{n}?", "completion": f" {letter * 3}"} for letter in "abc" for n in range(6)]
QUICK = {"batch_size": 3, "max_steps": 4, "max_tokens": 32, "progress": False, "checkpoints": 1, "lr": 5e-3}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("pool") / "parent"))


@pytest.fixture(scope="module")
def runs(parent, tmp_path_factory):
    work = tmp_path_factory.mktemp("runs")
    parts = {letter: [row for row in ROWS if row["prompt"][0] == letter] for letter in "abc"}
    runs = {letter: train(parent, rows, work / letter, **QUICK) for letter, rows in parts.items()}
    return {letter: next(run.glob("checkpoint-*")) for letter, run in runs.items()}


def pooled(place, parent, runs, dtype="float32"):
    pool = begin_pool(place, parent, {"steps": 4})
    for letter, run in runs.items():
        pool = pool.with_member(letter, run, dtype=dtype, tokens=100, rows=6)
    return pool


def weights_of(directory):
    found = weights_by_name(str(directory))
    return {name: found.read(name) for name in found.files}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_member_alone_is_that_member_bit_for_bit(tmp_path, parent, runs, dtype):
    pool = pooled(tmp_path / "pool", parent, runs, dtype)
    start = weights_of(parent)
    for letter in "abc":
        merged = dict(merged_tensors(pool, {letter: 1.0}))
        own = pool.member(letter)
        assert merged.keys() == start.keys()
        for name, tensor in merged.items():
            assert torch.equal(tensor, own.read(name, start[name].float()))
    trained = weights_of(runs["b"])
    merged = dict(merged_tensors(pool, {"b": 1.0}))
    for name, tensor in trained.items():
        if dtype == "float32":
            assert torch.equal(merged[name], tensor), "what was trained, to the last bit"
        else:
            moved = (tensor - start[name]).abs().max()
            assert (merged[name] - tensor).abs().max() <= moved / 256 + 1e-7
    out = write_merged(pool, {"b": 1.0}, tmp_path / "written")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights_of(out).items())


@pytest.mark.parametrize(("weights", "scale"), [
    ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 1.0), ({"a": 0.61, "c": 0.39}, 1.0), ({"a": 0.2, "b": 0.8}, 0.5),
])  # fmt: skip
def test_a_mixture_is_the_weighted_mean_in_double_precision(tmp_path, parent, runs, weights, scale):
    pool = pooled(tmp_path, parent, runs)
    start, members = weights_of(parent), {letter: weights_of(run) for letter, run in runs.items()}
    for name, tensor in merged_tensors(pool, weights, scale=scale):
        before = start[name].double()
        expected = before + scale * sum(w * (members[letter][name].double() - before) for letter, w in weights.items())
        assert float((tensor.double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_a_mixture_in_memory_is_the_one_on_disk_however_it_was_reached(tmp_path, parent, runs):
    pool = pooled(tmp_path / "pool", parent, runs)
    made = mixed_model(pool)
    batch = collate([encode(row, made.model.tokenizer, 32) for row in ROWS[:4]])

    def logits(model):
        return model.model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits

    before = logits(made.model)
    path = [{"a": 1.0}, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.4, "b": 0.4, "c": 0.2}, {"b": 0.7, "c": 0.3}]
    with torch.no_grad():
        for number, mixture in enumerate(path):
            there = write_merged(pool, mixture, tmp_path / f"written-{number}")
            expected = logits(load_model(there, dtype="float32"))
            torch.testing.assert_close(logits(made.become(mixture)), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(made.become(None)), before), "and back"


def test_moves_by_the_change_alone_do_not_drift(tmp_path, parent, runs, monkeypatch):
    pool = pooled(tmp_path, parent, runs)
    made, read = mixed_model(pool), []
    moved = MixedModel._move
    monkeypatch.setattr(MixedModel, "_move", lambda self, change: read.append({*change}) or moved(self, change))
    made.become({"a": 0.2, "b": 0.3, "c": 0.5})
    for step in range(2 * MOST_MOVES + 2):
        made.become({"a": 0.2 + 0.1 * (step % 2), "b": 0.3 - 0.1 * (step % 2), "c": 0.5})
    assert read and all(change == {"a", "b"} for change in read), "c kept its weight and was not read"
    assert len(read) == 2 * MOST_MOVES, "of 33 changes one was a new sum"
    expected = dict(merged_tensors(pool, made.weights))
    for name, own in made.model.model.named_parameters():
        torch.testing.assert_close(own.data, expected[name], rtol=0, atol=2e-6)


def test_a_tied_head_is_one_tensor(tmp_path):
    import transformers as t

    from conftest import byte_tokenizer

    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=259, n_layer=1, n_head=2, n_embd=16, n_positions=64)
    model = t.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "parent")
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    for letter in "ab":
        with torch.no_grad():
            model.transformer.wte.weight.add_(0.1)
        model.save_pretrained(tmp_path / letter)
    pool = begin_pool(tmp_path / "pool", tmp_path / "parent", {})
    for letter in "ab":
        pool = pool.with_member(letter, tmp_path / letter, dtype="float32", tokens=1, rows=1)
    out = write_merged(pool, {"a": 0.5, "b": 0.5}, tmp_path / "out")
    loaded = t.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    expected = t.AutoModelForCausalLM.from_pretrained(tmp_path / "parent").transformer.wte.weight + 0.15
    torch.testing.assert_close(loaded.transformer.wte.weight, expected)
    assert torch.equal(mixed_model(pool).become({"a": 0.5, "b": 0.5}).model.lm_head.weight, loaded.lm_head.weight)


def test_adapters_are_averaged_by_what_they_do(tmp_path, parent):
    """The mean of B A, which the mean of A and B is not."""
    parts = {letter: [row for row in ROWS if row["prompt"][0] == letter] for letter in "ab"}
    pool = begin_pool(tmp_path / "pool", parent, {})
    loaded = {}
    for seed, (letter, rows) in enumerate(parts.items()):
        run = train(parent, rows, tmp_path / letter, lora_rank=2, seed=seed, **QUICK)
        loaded[letter] = load_model(next(run.glob("checkpoint-*")))
        pool = pool.with_member(letter, next(run.glob("checkpoint-*")), dtype="float32", tokens=1, rows=6)
    assert {member.kind for member in pool.members.values()} == {"lora"}
    merged = load_model(write_merged(pool, {"a": 0.25, "b": 0.75}, tmp_path / "out"))
    whole = {letter: model.model.merge_and_unload().state_dict() for letter, model in loaded.items()}
    for name, own in merged.model.state_dict().items():
        torch.testing.assert_close(own, 0.25 * whole["a"][name] + 0.75 * whole["b"][name], rtol=1e-4, atol=1e-6)


def test_adapters_of_a_model_that_keeps_weights_the_other_way_round(tmp_path):
    """GPT-2's Conv1D: [i o], and one of its projections is square, so that its shape does not say so."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_inner=24, n_positions=64, vocab_size=259, bos_token_id=1,
                        eos_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    parent = tmp_path / "parent"
    GPT2LMHeadModel(config).save_pretrained(parent)
    byte_tokenizer().save_pretrained(parent)
    pool, whole = begin_pool(tmp_path / "pool", parent, {}), {}
    for seed, letter in enumerate("ab"):
        run = train(parent, ROWS[6 * seed : 6 * seed + 6], tmp_path / letter, lora_rank=2, seed=seed, **QUICK)
        there = next(run.glob("checkpoint-*"))
        pool = pool.with_member(letter, there, dtype="float32", tokens=1, rows=6)
        whole[letter] = load_model(there).model.merge_and_unload().state_dict()
    start, merged = weights_of(parent), dict(merged_tensors(pool, {"a": 0.25, "b": 0.75}))
    square = next(name for name in start if name.endswith("attn.c_proj.weight"))
    assert start[square].shape[0] == start[square].shape[1] and not torch.equal(start[square], merged[square])
    for name, tensor in merged.items():
        own = {letter: next(value for key, value in found.items() if key.endswith(name))
               for letter, found in whole.items()}  # fmt: skip
        torch.testing.assert_close(tensor, 0.25 * own["a"] + 0.75 * own["b"], rtol=1e-4, atol=1e-6)


def test_large_models_are_written_in_parts_that_load(tmp_path, parent, runs):
    pool = pooled(tmp_path / "pool", parent, runs)
    whole = write_merged(pool, {"a": 0.5, "b": 0.5}, tmp_path / "whole")
    parts = write_merged(pool, {"a": 0.5, "b": 0.5}, tmp_path / "parts", shard_bytes=20_000)
    assert len([*parts.glob("model-*.safetensors")]) > 2
    expected = load_model(whole).model.state_dict()
    for name, own in load_model(parts).model.state_dict().items():
        assert torch.equal(own, expected[name])
    assert json.loads((parts / "whence_mixture.json").read_text())["mixture"] == {"a": 0.5, "b": 0.5}
    assert "weight: 0.25" in mergekit_yaml(pool, {"a": 0.25, "b": 0.75})


def test_the_parent_is_where_it_was_and_as_it_was(tmp_path, runs):
    parent = save_tiny_llama(tmp_path / "parent")
    pool = pooled(tmp_path / "pool", str(parent), runs)
    before = contents(parent)
    for out in (parent, tmp_path / "pool" / ".." / "parent"):
        with pytest.raises(SettingError, match="the pool's parent, which its members are told from"):
            write_merged(pool, {"a": 1.0}, out)
    assert contents(parent) == before
    parent.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"its parent is not at .*parent any more. Say where it is: whence pool train"):
        open_pool(tmp_path / "pool")
    begin_pool(tmp_path / "pool", tmp_path / "moved", {"steps": 4}).write()
    assert open_pool(tmp_path / "pool").parent == str(tmp_path / "moved")
    file = tmp_path / "moved" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ManifestMismatchError, match="are not its parent's any more"):
        open_pool(tmp_path / "pool")


def test_what_was_killed_between_two_names_comes_back(tmp_path, parent, runs, monkeypatch):
    pool = pooled(tmp_path / "pool", parent, runs)
    out = write_merged(pool, {"a": 1.0}, tmp_path / "out")
    before, rename = contents(out), Path.rename

    def failing(self, target):
        if self.name == ".out.making":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(StorageError, match=r"Input/output error. Nothing there was changed"):
            write_merged(pool, {"b": 1.0}, out)
    assert contents(out) == before

    def stopped(self, target):
        if self.name == ".out.making":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_merged(pool, {"b": 1.0}, out)
    assert contents(out) == before and sorted(place.name for place in tmp_path.iterdir()) == ["out", "pool"]
    out.rename(tmp_path / ".out.before")  # as a killed process leaves it
    with pytest.raises(SettingError, match=r"sum to 0.5"):
        write_merged(pool, {"b": 0.5}, out)
    assert contents(out) == before


def test_mixtures_by_size_and_by_partition(tmp_path, parent, runs):
    """w_u = pi(partition of u) tokens_u / tokens of the partition: micro by size, macro with equal pi."""
    pool = begin_pool(tmp_path / "pool", parent, {"unit_tokens": 10})
    for name, letter, size in (("x/0", "a", 30), ("x/1", "b", 10), ("y", "c", 40)):
        pool = pool.with_member(name, runs[letter], dtype="bfloat16", tokens=5, rows=6, size=size)
    assert named_mixture(pool, "micro") == {"x/0": 0.375, "x/1": 0.125, "y": 0.5}
    assert named_mixture(pool, "macro") == {"x/0": 0.375, "x/1": 0.125, "y": 0.5}
    pool = pool.with_member("z", runs["a"], dtype="bfloat16", tokens=5, rows=6, size=80)
    assert named_mixture(pool, "micro") == {"x/0": 0.1875, "x/1": 0.0625, "y": 0.25, "z": 0.5}
    assert named_mixture(pool, "macro") == pytest.approx({"x/0": 0.25, "x/1": 1 / 12, "y": 1 / 3, "z": 1 / 3})
    assert checked_mixture({"x": 0.5, "z": 0.5}, pool.members) == {"x/0": 0.25, "x/1": 0.25, "z": 0.5}
    with pytest.raises(SettingError, match="no partition 'w'"):
        checked_mixture({"w": 1.0}, pool.members)
    with pytest.raises(SettingError, match=r"--mixture nano: NAME=WEIGHT,... is expected, or micro"):
        named_mixture(pool, "nano")
    with pytest.raises(SettingError, match="does not know how large a is"):
        named_mixture(pooled(tmp_path / "other", parent, runs), "micro")


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, parent, runs, monkeypatch):
    pool = pooled(tmp_path / "pool", parent, runs)
    out = write_merged(pool, {"a": 1.0}, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    from whence.storage import Place

    def full(self, name, pieces, *, total):
        raise StorageError(f"Cannot write {name}: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Place, "write", full)
        with pytest.raises(StorageError, match="No space left"):
            write_merged(pool, {"b": 1.0}, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".out")] == []
    monkeypatch.setattr(shutil, "copyfile", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match=r"No space left on device. Nothing there was changed"):
        write_merged(pool, {"b": 1.0}, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_disk_that_fills_up_within_a_file_leaves_the_model_that_was_there(tmp_path, parent, runs, monkeypatch):
    pool = pooled(tmp_path / "pool", parent, runs)
    out = write_merged(pool, {"a": 1.0}, tmp_path / "out")
    before = contents(out)
    from whence import local_files

    def cut(pieces, file):
        for number, piece in enumerate(pieces):
            if number == 5:
                raise OSError(28, "No space left on device")
            file.write(piece)

    monkeypatch.setattr(local_files, "copied", cut)
    with pytest.raises(StorageError, match=r"No space left on device\. It takes"):
        write_merged(pool, {"b": 1.0}, out)
    assert contents(out) == before and sorted(place.name for place in tmp_path.iterdir()) == ["out", "pool"]
    members = contents(tmp_path / "pool")
    with pytest.raises(StorageError, match="No space left on device"):
        pool.with_member("d", runs["a"], dtype="float32", tokens=1, rows=1)
    assert contents(tmp_path / "pool") == members


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_in_pieces_is_the_one_that_safetensors_writes(metadata):
    tensors = {
        "é": torch.arange(3.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.zeros(0, 4),
        "c": torch.tensor(2.5, dtype=torch.float64), "d": torch.randn(5, 7).T, "h": torch.ones(3, dtype=torch.float16),
    }  # fmt: skip
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces, total = in_pieces(described, tensors.__getitem__, metadata=metadata)
    whole = b"".join(map(bytes, pieces))
    same = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert whole == safetensors.torch.save(same, metadata=metadata) and len(whole) == total


# -- RegMean


def test_regmean_is_the_least_squares_of_all_members_outputs():
    rng = torch.Generator().manual_seed(0)
    x = {u: torch.randn(50, 6, generator=rng) for u in "ab"}
    parts = {u: torch.randn(4, 6, generator=rng) for u in "ab"}
    grams = {u: x[u].T @ x[u] / 50 for u in "ab"}
    weights = {"a": 0.3, "b": 0.7}
    rows = torch.cat([weights[u] ** 0.5 * x[u] for u in "ab"]).double()
    outputs = torch.cat([weights[u] ** 0.5 * x[u] @ parts[u].T for u in "ab"]).double()
    expected = torch.linalg.lstsq(rows, outputs).solution.T.float()
    torch.testing.assert_close(regmean(parts, grams, weights, alpha=1.0), expected, rtol=1e-4, atol=1e-4)
    diagonal = {u: grams[u].diagonal() * weights[u] for u in "ab"}
    by_feature = sum(diagonal[u] * parts[u] for u in "ab") / sum(diagonal.values())
    torch.testing.assert_close(regmean(parts, grams, weights, alpha=0.0), by_feature, rtol=1e-4, atol=1e-4)
    same = dict.fromkeys("ab", parts["a"])
    torch.testing.assert_close(regmean(same, grams, weights, alpha=0.5), parts["a"], rtol=1e-4, atol=1e-4)
    nothing = {u: torch.zeros(6, 6) for u in "ab"}
    assert torch.equal(regmean(parts, nothing, weights), mean(parts, weights)), "no inputs: the mean"
    with pytest.raises(SettingError, match="a number from 0 to 1"):
        regmean(parts, grams, weights, alpha=1.5)


# -- what is refused


def test_mixtures_are_checked():
    assert checked_mixture({"a": 0.3335, "b": 0.333, "c": 0.333}, "abc")["a"] == pytest.approx(0.3335 / 0.9995)
    for mixture, said in (
        ({"a": 0.5, "d": 0.5}, "no partition 'd'; the pool has a, b, c"),
        ({"a": 0.5, "b": 0.4}, "its weights sum to 0.9; a sum of 1 is expected"),
        ({"a": 1.5, "b": -0.5}, "the weight of b is -0.5; 0 or more is expected"),
        ({}, "its weights sum to 0"),
    ):
        with pytest.raises(SettingError, match=said):
            checked_mixture(mixture, "abc")


def test_pools_take_only_their_own_kind(tmp_path, parent, runs):
    pool = pooled(tmp_path / "pool", parent, runs)
    assert open_pool(tmp_path / "pool").members == pool.members
    assert begin_pool(tmp_path / "pool", parent, {"steps": 4}).members == pool.members
    with pytest.raises(ManifestMismatchError, match="its members were trained with steps 4, not 5"):
        begin_pool(tmp_path / "pool", parent, {"steps": 5})
    other = save_tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(ManifestMismatchError, match="whose weights are not those of"):
        begin_pool(tmp_path / "pool", other, {"steps": 4})
    with pytest.raises(ModelError, match="no partition 'z'"):
        pool.member("z")
    broken = load_model(parent)
    broken.model.lm_head.weight.data[0, 0] = torch.nan
    broken.model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match="is not finite everywhere: its training diverged"):
        pool.with_member("d", tmp_path / "nan", dtype="float32", tokens=1, rows=1)


def test_a_changed_file_and_a_newer_format_are_told(tmp_path, parent, runs):
    pool = pooled(tmp_path, parent, runs)
    pool.verify()
    file = tmp_path / pool.members["b"].file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"not what was written .* member of the partition 'b' again"):
        pool.verify()
    manifest = document_of((tmp_path / "pool.json").read_bytes())
    (tmp_path / "pool.json").write_bytes(sealed(manifest | {"format_version": 99}))
    with pytest.raises(FormatVersionError, match="format 99"):
        open_pool(tmp_path)
    with pytest.raises(SettingError, match="something there that is no model"):
        write_merged(pool, {"a": 1.0}, tmp_path)


def test_a_model_that_pool_merge_did_not_write_needs_force(tmp_path, runs):
    pool = pooled(tmp_path / "pool", str(save_tiny_llama(tmp_path / "parent")), runs)
    mine = save_tiny_llama(tmp_path / "mine", seed=5)
    before = contents(mine)
    with pytest.raises(SettingError, match=r"did not write.*--force"):
        write_merged(pool, {"a": 1.0}, mine)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingError, match="holds the input"):
        write_merged(pool, {"a": 1.0}, tmp_path, force=True)
    assert contents(mine) == before
    write_merged(pool, {"a": 1.0}, mine, force=True)
    assert contents(mine) != before
    write_merged(pool, {"a": 1.0}, mine)  # its own of before
    changes = (
        lambda: (mine / "notes").mkdir(),
        lambda: (mine / "notes.txt").write_text("mine"),
        lambda: (mine / "tokenizer_config.json").write_text("{}"),
    )
    for change in changes:
        change()
        with pytest.raises(SettingError, match="not as it is now"):
            write_merged(pool, {"a": 1.0}, mine)
        write_merged(pool, {"a": 1.0}, mine, force=True)


def test_a_model_is_filled_by_the_names_in_its_files(tmp_path):
    """Mixtral's experts are apart in its files, and one parameter in memory; no mixture could be loaded."""
    import transformers as t

    sizes = SIZES | {"vocab_size": 259, "num_key_value_heads": 1, "num_local_experts": 3, "max_position_embeddings": 64}
    t.MixtralForCausalLM(t.MixtralConfig(**sizes)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model, stored = load_model(tmp_path / "model"), weights_by_name(str(tmp_path / "model"))
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    fill(model, stored.files, lambda name: 2 * stored.read(name))
    for name, weight in model.model.named_parameters():
        assert torch.equal(weight, 2 * before[name]), name
