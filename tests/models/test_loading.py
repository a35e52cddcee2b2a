"""Models load whole or not at all, with the layers that are traced; and greedy answers do not depend on neighbours."""

import json
import logging
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import ARCHITECTURES, VOCABULARY, random_examples, tiny_model
from whence.corpus.tokens import collate
from whence.errors import ModelError, SettingError
from whence.models.generation import PROMPTS_PER_BATCH, generate
from whence.models.loading import LoadedModel, directory_digest, layer_shape, load_model, tokenizer_digest
from whence.models.weights import weights_of

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
GATED = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NEOX = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
ADAPTED = [f"{name}.lora_{side}.default" for name in ("self_attn.q_proj", "mlp.down_proj") for side in "AB"]
DEFAULT_LAYERS = {
    "llama": ("model.layers", GATED),
    "qwen2": ("model.layers", GATED),
    "gemma": ("model.layers", GATED),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "neox": ("gpt_neox.layers", NEOX),
    "lora": ("model.layers", ADAPTED),
}


def words(count=VOCABULARY):
    """A tokenizer of `count` whole words."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, count)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama's directory with its tokenizer; tests copy it before they harm it."""
    path = tmp_path_factory.mktemp("saved") / "llama"
    tiny_model("llama").model.save_pretrained(path)
    words().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved_adapter(saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for the base model's configuration, which is only in memory
        tiny_model("lora").model.save_pretrained(path)
    _edit(path / "adapter_config.json", base_model_name_or_path=str(saved))
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def adapter(saved_adapter, tmp_path):
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(path, *words, error=ModelError, **options):
    with pytest.raises(error) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_layers_are_the_linear_layers_of_the_blocks_in_order(architecture):
    prefix, names = DEFAULT_LAYERS[architecture]
    loaded = tiny_model(architecture)
    layers = loaded.layers()
    assert list(layers) == [f"{prefix}.{block}.{name}" for block in (0, 1) for name in names]
    assert loaded.base.get_output_embeddings() not in layers.values()
    assert 0 < loaded.traced_fraction(layers) <= 1
    assert (loaded.traced_fraction(layers) == 1) == (architecture == "lora")


def test_conv1d_and_linear_say_the_same_shape():
    layers = tiny_model("gpt2").layers("transformer.h.0.*")
    assert layer_shape(layers["transformer.h.0.attn.c_attn"]) == (48, 16)
    assert layer_shape(layers["transformer.h.0.mlp.c_proj"]) == (16, 24)
    assert layer_shape(tiny_model("llama").layers()["model.layers.0.mlp.down_proj"]) == (16, 24)


def test_layers_are_chosen_by_pattern_in_the_models_order():
    loaded = tiny_model("llama")
    assert list(loaded.layers("*down_proj, model.layers.0.self_attn.q_proj")) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert list(loaded.layers("lm_head")) == ["lm_head"]
    assert len(loaded.layers("*")) == 15
    assert list(loaded.layers("*down_proj, !*layers.1*")) == ["model.layers.0.mlp.down_proj"]
    assert list(loaded.layers("!*.mlp.*")) == [name for name in loaded.layers() if ".mlp." not in name]
    assert list(tiny_model("lora").layers("*0*lora_A*")) == [
        "model.layers.0.self_attn.q_proj.lora_A.default",
        "model.layers.0.mlp.down_proj.lora_A.default",
    ]


@pytest.mark.parametrize("pattern", ["model.layers.0.mlp.down_prj", "zzz", "", "lm_head,zzz", "model.embed_tokens"])
def test_pattern_without_a_match_suggests_names(pattern):
    with pytest.raises(SettingError, match=r"no linear layer has such a name\. Near: ") as caught:
        tiny_model("llama").layers(pattern)
    if "down" in pattern:
        assert "model.layers.0.mlp.down_proj" in str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "gemma"])
def test_loading_gives_the_saved_model_frozen_and_without_dropout(architecture, tmp_path):
    made = tiny_model(architecture)
    made.model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert not loaded.has_adapter
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(loaded.model(ids).logits, made.model(ids).logits)
    assert loaded.context == 64
    assert loaded.device == torch.device("cpu")


def test_dtype_is_as_stored_or_as_asked(copy, caplog):
    made = transformers.AutoModelForCausalLM.from_pretrained(copy).bfloat16()
    made.save_pretrained(copy)
    with caplog.at_level(logging.WARNING):
        assert {weight.dtype for weight in load_model(copy).model.parameters()} == {torch.bfloat16}
    assert "--dtype float32" in caplog.text
    assert {weight.dtype for weight in load_model(copy, dtype="float32").model.parameters()} == {torch.float32}
    refused(copy, "--dtype int8", "bfloat16", error=SettingError, dtype="int8")
    refused(copy, "--device nowhere", error=SettingError, device="nowhere")


def test_adapter_directory_loads_its_base_and_traces_a_and_b(saved, saved_adapter):
    loaded = load_model(saved_adapter)
    assert loaded.has_adapter
    assert list(loaded.layers()) == list(tiny_model("lora").layers())
    assert loaded.tokenizer.get_vocab() == words().get_vocab()
    made, ids = tiny_model("lora"), torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded.model(ids).logits, made.model(ids).logits)
    assert not torch.allclose(loaded.model(ids).logits, load_model(saved).model(ids).logits)


def test_adapter_that_lacks_weights_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    lost = next(iter(weights))
    save_file({name: weight for name, weight in weights.items() if name != lost}, file)
    refused(adapter, adapter, "no weights for a layer", lost.removeprefix("base_model.model.").partition(".lora")[0])
    file.write_bytes(file.read_bytes()[:-4])
    refused(adapter, file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "not the configuration"),
        ('{"peft_type": "LORA"}', "base_model_name_or_path"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "base_model_name_or_path is None"),
        ('{"peft_type": "IA3", "base_model_name_or_path": "x"}', "Whence reads LoRA"),
    ],
)
def test_adapter_configuration_that_cannot_be_used_is_named(adapter, content, words):
    file = adapter / "adapter_config.json"
    file.write_text(content)
    refused(adapter, file, words)


def test_adapter_whose_base_is_gone_is_refused(adapter, tmp_path):
    _edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    refused(adapter, tmp_path / "gone", adapter / "adapter_config.json")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"])
def test_an_adapter_of_another_task_is_refused(adapter, task):
    """It has a head of its own, and the base's would have been traced in its place."""
    _edit(adapter / "adapter_config.json", task_type=task)
    with pytest.raises(ModelError, match=f"an adapter for the task {task}, not CAUSAL_LM"):
        load_model(adapter)


def test_an_adapter_with_a_head_that_its_base_lacks_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.score.weight": torch.ones(2, 16)}, file, {"format": "pt"})
    _edit(adapter / "adapter_config.json", modules_to_save=["score"])
    with pytest.raises(ModelError, match=r"holds score\.weight, which its base has no place for"):
        load_model(adapter)


def adapter_of_another_vocabulary(base, rows, directory, **options):
    """An adapter of a base that was given so many rows before it was trained; its files, and the model itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    saving = {name: options.pop(name) for name in ("save_embedding_layers",) if name in options}
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | options)
    made = peft.get_peft_model(model, config)
    made.save_pretrained(directory, **saving)
    return made.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}, {"trainable_token_indices": [VOCABULARY, VOCABULARY + 1]}],
    ids=["modules", "embedding", "tokens"],
)
def test_an_adapter_of_an_enlarged_vocabulary_is_loaded_as_peft_does(saved, options, tmp_path):
    adapter_of_another_vocabulary(saved, VOCABULARY + 2, tmp_path / "adapter", **options)
    words(VOCABULARY + 2).save_pretrained(tmp_path / "adapter")
    expected = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    ids = torch.tensor([[5, VOCABULARY + 1, 7, VOCABULARY]])
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (VOCABULARY + 2, {"trainable_token_indices": [VOCABULARY + 1], "save_embedding_layers": False}),
        (VOCABULARY + 2, {"target_modules": ["lm_head"], "save_embedding_layers": False}),
        (VOCABULARY + 2, {"modules_to_save": ["lm_head"], "save_embedding_layers": False}),
        (VOCABULARY - 2, {"save_embedding_layers": True}),
    ],
    ids=["tokens", "head", "module", "fewer"],
)
def test_an_adapter_without_its_tokenizer_says_its_size_by_its_weights(saved, rows, options, tmp_path):
    """Peft looks at the tokenizer alone, and fails with an IndexError or a size mismatch."""
    expected = adapter_of_another_vocabulary(saved, rows, tmp_path / "adapter", **options)
    tokenizer = words(min(rows, VOCABULARY))
    tokenizer.save_pretrained(tmp_path / "words")
    ids = torch.tensor([[5, 9, 7, 11]])
    logits = load_model(tmp_path / "adapter", tokenizer=tmp_path / "words").model(input_ids=ids).logits
    assert logits.shape[-1] == rows
    known = slice(0, min(rows, VOCABULARY))  # rows of new tokens that the adapter does not hold are in no file
    torch.testing.assert_close(logits[..., known], expected(input_ids=ids).logits[..., known])


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files_of_older_trainers_are_loaded_as_tensors_only(copy, shards, monkeypatch, tmp_path):
    expected = load_model(copy).model.state_dict()
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    files = [copy / "pytorch_model.bin"] if shards == 1 else [copy / f"pytorch_model-{n}.bin" for n in range(shards)]
    for number, file in enumerate(files):
        torch.save(dict([*weights.items()][number::shards]), file)
    if shards > 1:
        weight_map = {name: files[number % shards].name for number, name in enumerate(weights)}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = load_model(copy).model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    torch.save({"weight": Harm()}, files[0])
    monkeypatch.chdir(tmp_path)
    refused(copy, files[0], "not a readable torch file of tensors")
    assert not (tmp_path / "harmed").exists()


class Harm:
    """Creates a file when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["pytorch_model_fsdp_0/__0_0.distcp"], ["accelerate merge-weights {0}/pytorch_model_fsdp_0 {0}"]),
        (["__0_0.distcp"], ["accelerate merge-weights {0} OUT"]),
        (["pytorch_model_fsdp.bin"], ["rename it to pytorch_model.bin"]),
        (
            ["global_step4/zero.pt", "zero_to_fp32.py"],
            ["global_step4 is Deep", "python zero_to_fp32.py . . --safe"],
        ),
        (["epoch_0/model.safetensors", "epoch_10/x", "epoch_2/x"], ["epoch_0, epoch_2, epoch_10", "{0}/epoch_10."]),
        ([], ["no model.safetensors or pytorch_model.bin in it. Give"]),
    ],
)
def test_weights_in_another_form_are_named_with_the_command_that_joins_them(copy, names, parts):
    (copy / "model.safetensors").unlink()
    for name in names:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).touch()
    refused(copy, "no model.safetensors", *(part.format(copy) for part in parts))
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        weights_of(str(copy), "model", "pytorch_model")


def test_weights_without_a_configuration_are_told_where_to_find_it(copy, tmp_path):
    """As accelerate's `save_state` leaves them in `checkpoint_0`."""
    state = copy / "checkpoint_0"
    state.mkdir()
    shutil.copy(copy / "model.safetensors", state)
    refused(state, "no config.json", f"cp {copy}/*.json {state}")


def test_adapter_of_another_rank_is_refused(adapter):
    _edit(adapter / "adapter_config.json", r=5)
    refused(adapter, adapter, "do not fit its base", "or the rank r", "16] in the adapter, and would be [5, 16]")


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_truncated_weight_file_is_named(copy, kept):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(copy, file, "not a readable safetensors file")


def test_garbled_weight_file_is_named(copy):
    file = copy / "model.safetensors"
    file.write_bytes(b"\xff" * 500 + file.read_bytes()[500:])
    refused(copy, file)


def test_missing_weights_are_refused_not_drawn_at_random(copy):
    file = copy / "model.safetensors"
    weights = load_file(file)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: weight for name, weight in weights.items() if name != lost}, file, {"format": "pt"})
    refused(copy, copy, "lack 1 weight that its config.json asks for", lost)


def test_weights_of_another_shape_are_named(copy):
    _edit(copy / "config.json", intermediate_size=32)
    refused(copy, "a model of other sizes than its config.json", "6 weights have another shape",
            "model.layers.0.mlp.down_proj.weight, [16, 24] in the file, [16, 32] by config.json")  # fmt: skip


def test_weights_that_the_model_has_no_place_for_are_told(copy, caplog):
    _edit(copy / "config.json", num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        assert len(load_model(copy).layers()) == 7
    assert "no place for 9 weights, model.layers.1.input_layernorm.weight first" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "abc"}, {"hidden_size": 15}, {"model_type": "nothing"}, {"model_type": "t5"}]
)
def test_configuration_that_cannot_be_used_names_the_directory(copy, changes):
    _edit(copy / "config.json", **changes)
    refused(copy, copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_directory_that_lacks_a_file_is_refused(copy, name):
    (copy / name).unlink()
    refused(copy, copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_garbled_json_names_the_directory(copy, name):
    (copy / name).write_text("{")
    refused(copy, copy)


def test_missing_directory_is_refused(tmp_path, copy):
    refused(tmp_path / "nothing", "not a model directory")
    refused("./nothing", "not a model directory")
    refused(copy / "config.json", "not a model directory")


def test_name_that_the_hub_cannot_give_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("whence-tests/nothing", "whence-tests/nothing", "Hugging Face Hub")


def test_tokenizer_with_more_ids_than_the_embedding_is_refused(saved, tmp_path):
    words(VOCABULARY + 5).save_pretrained(tmp_path / "other")
    refused(saved, tmp_path / "other", saved, "ids up to 65", "61 rows", tokenizer=tmp_path / "other")
    words(VOCABULARY - 5).save_pretrained(tmp_path / "smaller")
    assert len(load_model(saved, tokenizer=tmp_path / "smaller").tokenizer) == VOCABULARY - 5


def test_a_tokenizer_that_is_named_is_taken_or_refused(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    for named in (tmp_path / "empty", tmp_path / "nowhere"):  # not the model's own in its place
        with pytest.raises(ModelError) as refusal:
            load_model(saved, tokenizer=named)
        told = str(refusal.value)
        assert told.startswith(f"{named}: no loadable tokenizer (") and told.endswith("or a Hub name.")
        assert "Name one with" not in told


def test_checkpoint_without_a_tokenizer_takes_its_parents(saved, tmp_path):
    checkpoint = shutil.copytree(saved, tmp_path / "checkpoint-3", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(checkpoint, "no loadable tokenizer", "--tokenizer")
    words(40).save_pretrained(tmp_path)
    assert len(load_model(checkpoint).tokenizer) == 40


def test_adapter_checkpoint_prefers_its_parents_tokenizer_to_its_bases(adapter, tmp_path):
    checkpoint = shutil.copytree(adapter, tmp_path / "run" / "checkpoint-3")
    assert len(load_model(checkpoint).tokenizer) == VOCABULARY
    words(40).save_pretrained(tmp_path / "run")
    assert len(load_model(checkpoint).tokenizer) == 40
    words(30).save_pretrained(checkpoint)
    assert len(load_model(checkpoint).tokenizer) == 30


def test_digest_is_of_the_weights_not_of_how_files_are_written(copy):
    before = directory_digest(copy)
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7))
    assert directory_digest(copy) == before
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = directory_digest(copy)
    assert changed != before
    file.rename(copy / "model-00001-of-00001.safetensors")
    assert directory_digest(copy) not in (before, changed)


def test_digest_changes_with_what_the_configuration_says(copy):
    before, file = directory_digest(copy), copy / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"transformers_version": "9.9"}, indent=7))
    assert directory_digest(copy) == before
    file.write_text(json.dumps(content | {"rms_norm_eps": 0.5}))
    assert directory_digest(copy) != before


def test_digest_of_an_adapter_changes_with_its_base(adapter, copy):
    _edit(adapter / "adapter_config.json", base_model_name_or_path=str(copy))
    before = directory_digest(adapter)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert directory_digest(adapter) != before


def test_adapters_as_torch_files_have_digests_of_their_own(saved_adapter, tmp_path):
    weights, known = load_file(saved_adapter / "adapter_model.safetensors"), directory_digest(saved_adapter)
    for number in (1, 2):
        copied = shutil.copytree(saved_adapter, tmp_path / str(number))
        torch.save({name: weight * number for name, weight in weights.items()}, copied / "adapter_model.bin")
        assert directory_digest(copied) == known  # peft takes the safetensors that are still beside it
        (copied / "adapter_model.safetensors").unlink()
    assert len({directory_digest(tmp_path / str(number)) for number in (1, 2)}) == 2
    assert load_model(tmp_path / "2").has_adapter
    (tmp_path / "2" / "adapter_model.bin").write_bytes(b"not a torch file")
    refused(tmp_path / "2", tmp_path / "2" / "adapter_model.bin", "not a readable torch file of tensors")


def test_digest_of_a_directory_without_safetensors_is_of_its_torch_files(copy):
    (copy / "model.safetensors").unlink()
    found = {directory_digest(copy)}
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"):
        torch.save({name: torch.ones(2)}, copy / name)
        found.add(directory_digest(copy))
    torch.save({}, copy / "training_args.bin")
    assert len(found) == 3 and directory_digest(copy) in found


@pytest.fixture
def adapted(saved, tmp_path):
    """Directory of an adapter of these options."""

    def make(**options):
        base = transformers.AutoModelForCausalLM.from_pretrained(saved)
        made = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
        made.save_pretrained(tmp_path / "adapted")
        return tmp_path / "adapted"

    return make


def test_an_adapter_that_trains_tokens_is_loaded(adapted):
    loaded = load_model(adapted(trainable_token_indices=[3, 5]))
    assert loaded.device.type == "cpu"
    low_rank, tokens = 2 * 2 * (16 + 16), 2 * 16  # two blocks, rank 2, a square layer
    assert loaded.traced_fraction(loaded.layers()) == pytest.approx(low_rank / (low_rank + tokens))


@pytest.mark.parametrize(
    ("options", "more"),
    [({"modules_to_save": ["lm_head"]}, VOCABULARY * 16), ({"use_dora": True}, 2 * 16), ({}, 0)],
)
def test_the_traced_share_of_an_adapter_is_of_all_that_it_trains(adapted, options, more):
    loaded = load_model(adapted(**options))
    low_rank = 2 * 2 * (16 + 16)
    assert loaded.traced_fraction(loaded.layers()) == pytest.approx(low_rank / (low_rank + more))


def test_a_model_without_gradient_checkpointing_says_so():
    config = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    loaded = LoadedModel(transformers.OpenAIGPTLMHeadModel(config), None, "here")
    with (
        pytest.raises(
            ModelError, match=r"here: a OpenAIGPTLMHeadModel has no gradient checkpointing\. Leave --gradient"
        ),
        loaded.gradient_checkpointing(),
    ):
        pass


def test_the_context_of_roberta_is_what_its_positions_leave():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**sizes, vocab_size=50, max_position_embeddings=20, is_decoder=True)
    loaded = LoadedModel(transformers.RobertaForCausalLM(config).eval(), None, "roberta")
    assert loaded.context == 18
    loaded.model(torch.full((1, 18), 7))
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model(torch.full((1, 19), 7))


def test_token_ids_go_where_an_offloaded_embedding_runs():
    model = tiny_model("llama").model
    model.model.embed_tokens.to("meta")
    model.model.embed_tokens._hf_hook = SimpleNamespace(execution_device="cpu")
    assert LoadedModel(model, None, "offloaded").device == torch.device("cpu")


def test_tokenizer_digest_changes_with_words_and_template():
    plain, templated = words(), words()
    assert tokenizer_digest(plain) == tokenizer_digest(words())
    templated.chat_template = "{{ messages }}"
    assert len({tokenizer_digest(tokenizer) for tokenizer in (plain, templated, words(40))}) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_then_head_is_the_models_forward(architecture):
    loaded = tiny_model(architecture)
    batch = collate(random_examples(3, seed=1))
    states, head = loaded.decode(batch.ids, batch.mask)
    expected = loaded.model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    torch.testing.assert_close(head(states[batch.mask]), expected[batch.mask])
    again = loaded.model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    torch.testing.assert_close(again, expected)


def _greedy(loaded, prompt, longest):
    answer = []
    while len(answer) < longest and loaded.tokenizer.eos_token_id not in answer:
        logits = loaded.model(torch.tensor([[*prompt, *answer]])).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(saved, device="cpu")


def test_answers_equal_one_prompt_at_a_time(loaded, monkeypatch):
    monkeypatch.setattr("whence.models.generation.PROMPTS_PER_BATCH", 3)
    prompts = [example.ids for example in random_examples(20, seed=2, longest=5)]
    answers = generate(loaded, prompts, 12)
    assert answers == [_greedy(loaded, prompt, 12) for prompt in prompts]
    ended = [answer[-1] == loaded.tokenizer.eos_token_id for answer in answers]
    assert any(ended)
    assert not all(ended)
    assert PROMPTS_PER_BATCH > 3


def test_answers_are_greedy_whatever_the_models_generation_config_says(loaded, monkeypatch):
    prompts = [[5, 6], [7, 8, 9], [10, 11]]
    expected = [_greedy(loaded, prompt, 8) for prompt in prompts]
    expected = [answer[: answer.index(5) + 1] if 5 in answer else answer for answer in expected]
    own = transformers.GenerationConfig(
        repetition_penalty=1.8, num_beams=3, no_repeat_ngram_size=2, max_length=4, eos_token_id=[5], min_length=8
    )
    monkeypatch.setattr(loaded.model, "generation_config", own)
    assert generate(loaded, prompts, 8) == expected
    assert loaded.model.generation_config is own


def test_nothing_to_continue_is_refused(loaded):
    assert generate(loaded, [], 4) == []
    with pytest.raises(SettingError, match="no token"):
        generate(loaded, [[3], []], 4)
