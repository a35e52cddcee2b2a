"""Files that transformers renames, joins or splits on loading, against the parameters that it loads."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SIZES, byte_tokenizer
from whence.models.difference import weight_difference
from whence.models.loaded_weights import loaded_weights
from whence.models.loading import load_model
from whence.models.weights import weights_of
from whence.recovery.case import at_point, only_moved, open_case
from whence.recovery.settings import RecoverSettings

IDS = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}


def _config(kind):
    import transformers as t

    if kind == "mixtral":  # experts stacked, a block renamed
        return t.MixtralConfig(**SIZES, **IDS, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    if kind == "neox":  # a renamed head
        return t.GPTNeoXConfig(**SIZES, **IDS)
    return t.AutoConfig.for_model(  # attention renamed, and its joined projection split
        "bailing_hybrid", **SIZES, **IDS, num_key_value_heads=2, head_dim=8, linear_head_dim=8, linear_num_heads=2,
        layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "dense"], q_lora_rank=8,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, num_nextn_predict_layers=0,
    )  # fmt: skip


@pytest.fixture(params=["mixtral", "neox", "bailing_hybrid"])
def pair(request, tmp_path):
    """Directories of a model and of the same, moved, as transformers saves them."""
    import transformers as t

    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(_config(request.param))
    for name in ("base", "final"):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
    return tmp_path / "base", tmp_path / "final"


def parameters(directory):
    return dict(load_model(directory, dtype="float32").model.named_parameters())


def test_entries_are_the_loaded_parameters(pair):
    before, after = map(parameters, pair)
    stored = load_file(pair[0] / "model.safetensors")
    assert stored.keys() != before.keys()  # else the case is none
    difference = weight_difference(*pair)
    assert list(difference) == list(after)
    for name, entry in difference.items():
        assert torch.equal(entry, before[name] - after[name]), name
    assert all(layer.norm > 0 for layer in difference.report)


def test_no_layer_that_moved_is_called_frozen(pair):
    case = open_case(*map(str, pair), RecoverSettings())
    with at_point(case, 1.0) as model:
        direction = case.direction(model, model.layers())
    assert all(matrix.any() for matrix in direction.values())
    assert only_moved(case) == (case, None)


def test_tensors_without_a_place_are_named(pair):
    base = pair[0]
    stored = load_file(base / "model.safetensors")
    save_file(stored | {"mtp.0.weight": torch.ones(3)}, base / "model.safetensors", {"format": "pt"})
    weights = loaded_weights(weights_of(str(base), "model"))
    assert weights.unplaced == ("mtp.0.weight",)
    assert any("mtp.0.weight" in note for note in weight_difference(*pair).notes)
