"""Hooks against an oracle: a loop of single-example autograd with all weights trainable and the model's own logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ARCHITECTURES, random_examples, tiny_model
from whence.corpus.tokens import Encoded, collate
from whence.errors import ModelError
from whence.gradients.capture import (
    Captured,
    Sketches,
    backward,
    example_gradients,
    gradients,
    sketch,
    squared_norms,
    token_losses,
)
from whence.gradients.exact import inner_products
from whence.gradients.norms import gradient_norms
from whence.gradients.projections.identity import Identity
from whence.gradients.projections.two_sided import TwoSided
from whence.models.loading import LoadedModel, layer_shape


def oracle(model: LoadedModel, layers, examples, reduction="mean"):
    """Gradient of each example's shifted loss, one example at a time, unpadded, through the model's own forward."""
    out = {name: [] for name in layers}
    losses = []
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for example in examples:
        model.model.zero_grad()
        logits = model.model(input_ids=torch.tensor([example.ids])).logits[0].float()
        targets = [t for t, supervised in enumerate(example.supervised) if supervised]
        nll = F.cross_entropy(
            logits[[t - 1 for t in targets]],
            torch.tensor([example.ids[t] for t in targets]),
            reduction=reduction,
        )
        nll.backward()
        losses.append(nll.item())
        for name, layer in layers.items():
            gradient = layer.weight.grad.float().clone()
            out[name].append(gradient if isinstance(layer, torch.nn.Linear) else gradient.T)
    for layer in layers.values():
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
    return {name: torch.stack(found) for name, found in out.items()}, torch.tensor(losses)


def disagreements(found, expected, tolerance):
    """Layers and rows that differ by more than `tolerance` of the layer's gradient.

    A gradient that is zero but for rounding (queries and keys, where the only target sees one token) is held to
    `tolerance` of a hundredth of the example's whole gradient.
    """
    whole = sum(gradient.square().sum((1, 2)) for gradient in expected.values()).sqrt()
    errors = {
        (name, row): (found[name][row] - expected[name][row]).norm().item()
        / max(expected[name][row].norm().item(), 1e-2 * whole[row].item())
        for name in expected
        for row in range(len(whole))
    }
    return {where: error for where, error in errors.items() if error > tolerance}


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "falcon"])
def test_hooks_equal_single_example_autograd(architecture, reduction):
    model = tiny_model(architecture)
    layers, examples = model.layers(), random_examples(5, seed=1)
    expected, losses = oracle(model, layers, examples, reduction)
    found, found_losses = gradients(model, layers, collate(examples), reduction=reduction)
    assert list(found) == list(layers)
    torch.testing.assert_close(found_losses.loss, losses, rtol=1e-5, atol=1e-6)
    assert not disagreements(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_head_by_name_equals_autograd(architecture):
    model = tiny_model(architecture)
    if model.has_adapter:
        pytest.skip("the head of an adapter's base is reached like any base's")
    head = next(name for name, layer in model.base.named_modules() if layer is model.base.get_output_embeddings())
    layers, examples = model.layers(head), random_examples(4, seed=2)
    if model.base.config.get_text_config().tie_word_embeddings:
        # the tied weight also embeds: the oracle must take the head's use of it alone
        weight = torch.nn.Parameter(layers[head].weight.detach().clone())
        layers[head].weight = weight
    expected, _ = oracle(model, layers, examples)
    found, _ = gradients(model, layers, collate(examples))
    assert relative_error(found[head], expected[head]) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "gemma"])
def test_a_tied_head_has_the_gradient_of_the_shared_weight(architecture):
    """The embedding's use counts too, with Gemma's scale of its rows; in whole passes and in chunks."""
    model, examples = tiny_model(architecture), random_examples(5, seed=9)
    layers = model.layers("lm_head")
    embedding = model.base.get_input_embeddings()
    assert layers["lm_head"].weight is embedding.weight
    expected, _ = oracle(model, layers, examples)
    found, _ = gradients(model, layers, collate(examples))
    torch.testing.assert_close(found["lm_head"], expected["lm_head"], rtol=1e-4, atol=1e-6)
    norms, _ = gradient_norms(model, layers, collate(examples))
    torch.testing.assert_close(norms, expected["lm_head"].flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)
    assert not embedding._forward_hooks


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6))
def test_gradient_does_not_depend_on_batch_mates_order_or_padding(seed, count):
    model = tiny_model("llama")
    layers, examples = model.layers(), random_examples(count, seed=seed)
    projection = TwoSided({name: layer_shape(layer) for name, layer in layers.items()}, width=4)
    together, _ = sketch(model, layers, collate(examples), projection)
    backwards, _ = sketch(model, layers, collate(examples[::-1]), projection)
    alone = torch.cat([sketch(model, layers, collate([example]), projection)[0] for example in examples])
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "lora"])
def test_gradient_checkpointing_changes_nothing(architecture):
    model = tiny_model(architecture)
    layers, batch = model.layers(), collate(random_examples(4, seed=3))
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    plain, _ = sketch(model, layers, batch, projection)
    recomputed, _ = sketch(model, layers, batch, projection, gradient_checkpointing=True)
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)
    assert not any(module.training for module in model.model.modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bfloat16_model_agrees_with_float32_to_its_own_precision(architecture):
    model, examples = tiny_model(architecture), random_examples(4, seed=4)
    layers = model.layers()
    expected, _ = gradients(model, layers, collate(examples))
    model.model.to(torch.bfloat16)
    found, losses = gradients(model, layers, collate(examples))
    assert losses.loss.dtype == torch.float32
    whole = [torch.cat([held[name].flatten(1) for name in layers], 1) for held in (found, expected)]
    assert whole[0].dtype == torch.float32
    cosine = F.cosine_similarity(*whole)
    assert cosine.min() > 0.99
    assert relative_error(*whole) < 0.1


def test_weights_that_are_used_without_calling_their_layer_are_refused():
    model, batch = tiny_model("mamba"), collate(random_examples(3, seed=5))
    with pytest.raises(ModelError, match=r"backbone.layers.0.mixer.dt_proj.*--layers '!\*dt_proj'"):
        gradients(model, model.layers(), batch)
    layers = model.layers("!*dt_proj")
    expected, _ = oracle(model, layers, random_examples(3, seed=5))
    found, _ = gradients(model, layers, batch)
    assert not disagreements(found, expected, tolerance=1e-5)
    assert not any(weight.requires_grad for weight in model.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_layer_that_no_example_reaches_has_a_zero_gradient(dtype):
    model, batch = tiny_model("llama"), collate(random_examples(3, seed=5))
    model.model.expert = torch.nn.Linear(16, 16, bias=False)  # chosen by no token; quantised, its weight is of bytes
    model.model.expert.weight = torch.nn.Parameter(torch.ones(16, 16, dtype=dtype), requires_grad=False)
    found, _ = gradients(model, model.layers("*expert,*q_proj"), batch)
    assert found["expert"].abs().sum() == 0
    assert found["model.layers.0.self_attn.q_proj"].abs().sum() > 0


def test_a_model_that_no_gpu_runs_in_a_fixed_order_runs_and_is_told_of(caplog, monkeypatch):
    model, examples = tiny_model("llama"), random_examples(3, seed=6)
    layers, own = model.layers(), type(model).decode
    expected, _ = gradients(model, layers, collate(examples))
    stubborn = iter([RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")])

    def decode(self, ids, mask):
        for error in stubborn:
            raise error
        return own(self, ids, mask)

    monkeypatch.setattr(type(model), "decode", decode)
    found, _ = gradients(model, layers, collate(examples))
    assert not disagreements(found, expected, tolerance=1e-6)
    assert "cannot be run in a fixed order (cumsum_cuda_kernel does not have" in caplog.text
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_layer_used_twice_adds_up_and_has_a_norm(gradient_checkpointing):
    model, examples = tiny_model("llama"), random_examples(3, seed=6)
    model.base.model.layers[1] = model.base.model.layers[0]
    model.base.config.use_cache = False  # both would write into one place of it
    layers, batch = model.layers(), collate(examples)
    expected, _ = oracle(model, layers, examples)
    found, _ = gradients(model, layers, batch)
    assert not disagreements(found, expected, tolerance=1e-5)
    norms, _ = gradient_norms(model, layers, batch)
    squares = torch.stack([x.flatten(1).square().sum(1) for x in expected.values()])
    torch.testing.assert_close(norms, squares.sum(0).sqrt(), rtol=1e-4, atol=0)
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    how = {"normalise": "layer", "gradient_checkpointing": gradient_checkpointing}
    unit = torch.cat([x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in expected.values()], 1)
    torch.testing.assert_close(sketch(model, layers, batch, projection, **how)[0], unit, rtol=1e-3, atol=1e-5)


def test_a_layer_used_once_is_handed_over_as_it_comes_when_it_is_recomputed():
    """A recomputed block calls its layers again, which is no second use."""
    model, captured = tiny_model("llama"), []
    layers, batch = model.layers(), collate(random_examples(3, seed=6))
    backward(model, layers, batch, captured.append, whole=True, gradient_checkpointing=True)
    assert [one.layer for one in captured if one.rows is not None] == []


def test_modules_that_share_a_weight_are_one_layer():
    model, examples = tiny_model("llama"), random_examples(3, seed=6)
    first, second = (block.mlp.up_proj for block in model.base.model.layers)
    second.weight = first.weight
    layers = model.layers()
    assert "model.layers.0.mlp.up_proj" in layers
    assert "model.layers.1.mlp.up_proj" not in layers
    expected, _ = oracle(model, layers, examples)
    found, _ = gradients(model, layers, collate(examples))
    assert not disagreements(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("entries", [1, 200, 10**9])
def test_gradients_formed_a_few_at_a_time_make_the_same_sketch(entries, monkeypatch):
    model, batch = tiny_model("llama"), collate(random_examples(5, seed=7))
    layers = model.layers()
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    expected, _ = sketch(model, layers, batch, projection)
    few = Sketches._few_at_a_time
    monkeypatch.setattr(Sketches, "_few_at_a_time", lambda self, seen, _: few(seen, entries))
    found, _ = sketch(model, layers, batch, projection)
    torch.testing.assert_close(found, expected)


def test_no_weight_gradient_is_computed_and_hooks_are_gone():
    model = tiny_model("llama")
    layers = model.layers()
    gradients(model, layers, collate(random_examples(2, seed=5)))
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert all(not layer._forward_hooks for layer in layers.values())


def test_example_without_target_has_zero_gradient_and_spoils_nobody():
    model = tiny_model("llama")
    layers, examples = model.layers(), random_examples(3, seed=6)
    empty = Encoded(examples[1].ids, [False] * len(examples[1].ids))
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    expected, _ = sketch(model, layers, collate(examples), projection)
    rows, losses = sketch(model, layers, collate([examples[0], empty, examples[2]]), projection)
    torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-6)
    assert rows[1].abs().max() == 0
    assert losses.loss[1] == 0
    nothing, _ = sketch(model, layers, collate([empty]), projection)
    assert nothing.abs().max() == 0


def test_sum_is_mean_times_targets():
    model = tiny_model("llama")
    layers, examples = model.layers(), random_examples(3, seed=7)
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    mean, _ = sketch(model, layers, collate(examples), projection)
    total, _ = sketch(model, layers, collate(examples), projection, reduction="sum")
    counts = torch.tensor([[example.supervised_count] for example in examples])
    torch.testing.assert_close(total, mean * counts, rtol=1e-4, atol=1e-6)


def test_first_layer_left_out_does_not_move_the_others():
    model = tiny_model("llama")
    batch = collate(random_examples(3, seed=8))
    everything, _ = gradients(model, model.layers(), batch)
    last = model.layers("*layers.1.mlp*")
    found, _ = gradients(model, last, batch)
    assert len(last) == 3
    for name in last:
        torch.testing.assert_close(found[name], everything[name])


def test_chunked_head_equals_one_chunk(monkeypatch):
    model = tiny_model("llama")
    layers, batch = model.layers("*"), collate(random_examples(5, seed=9))
    whole, losses = gradients(model, layers, batch)
    monkeypatch.setattr("whence.gradients.capture.LOGITS_PER_CHUNK", {"cpu": 1})
    monkeypatch.setattr("whence.gradients.capture.LEAST_POSITIONS", 16)
    parts, again = gradients(model, layers, batch)
    torch.testing.assert_close(again.nll, losses.nll)
    for name in layers:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_token_losses_are_shifted_right():
    model, examples = tiny_model("llama"), random_examples(3, seed=10)
    losses = token_losses(model, collate(examples))
    for row, example in enumerate(examples):
        logits = model.model(input_ids=torch.tensor([example.ids])).logits[0]
        log_p = logits.log_softmax(-1)
        for t, supervised in enumerate(example.supervised):
            expected = -log_p[t - 1, example.ids[t]].item() if supervised else 0.0
            assert losses.nll[row, t].item() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 4),
    t=st.integers(1, 9),
    r=st.integers(1, 9),
    i=st.integers(1, 20),
    o=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_norms_and_inner_products_equal_materialised_gradients(b, t, r, i, o, seed):
    rng = torch.Generator().manual_seed(seed)
    a, g = torch.randn(b, t, i, generator=rng), torch.randn(b, t, o, generator=rng)
    query_a, query_g = torch.randn(3, r, i, generator=rng), torch.randn(3, r, o, generator=rng)
    slow = torch.stack([sum(torch.outer(g[n, s], a[n, s]) for s in range(t)) for n in range(b)])
    query = torch.stack([sum(torch.outer(query_g[n, s], query_a[n, s]) for s in range(r)) for n in range(3)])
    torch.testing.assert_close(example_gradients(a, g), slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squared_norms(a, g), slow.square().sum((1, 2)), rtol=1e-4, atol=1e-3)
    expected = torch.einsum("qoi,boi->qb", query, slow)
    torch.testing.assert_close(inner_products(a, g, query_a, query_g), expected, rtol=1e-3, atol=1e-2)


def test_gradient_norms_equal_norms_of_gradients():
    model = tiny_model("llama")
    layers, batch = model.layers(), collate(random_examples(4, seed=11))
    norms, _ = gradient_norms(model, layers, batch)
    exact, _ = gradients(model, layers, batch)
    expected = sum(gradient.square().sum((1, 2)) for gradient in exact.values()).sqrt()
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-6)


def test_gradient_worked_by_hand():
    """A = (1, 2), (3, 4); g = (1), (10): G = 1 * (1, 2) + 10 * (3, 4) = (31, 42)."""
    a, g = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0], [10.0]]])
    assert example_gradients(a, g).tolist() == [[[31.0, 42.0]]]
    assert squared_norms(a, g).tolist() == [31.0**2 + 42.0**2]
    assert Captured("x", a, g, None).layer == "x"


def test_norms_with_the_head_traced_and_an_example_without_targets():
    model, examples = tiny_model("llama"), random_examples(3, seed=12)
    layers, empty = model.layers("*"), Encoded(examples[1].ids, [False] * len(examples[1].ids))
    batch = collate([examples[0], empty, examples[2]])
    norms, _ = gradient_norms(model, layers, batch)
    exact, _ = gradients(model, layers, batch)
    expected = sum(gradient.square().sum((1, 2)) for gradient in exact.values()).sqrt()
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-6)
    assert norms[1] == 0


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_a_spread_model_gives_the_same_gradients(where, tmp_path):
    from conftest import save_tiny_llama
    from whence.models.loading import load_model

    path = save_tiny_llama(tmp_path / "model")
    batch = collate(random_examples(3, seed=13))
    plain, spread = load_model(path), load_model(path, device_map=where)
    expected, _ = gradients(plain, plain.layers("*"), batch)
    found, _ = gradients(spread, spread.layers("*"), batch)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
