"""A plain Trainer's optimizer file, and FSDP's: every moment under its own parameter, or an error that names it."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import ARCHITECTURES, plain_trainer_run, save_tiny_llama, tiny_model
from whence.errors import ModelError
from whence.models.loading import LoadedModel, load_model
from whence.models.moments import _decays, _orders, moments_digest, read_moments

WRAP = "_fsdp_wrapped_module."


@pytest.fixture(scope="module", params=["llama", "gpt2", "lora"])
def trained(request, tmp_path_factory):
    """A Trainer that is done, and the directory of its last checkpoint."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return plain_trainer_run(out, request.param), out / "checkpoint-4"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama") / "run"
    plain_trainer_run(out, "llama", 2)
    return out / "checkpoint-2"


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "checkpoint-2")


def contents_of(directory):
    return torch.load(directory / "optimizer.pt", weights_only=True)


def moments_of(directory, layers=None):
    loaded = load_model(directory)
    found = read_moments(loaded, loaded.layers(layers))
    return {name: replace(held, m1=held.m1.clone(), m2=held.m2.clone()) for name, held in found.items()}


def in_memory(trainer, layers):
    """The optimizer's own state of each layer's weight, which is found by the layer itself."""
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    state = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    return {name: (base.get_submodule(name), state[base.get_submodule(name).weight]) for name in layers}


def check_all(found, trainer):
    for name, (layer, state) in in_memory(trainer, found).items():
        is_linear = isinstance(layer, nn.Linear)
        first, second = (state[key] if is_linear else state[key].T for key in ("exp_avg", "exp_avg_sq"))
        assert torch.equal(found[name].m1, first), name
        assert torch.equal(found[name].m2, second), name
        assert second.count_nonzero() or not first.count_nonzero(), name


# -- the right parameter


def test_every_moment_is_under_its_own_layer(trained):
    trainer, directory = trained
    file = contents_of(directory)
    assert [len(group["params"]) for group in file["param_groups"]] != [len(file["state"])], "two groups are numbered"
    found = moments_of(directory)
    assert len(found) >= 8
    check_all(found, trainer)
    assert {(held.step, held.betas, held.eps) for held in found.values()} == {(4, (0.9, 0.999), 1e-8)}


def test_a_tied_head_has_the_moments_of_its_embedding(tmp_path):
    trainer = plain_trainer_run(tmp_path / "run", "gpt2", 2)
    found = moments_of(tmp_path / "run" / "checkpoint-2", "*")
    assert "lm_head" in found
    check_all(found, trainer)


def test_fsdp_names_and_adapter_names_are_mapped(trained, tmp_path):
    """FSDP's full state: keyed by the names of the wrapped model."""
    trainer, directory = trained
    copied = shutil.copytree(directory, tmp_path / "checkpoint-4")
    expected, file = moments_of(directory), contents_of(directory)
    order = [name for names in next(iter(_orders(load_model(directory)))) for name in names]
    wrapped = [
        "module._orig_mod." + name.replace("layers.0.", f"layers.0.{WRAP}").replace(".default.", ".mine.")
        for name in order
    ]
    groups = [group | {"params": [wrapped[key] for key in group["params"]]} for group in file["param_groups"]]
    state = {wrapped[key]: entry for key, entry in file["state"].items()}
    (copied / "optimizer.pt").unlink()
    torch.save({"state": state, "param_groups": groups}, copied / "optimizer.bin")
    found = moments_of(copied)
    assert list(found) == list(expected)
    check_all(found, trainer)


def test_names_that_torch_writes_are_taken(tmp_path):
    trainer = plain_trainer_run(tmp_path / "run", "llama", 2, named=True)
    file = tmp_path / "run" / "checkpoint-2" / "optimizer.pt"
    content = torch.load(file, weights_only=True)
    (group,) = content["param_groups"]
    assert group["param_names"][0] == "model.embed_tokens.weight"
    backwards = list(range(len(group["params"])))[::-1]
    renumbered = {"params": [group["params"][n] for n in backwards]}
    renumbered["param_names"] = [group["param_names"][n] for n in backwards]
    torch.save({"state": content["state"], "param_groups": [group | renumbered]}, file)
    check_all(moments_of(file.parent), trainer)


@pytest.mark.parametrize("empty", [[], [{"params": []}]])
def test_other_groups_are_told_by_their_counts(copy, empty):
    """One group, as a plain loop has; an empty second beside it, as when RMS norms were still decayed."""
    content, expected = contents_of(copy), moments_of(copy)
    loaded = load_model(copy)
    numbered = [name for names in next(iter(_orders(loaded))) for name in names]
    state = {
        number: content["state"][numbered.index(name)]
        for number, (name, _) in enumerate(loaded.model.named_parameters())
    }
    groups = [content["param_groups"][0] | {"params": list(state)}, *[content["param_groups"][1] | g for g in empty]]
    torch.save({"state": state, "param_groups": groups}, copy / "optimizer.pt")
    found = moments_of(copy)
    assert all(torch.equal(found[name].m1, expected[name].m1) for name in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rule_of_decay_is_the_installed_trainers(architecture):
    from transformers import Trainer

    model = tiny_model(architecture).model
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    names = [name for name, _ in model.named_parameters()]
    assert [_decays(model, name) for name in names] == [name in decayed for name in names]


def test_biases_and_whole_modules_trained_beside_an_adapter_are_counted(tmp_path):
    """As peft thaws them: the order is that of `named_parameters()` of what requires a gradient."""
    import peft
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=61
    )
    for bias in ("none", "all", "lora_only"):
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"], bias=bias)
        model = peft.get_peft_model(base, lora)
        expected = [name for name, weight in model.named_parameters() if weight.requires_grad]
        loaded = LoadedModel(model, None, "trained", has_adapter=True)
        assert expected == next(group for group in _orders(loaded) if len(group) == 1)[0], bias


def test_betas_eps_and_steps_are_those_of_the_file(copy):
    content = contents_of(copy)
    for group in content["param_groups"]:
        group |= {"betas": (0.5, 0.75), "eps": 1e-3}
    for entry in content["state"].values():
        entry["step"] = torch.tensor(77.0)
    torch.save(content, copy / "optimizer.pt")
    assert {(held.step, held.betas, held.eps) for held in moments_of(copy).values()} == {(77, (0.5, 0.75), 1e-3)}


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_moments_of_32_bits_under_bitsandbytes_names_are_read(copy, is_wrapped):
    """As `paged_adamw_32bit` keeps them; newer versions put them into an object of their own."""
    expected, content = moments_of(copy), contents_of(copy)
    for key, entry in content["state"].items():
        moments = {"state1": entry["exp_avg"], "state2": entry["exp_avg_sq"]}
        content["state"][key] = {"step": 2, **({"__bnb_optimizer_quant_state__": moments} if is_wrapped else moments)}
    torch.save(content, copy / "optimizer.pt")
    found = moments_of(copy)
    assert all(torch.equal(found[name].m2, expected[name].m2) and found[name].step == 2 for name in expected)


def test_moments_of_8_bits_are_their_codes_values_times_the_scale_of_their_block(copy):
    content, rng = contents_of(copy), torch.Generator().manual_seed(0)
    values = {"1": torch.linspace(-1, 1, 256), "2": torch.linspace(0, 1, 256)}
    for entry in content["state"].values():
        shape = entry.pop("exp_avg").shape
        entry.pop("exp_avg_sq")
        for side, qmap in values.items():
            blocks = -(-shape.numel() // 256)
            entry[f"state{side}"] = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
            entry |= {f"qmap{side}": qmap, f"absmax{side}": torch.rand(blocks, generator=rng)}
    torch.save(content, copy / "optimizer.pt")
    found, loaded = moments_of(copy), load_model(copy)
    order = [name for names in next(iter(_orders(loaded))) for name in names]
    name = "model.layers.1.mlp.up_proj"  # 24 by 16: two blocks, the second half full
    entry = content["state"][order.index(f"{name}.weight")]
    for moment, side in ((found[name].m1, "1"), (found[name].m2, "2")):
        for place in ((0, 0), (15, 15), (16, 0), (23, 15)):
            code, block = int(entry[f"state{side}"][place]), (place[0] * 16 + place[1]) // 256
            assert float(moment[place]) == pytest.approx(float(values[side][code] * entry[f"absmax{side}"][block]))


# -- what cannot be used


def refused(directory, *parts, layers=None):
    with pytest.raises(ModelError) as caught:
        moments_of(directory, layers)
    assert all(part in str(caught.value) for part in (*parts, "--view sgd")), str(caught.value)


def test_a_checkpoint_without_an_optimizer_file_says_which(tmp_path):
    plain_trainer_run(tmp_path / "run", "llama", 2, save_only_model=True)
    directory = tmp_path / "run" / "checkpoint-2"
    refused(directory, str(directory), "no optimizer.pt or optimizer.bin", "save_only_model")
    with pytest.raises(ModelError, match=r"no optimizer\.pt"):
        moments_digest(directory)
    (directory / "optimizer_0").mkdir()
    refused(directory, "its optimizer_0 is a sharded checkpoint", "FULL_STATE_DICT")


def test_a_file_of_another_model_names_the_parameter(copy, tmp_path):
    content = contents_of(copy)
    weight = content["state"][3]
    weight["exp_avg"] = torch.zeros(16, 5)
    torch.save(content, copy / "optimizer.pt")
    refused(
        copy,
        "its entry 3 has the shape [16, 5], where model.layers.0.self_attn.v_proj.weight has [8, 16]",
        "own training",
    )
    shutil.copy(copy.parent / "checkpoint-2" / "optimizer.pt", tmp_path / "kept")
    content["param_groups"][0]["params"] = content["param_groups"][0]["params"][:-1]
    torch.save(content, copy / "optimizer.pt")
    refused(copy, "its groups hold 15 + 5 parameters", "16 + 5 or 21", "named_parameters()")


def test_names_of_another_model_name_the_layer(copy):
    content = contents_of(copy)
    groups = [group | {"params": [f"encoder.{key}" for key in group["params"]]} for group in content["param_groups"]]
    torch.save({"state": {f"encoder.{k}": v for k, v in content["state"].items()}, "param_groups": groups},
               copy / "optimizer.pt")  # fmt: skip
    refused(copy, "no moments of model.layers.0.self_attn.q_proj.weight", "--layers")


def test_layers_that_were_not_trained_are_named(tmp_path):
    plain_trainer_run(tmp_path / "run", "lora", 2)
    refused(tmp_path / "run" / "checkpoint-2", "so that weight was not trained", "up_proj", layers="*up_proj*")


def test_8_bit_moments_without_their_scales_are_refused(copy):
    content = contents_of(copy)
    for entry in content["state"].values():
        size = entry.pop("exp_avg").shape
        entry.pop("exp_avg_sq")
        entry |= {name: torch.zeros(size, dtype=torch.uint8) for name in ("state1", "state2")}
        entry |= {"qmap1": torch.zeros(256), "absmax1": torch.zeros(1), "step": 2}
    torch.save(content, copy / "optimizer.pt")
    refused(copy, "in 8 bits (bitsandbytes)", "adamw_torch")


@pytest.mark.parametrize(
    ("optim", "told"),
    [("sgd", "it holds nothing of any parameter"), ("adafactor", "it holds step, exp_avg_sq_row, exp_avg_sq_col")],
)
def test_another_optimizer_is_refused(tmp_path, optim, told):
    plain_trainer_run(tmp_path / "run", "llama", 2, optim=optim)
    refused(tmp_path / "run" / "checkpoint-2", told, "Adam and AdamW")


def test_amsgrad_is_refused(copy):
    content = contents_of(copy)
    content["param_groups"][0]["amsgrad"] = True
    torch.save(content, copy / "optimizer.pt")
    refused(copy, "amsgrad")


class Harm:
    """Creates a file when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_nothing_is_unpickled(copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": {0: Harm()}, "param_groups": []}, copy / "optimizer.pt")
    refused(copy, "more than tensors and numbers", "never unpickles")
    with (copy / "optimizer.pt").open("wb") as stream:
        pickle.dump(Harm(), stream, protocol=2)
    refused(copy, str(copy / "optimizer.pt"))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not a readable"),
        (b"PK\x03\x04 half", "not a readable"),
        (b"words", ""),
        (None, "`state` and `param_groups`"),
    ],
)
def test_what_is_no_optimizer_file_is_named(copy, data, told):
    file = copy / "optimizer.pt"
    if data is None:
        torch.save({"model": {}}, file)
    else:
        file.write_bytes(data)
    refused(copy, str(file), told)


def test_a_hub_name_has_none(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    loaded = load_model(model)
    with pytest.raises(ModelError, match="it is no local directory"):
        read_moments(type(loaded)(loaded.model, loaded.tokenizer, "org/name"), loaded.layers())


def test_half_precision_moments_become_fp32(copy):
    content = contents_of(copy)
    for entry in content["state"].values():
        entry |= {key: entry[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}
    torch.save(content, copy / "optimizer.pt")
    assert all(held.m1.dtype == held.m2.dtype == torch.float32 for held in moments_of(copy).values())


def test_safetensors_of_the_weights_are_not_touched(copy):
    weights = load_file(copy / "model.safetensors")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert moments_of(copy)
