"""RegMean from the pool to the merged model: inputs against plain hooks, least squares by numpy, what is kept."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ablate import HELD, QUICK, ROWS

from conftest import byte_tokenizer, save_tiny_llama
from whence.ablation.gram_matrices import averaging, collect, gram_matrices, inputs_of, open_grams, verify_grams
from whence.ablation.heldout_losses import EvalSet
from whence.ablation.member_training import PoolSettings, pool_partitions, train_pool
from whence.ablation.merged_files import write_merged
from whence.ablation.merging import merged_tensors
from whence.ablation.mixed_model import mixed_model
from whence.ablation.pipeline import ablate
from whence.ablation.pool import begin_pool, open_pool
from whence.corpus.tokens import encode
from whence.errors import ChecksumError, ManifestMismatchError, MissingIndexError, SettingError
from whence.models.loading import load_model

SETS = [EvalSet(name, tuple(rows)) for name, rows in HELD.items()]
MIXTURE = {"a": 0.2, "b": 0.3, "c": 0.5}
ASKED = 150


def save_tiny_gpt2(directory):
    """Weights of linear layers are [i o] here, one of them square; the head is tied."""
    import transformers as t

    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=259, n_layer=1, n_head=2, n_embd=16, n_positions=64))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def perturbed(parent, directory, seed):
    """As after a training, without one."""
    rng, loaded = torch.Generator().manual_seed(seed), load_model(parent, dtype="float32")
    for weight in loaded.model.parameters():
        weight += 0.05 * torch.randn(weight.shape, generator=rng)
    loaded.model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pools of both kinds of layers, with their inputs."""
    place = tmp_path_factory.mktemp("grams")
    corpus = place / "rows.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pools = {}
    for name, save in (("llama", save_tiny_llama), ("gpt2", save_tiny_gpt2)):
        parent = save(place / name)
        pool = begin_pool(place / f"pool-{name}", parent, PoolSettings(**QUICK).recipe(), corpus=str(corpus))
        for seed, partition in enumerate("abc"):
            member = perturbed(parent, place / f"{name}-{partition}", seed)
            pool = pool.with_member(partition, member, dtype="float32", tokens=200, rows=9)
        collect(pool, tokens=ASKED, progress=False)
        pools[name] = pool
    return pools


def heard(pool, partition, place):
    """Inputs [n i] of every linear layer of a written member, by the name of its weight: plain hooks, single rows."""
    model = load_model(write_merged(pool, {partition: 1.0}, place / partition), dtype="float32")
    drawn = pool_partitions(pool, None, [partition])[partition].draw(ASKED, seed=0)
    found: dict[str, list] = {}

    def hear(name, module, args):
        found.setdefault(f"{name}.weight", []).append(args[0].flatten(0, -2))

    for name, layer in model.layers("*").items():
        layer.register_forward_pre_hook(partial(hear, name))
    with torch.no_grad():
        for row in drawn:
            model.model(input_ids=torch.tensor([encode(row, model.tokenizer, 32).ids]), use_cache=False)
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrices_are_those_of_plain_hooks(made, tmp_path, kind):
    pool = made[kind]
    found = open_grams(pool)
    for partition in pool.partitions:
        inputs = heard(pool, partition, tmp_path)
        if kind == "gpt2":
            inputs = {name: x for name, x in inputs.items() if "lm_head" not in name}
            assert set(found.transposed) == set(inputs), "all of its layers are kept turned"
        assert set(found.grams[partition]) == set(inputs), "every linear layer, a head only where it is not tied"
        for name, x in inputs.items():
            expected = torch.from_numpy(x.T @ x / len(x)).float()
            torch.testing.assert_close(found.grams[partition][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_layers_are_the_least_squares_of_members_outputs(made, tmp_path, kind):
    """Smallest sum of w_u |X_u W^T - X_u W_u^T|^2 / n_u, by numpy, from activations that plain hooks have heard."""
    pool = made[kind]
    merged = dict(merged_tensors(pool, MIXTURE, regmean=open_grams(pool, alpha=1.0)))
    average = dict(merged_tensors(pool, MIXTURE))
    inputs = {u: heard(pool, u, tmp_path) for u in MIXTURE}
    start, checked = pool.start(), 0
    for name in start.files:
        parts = {u: pool.member(u).read(name, start.read(name).float()) for u in MIXTURE}
        if name not in open_grams(pool).grams["a"]:
            assert torch.equal(merged[name], average[name]), "what is no linear layer is averaged"
            continue
        turn = (lambda tensor: tensor) if kind == "gpt2" else (lambda tensor: tensor.T)  # to [i o]
        scale = {u: (w / len(inputs[u][name])) ** 0.5 for u, w in MIXTURE.items()}
        x = np.concatenate([scale[u] * inputs[u][name] for u in MIXTURE])
        y = np.concatenate([scale[u] * inputs[u][name] @ turn(parts[u]).double().numpy() for u in MIXTURE])
        solved = np.linalg.lstsq(x, y, rcond=None)[0]
        least, own = (((x @ w - y) ** 2).sum() for w in (solved, turn(merged[name]).double().numpy()))
        mean = ((x @ turn(average[name]).double().numpy() - y) ** 2).sum()
        assert least <= own <= least * 1.001 + 1e-12 and own < mean, name
        np.testing.assert_allclose(turn(merged[name]).numpy(), solved, atol=0.02 * np.abs(solved).max())
        checked += 1
    assert checked == (15 if kind == "llama" else 4)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6, 1.0])
def test_off_diagonals_are_shrunk(made, alpha):
    """Where the slope of the shrunk squares is 0; at alpha 0 a mean for every input feature alone."""
    pool = made["gpt2"]
    found = open_grams(pool, alpha=alpha)
    merged, start = dict(merged_tensors(pool, MIXTURE, regmean=found)), pool.start()
    for name in found.transposed:
        grams = {u: found.grams[u][name].double() for u in MIXTURE}
        shrunk = {u: alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for u, g in grams.items()}
        parts = {u: pool.member(u).read(name, start.read(name)).double() for u in MIXTURE}  # [i o]
        slope = sum(w * shrunk[u] @ (merged[name].double() - parts[u]) for u, w in MIXTURE.items())
        size = sum(w * (shrunk[u] @ parts[u]).norm() for u, w in MIXTURE.items())
        assert slope.norm() < 1e-5 * size
        if alpha == 0:
            weights = {u: w * grams[u].diagonal()[:, None] for u, w in MIXTURE.items()}
            expected = sum(weights[u] * parts[u] for u in MIXTURE) / sum(weights.values())
            torch.testing.assert_close(merged[name].double(), expected, rtol=1e-3, atol=1e-5)


def test_padding_is_not_counted(made):
    pool = made["llama"]
    model = mixed_model(pool).become({"b": 1.0})
    inputs = inputs_of(model, pool.start())
    rows = [encode({"text": "xyz " * n}, model.tokenizer, 32) for n in (1, 7, 2, 4)]
    alone, count = gram_matrices(model, inputs, rows, 1)
    together, counted = gram_matrices(model, inputs, rows, 4096)
    assert count == counted == sum(len(row.ids) for row in rows)
    for name, gram in alone.items():
        torch.testing.assert_close(together[name], gram, rtol=1e-4, atol=1e-5)


def test_modules_that_read_one_tensor_share_a_matrix(made):
    pool = made["llama"]
    inputs = inputs_of(mixed_model(pool).model, pool.start())
    by_input = {}
    for parameter, name in inputs.readers.items():
        by_input.setdefault(name, set()).add(parameter.split(".", 3)[-1])
    assert len(inputs.modules) == 2 * 4 + 1 and "lm_head.weight" in by_input
    assert {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"} in by_input.values()
    assert {"mlp.gate_proj.weight", "mlp.up_proj.weight"} in by_input.values()


def test_one_member_alone_is_that_member_and_memory_is_as_disk(made, tmp_path):
    pool = made["llama"]
    regmean = open_grams(pool)
    for name, tensor in merged_tensors(pool, {"b": 1.0}, regmean=regmean):
        assert torch.equal(tensor, pool.member("b").read(name, pool.start().read(name).float()))
    in_memory = mixed_model(pool, regmean=regmean)
    for mixture in (MIXTURE, {"a": 0.3, "b": 0.2, "c": 0.5}):  # by the change alone it would be another
        written = load_model(write_merged(pool, mixture, tmp_path / "out", regmean=regmean), dtype="float32")
        own = in_memory.become(mixture).model.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in written.model.state_dict().items())
    told = json.loads((tmp_path / "out" / "whence_mixture.json").read_text())
    assert (told["method"], told["alpha"]) == ("regmean", 0.1)


def test_adapters_are_averaged_with_their_base(tmp_path):
    """Of adapted layers the least squares; what no adapter touches is the parent's."""
    rows = [row for row in ROWS if row["source"] in "ab"]
    pool = train_pool(
        save_tiny_llama(tmp_path / "parent"), rows, tmp_path / "pool", progress=False, lora_rank=2, **QUICK
    )
    with pytest.raises(SettingError, match="does not know its corpus any more"):
        averaging(pool, "regmean", progress=False)
    regmean = averaging(pool, "regmean", corpus=rows, alpha=1.0, progress=False)
    half, start = {"a": 0.5, "b": 0.5}, pool.start()
    merged = dict(merged_tensors(pool, half, regmean=regmean))
    for name in start.files:
        parent = start.read(name)
        parts = {u: pool.member(u).read(name, parent) for u in half}
        if parts["a"] is None:
            assert torch.equal(merged[name], parent)
            continue
        grams = {u: regmean.grams[u][name].double() for u in half}
        slope = sum(grams[u] @ (merged[name].double() - parts[u].double()).T for u in half)
        assert slope.norm() < 1e-4 * sum((grams[u] @ parts[u].double().T).norm() for u in half)


# -- what is kept


def test_matrices_are_collected_once_and_again_for_a_changed_member(made, tmp_path, monkeypatch):
    from whence.ablation import gram_matrices as job

    shutil.copytree(made["llama"].place.root, tmp_path / "pool")
    pool, read = open_pool(tmp_path / "pool"), []
    real = job._collect_member
    monkeypatch.setattr(job, "_collect_member", lambda *given: read.append(given[3].name) or real(*given))
    collect(pool, progress=False)
    assert read == [], "as many tokens as are there"
    verify_grams(pool)
    (tmp_path / "pool" / "grams" / "001.json").unlink()  # as after a kill
    collect(pool, progress=False)
    assert read == ["b"]
    again = (tmp_path / "pool" / "grams" / "001.safetensors").read_bytes()
    assert again == (Path(made["llama"].place.root) / "grams" / "001.safetensors").read_bytes()
    written = write_merged(pool, {"a": 0.5, "c": 0.5}, tmp_path / "other")
    changed = pool.with_member("b", written, dtype="float32", tokens=200, rows=pool.members["b"].rows)
    with pytest.raises(ManifestMismatchError, match=r"other weights than the member b has now. Collect them with"):
        open_grams(changed)
    collect(changed, progress=False)
    assert read == ["b", "b"] and open_grams(changed)
    collect(changed, tokens=60, progress=False)
    assert read[2:] == ["a", "b", "c"]


def test_broken_and_missing_files_are_told(made, tmp_path):
    shutil.copytree(made["llama"].place.root, tmp_path / "pool")
    pool = open_pool(tmp_path / "pool")
    file = tmp_path / "pool" / "grams" / "002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"not what was written .*Remove the file"):
        verify_grams(pool)
    member = tmp_path / "pool" / pool.members["c"].file
    data = bytearray(member.read_bytes())
    data[-1] ^= 1
    member.write_bytes(data)
    file.unlink()
    with pytest.raises(ChecksumError, match=r"not what was written .* member of the partition 'c' again"):
        collect(pool, progress=False)
    shutil.rmtree(tmp_path / "pool" / "grams")
    with pytest.raises(MissingIndexError, match=r"the member a has no matrices of inputs. Collect them with"):
        open_grams(pool)
    assert verify_grams(pool) == 0 and open_pool(tmp_path / "pool").members, "a pool without them is a pool"
    with pytest.raises(SettingError, match="--method median: choose one of mean, regmean"):
        averaging(pool, "median")
    with pytest.raises(SettingError, match=r"--alpha 2.0 of RegMean"):
        averaging(pool, "regmean", alpha=2.0)
    with pytest.raises(SettingError, match="--tokens 0"):
        collect(pool, tokens=0)
    part = [row for row in ROWS if row["id"] != "a3"]
    with pytest.raises(ManifestMismatchError, match="the partition a is 8 rows here, other ones than the 9"):
        collect(made["llama"], part, tokens=30, progress=False)


# -- read as mixtures


def test_ablate_reads_mixtures_by_either_method(made):
    pool = made["llama"]
    mixtures = [{"a": 1.0}, {"b": 1.0}, MIXTURE]
    found = {
        method: ablate(pool, SETS, mixtures=mixtures, method=method, progress=False) for method in ("mean", "regmean")
    }
    own = {method: [cell.merged for cell in one.cells] for method, one in found.items()}
    same = [a == b for a, b in zip(*own.values(), strict=True)]
    assert same == [True, True, False] * 2, "members alone are kept losses; the mixture is another model"
    assert "alpha 0.1" in found["regmean"].notes[-1] and "RegMean" not in " ".join(found["mean"].notes)
    other = ablate(pool, SETS, mixtures=mixtures, method="regmean", alpha=0.9, progress=False)
    assert other.cells[2].merged != found["regmean"].cells[2].merged
