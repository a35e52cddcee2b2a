"""Ghost scores against an oracle: a loop of single-example autograd through the model's own forward, unpadded."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ARCHITECTURES, COMMON, VOCABULARY, random_examples, tiny_model
from whence.corpus.tokens import Encoded, collate
from whence.errors import ModelError, SettingError
from whence.gradients.capture import token_losses
from whence.gradients.ghost import head_scores, interpolated, per_example_dot, position_dots
from whence.models.loading import LoadedModel

MORE = ["tied llama", "qwen3", "gemma3", "phi", "cohere", "granite"]
"""Tied; norms of queries and keys, by head; scaled embeddings; a head with a bias; a head's scale, and its inverse."""


def made(architecture, seed=0):
    """One of conftest's models, or of MORE."""
    import transformers as t

    if architecture in ARCHITECTURES:
        return tiny_model(architecture, seed)
    common = COMMON | {"num_key_value_heads": 1, "attn_implementation": "eager", "pad_token_id": 0}
    small = {"head_dim": 8, "layer_types": ["full_attention"] * 2}
    config = {
        "tied llama": lambda: t.LlamaConfig(**common, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**common, head_dim=8),
        "gemma3": lambda: t.Gemma3TextConfig(**common, **small),
        "phi": lambda: t.PhiConfig(**common, partial_rotary_factor=0.5),
        "cohere": lambda: t.CohereConfig(**common, logit_scale=0.5, use_qk_norm=True),
        "granite": lambda: t.GraniteConfig(**common, logits_scaling=3.0, embedding_multiplier=2.0),
        "opt": lambda: t.OPTConfig(**common, ffn_dim=24, word_embed_proj_dim=16),
        "mixtral": lambda: t.MixtralConfig(**common, num_local_experts=2),
    }[architecture]()
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return LoadedModel(model=model, tokenizer=None, path=architecture)


def random_direction(model, names=None, seed=0):
    """A direction with parts of every parameter, or of some."""
    rng = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(weight.shape, generator=rng) for name, weight in model.model.named_parameters()}
    return {name: part for name, part in found.items() if names is None or name in names}


def prompted(examples):
    """Examples of which the first half is a prompt."""
    halves = [len(example.ids) // 2 for example in examples]
    return [
        Encoded(example.ids, [t >= max(half, 1) for t in range(len(example.ids))])
        for example, half in zip(examples, halves, strict=True)
    ]


def loss_of(model, example, reduction="mean"):
    logits = model.model(input_ids=torch.tensor([example.ids])).logits[0].float()
    targets = [t for t, supervised in enumerate(example.supervised) if supervised]
    wanted = torch.tensor([example.ids[t] for t in targets])
    return F.cross_entropy(logits[[t - 1 for t in targets]], wanted, reduction=reduction)


def oracle(model, examples, reduction="mean"):
    """Gradient of each example's loss by parameter, one example at a time, flat, in float64."""
    weights = dict(model.model.named_parameters())
    model.model.requires_grad_(True)
    found = []
    for example in examples:
        taken = torch.autograd.grad(loss_of(model, example, reduction), list(weights.values()), allow_unused=True)
        filled = [torch.zeros_like(w) if g is None else g for g, w in zip(taken, weights.values(), strict=True)]
        found.append([gradient.double().flatten() for gradient in filled])
    model.model.requires_grad_(False)
    return {name: torch.stack(rows) for name, rows in zip(weights, zip(*found, strict=True), strict=True)}


def disagreements(found, gradients, direction, tolerance=1e-5):
    """Parameters and rows whose inner product is off by more than `tolerance` of it.

    One that cancels is held to `tolerance` of what it would be if the direction were random, and one whose gradient
    is zero but for rounding to the example's whole gradient.
    """
    whole = torch.stack([gradient.square().sum(1) for gradient in gradients.values()]).sum(0).sqrt()
    out = {}
    for name, dots in zip(found.parameters, found.dots, strict=True):
        part = direction[name][0] @ direction[name][1] if isinstance(direction[name], tuple) else direction[name]
        part = part.double().flatten()
        expected = gradients[name] @ part
        scale = torch.maximum(gradients[name].norm(dim=1), 1e-2 * whole) * part.norm() / len(part) ** 0.5
        errors = (dots - expected).abs() / torch.maximum(expected.abs(), scale)
        out |= {(name, row): error.item() for row, error in enumerate(errors) if not error <= tolerance}
    return out


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE)
def test_every_parameter_equals_single_example_autograd(architecture, reduction):
    model, examples = made(architecture), random_examples(3, seed=1) + prompted(random_examples(2, seed=2))
    direction, gradients = random_direction(model), oracle(model, examples, reduction)
    found = per_example_dot(model, collate(examples), direction, reduction=reduction, norms=True)
    assert found.parameters == tuple(direction)
    assert not disagreements(found, gradients, direction)
    expected = sum(gradients[name] @ direction[name].double().flatten() for name in direction)
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-4)
    squares = torch.stack([gradients[name].square().sum(1) for name in direction])
    torch.testing.assert_close(found.norms.double(), squares.sum(0).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.squares.double(), squares, rtol=1e-4, atol=1e-6 * squares.sum(0).max().item())
    losses = torch.stack([loss_of(model, example, reduction) for example in examples])
    torch.testing.assert_close(found.losses.loss, losses, rtol=1e-5, atol=1e-6)


def head_name(model):
    weight = model.base.get_output_embeddings().weight
    return next(name for name, each in model.model.named_parameters() if each is weight)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("architecture", ["llama", "lora", "neox", "phi", "gemma", "granite", "cohere", "gpt2"])
def test_head_scores_equal_the_head_of_per_example_dot(architecture, reduction):
    model, examples = made(architecture), prompted(random_examples(5, seed=3))
    head = model.base.get_output_embeddings()
    if model.base.config.tie_word_embeddings:  # it also embeds: take the head's use alone
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    name = head_name(model)
    direction, batch = random_direction(model, [name]), collate(examples)
    scores, losses = head_scores(model, batch, direction[name], reduction=reduction)
    whole = per_example_dot(model, batch, direction, reduction=reduction)
    assert not disagreements(whole, {name: oracle(model, examples, reduction)[name]}, direction)
    torch.testing.assert_close(scores, whole.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.nll, whole.losses.nll)
    torch.testing.assert_close(losses.loss, token_losses(model, batch, reduction=reduction).loss)


def test_head_scores_run_no_backward_pass(monkeypatch):
    model, batch = made("llama"), collate(random_examples(3, seed=4))
    direction = torch.randn(VOCABULARY, 16)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    scores, _ = head_scores(model, batch, direction)
    assert scores.isfinite().all()
    assert not scores.requires_grad
    assert not model.base.lm_head._forward_hooks


def test_head_scores_and_dots_in_chunks_equal_one_chunk(monkeypatch):
    model, batch = made("gemma"), collate(random_examples(6, seed=5))
    direction = random_direction(model)
    weight = direction[head_name(model)]
    whole, dots = head_scores(model, batch, weight)[0], per_example_dot(model, batch, direction, norms=True)
    monkeypatch.setattr("whence.gradients.ghost.LEAST_POSITIONS", 4)
    monkeypatch.setattr("whence.gradients.ghost.LOGITS_PER_CHUNK", {"cpu": 1})
    monkeypatch.setattr("whence.gradients.capture.LEAST_POSITIONS", 4)
    monkeypatch.setattr("whence.gradients.capture.LOGITS_PER_CHUNK", {"cpu": 1})
    torch.testing.assert_close(head_scores(model, batch, weight)[0], whole, rtol=1e-5, atol=1e-5)
    parts = per_example_dot(model, batch, direction, norms=True)
    torch.testing.assert_close(parts.dots, dots.dots, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.squares, dots.squares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "lora"])
def test_low_rank_pair_equals_its_product(architecture):
    """Also of the tied embedding; `Conv1D` stores the transpose of what a pair stands for."""
    model, batch = made(architecture), collate(random_examples(4, seed=6))
    layers = {id(layer.weight): layer for layer in model.layers("*").values()}
    pairs, products = {}, {}
    for name, weight in model.model.named_parameters():
        if weight.dim() == 2 and (id(weight) in layers or "embed_tokens" in name):
            is_conv = type(layers.get(id(weight))).__name__ == "Conv1D"
            o, i = reversed(weight.shape) if is_conv else weight.shape
            pairs[name] = torch.randn(o, 2), torch.randn(2, i)
            products[name] = (pairs[name][0] @ pairs[name][1]).T if is_conv else pairs[name][0] @ pairs[name][1]
    assert len(pairs) >= 9
    found, expected = per_example_dot(model, batch, pairs), per_example_dot(model, batch, products)
    torch.testing.assert_close(found.dots, expected.dots, rtol=1e-4, atol=1e-4)
    if architecture != "lora":
        head = head_name(model)
        scores = [head_scores(model, batch, parts[head])[0] for parts in (pairs, products)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, on a first jvp
def test_forward_mode_agrees():
    """A second oracle: one Jacobian-vector product gives the inner products of a whole batch."""
    from torch.func import functional_call, jvp

    model, examples = made("gemma"), random_examples(4, seed=7)
    batch, direction = collate(examples), random_direction(model)
    weights = {name: weight.detach() for name, weight in model.model.named_parameters()}

    def losses(weights):
        out = functional_call(model.model, weights, (), {"input_ids": batch.ids, "attention_mask": batch.mask.long()})
        nll = -out.logits[:, :-1].log_softmax(2).gather(2, batch.ids[:, 1:, None])[..., 0]
        wanted = batch.supervised[:, 1:].float()
        return (nll * wanted).sum(1) / wanted.sum(1)

    values, tangents = jvp(losses, (weights,), (direction,))
    found = per_example_dot(model, batch, direction)
    torch.testing.assert_close(found.total, tangents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.losses.loss, values, rtol=1e-5, atol=1e-6)


def test_dot_worked_by_hand():
    """g^T D a = (1, 2) [[1, 0], [0, 3]] (5, 7) = 5 + 42, also by the pairs of (1, 3)'s two columns."""
    a, g, weight = torch.tensor([[5.0, 7.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert position_dots(a, g, weight).tolist() == [47.0]
    assert position_dots(a, g, (weight, torch.eye(2))).tolist() == [47.0]
    assert position_dots(a, torch.tensor([[1.0, 2.0, 0.0]]), torch.ones(3, 2)).tolist() == [36.0]


def test_sign_flips_and_nothing_scores_nothing():
    model, batch = made("gpt2"), collate(random_examples(3, seed=8))
    direction, head = random_direction(model), torch.randn(VOCABULARY, 16)
    found = per_example_dot(model, batch, direction)
    minus = per_example_dot(model, batch, {name: -part for name, part in direction.items()})
    nothing = per_example_dot(model, batch, {name: 0 * part for name, part in direction.items()})
    assert torch.equal(minus.dots, -found.dots)
    assert nothing.dots.abs().max() == 0
    assert torch.equal(head_scores(model, batch, -head)[0], -head_scores(model, batch, head)[0])
    assert head_scores(model, batch, 0 * head)[0].abs().max() == 0


def test_descent_makes_members_score_above_zero():
    """One step of SGD on an example: its score with theta_0 - theta_f is the rate times its squared norm."""
    model, examples = made("llama"), random_examples(3, seed=9)
    gradients = oracle(model, examples)
    shapes = {name: weight.shape for name, weight in model.model.named_parameters()}
    direction = {name: 0.1 * gradient[1].float().view(shapes[name]) for name, gradient in gradients.items()}
    found = per_example_dot(model, collate(examples), direction, norms=True)
    torch.testing.assert_close(found.total[1], 0.1 * found.norms[1] ** 2, rtol=1e-5, atol=0)
    assert found.total[1] > 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), architecture=st.sampled_from(["gpt2", "gemma"]))
def test_score_does_not_depend_on_batch_mates_order_or_padding(seed, count, architecture):
    model, examples = made(architecture), random_examples(count, seed=seed)
    direction = random_direction(model)
    together = per_example_dot(model, collate(examples), direction, norms=True)
    backwards = per_example_dot(model, collate(examples[::-1]), direction, norms=True)
    alone = [per_example_dot(model, collate([example], pad_id=5), direction, norms=True) for example in examples]
    longer = per_example_dot(model, collate([*examples, Encoded([1] * 20, [False] + [True] * 19)], 3), direction)
    scale = together.norms.max().item() * 1e-5
    torch.testing.assert_close(backwards.dots.flip(1), together.dots, rtol=1e-4, atol=100 * scale)
    torch.testing.assert_close(torch.cat([one.dots for one in alone], 1), together.dots, rtol=1e-4, atol=100 * scale)
    torch.testing.assert_close(longer.dots[:, :-1], together.dots, rtol=1e-4, atol=100 * scale)
    torch.testing.assert_close(torch.cat([one.norms for one in alone]), together.norms, rtol=1e-4, atol=scale)
    torch.testing.assert_close(backwards.norms.flip(0), together.norms, rtol=1e-4, atol=scale)


def test_example_that_is_not_finite_is_nan_alone():
    model = made("llama")
    model.base.get_input_embeddings().weight[60] = torch.inf
    examples = [Encoded([1, 2, 3, 4], [False, True, True, True]), Encoded([1, 60, 3], [False, True, True])]
    examples += [Encoded([5, 6], [False, True])]
    direction, head = random_direction(model), torch.randn(VOCABULARY, 16)
    found = per_example_dot(model, collate(examples), direction, norms=True)
    finite = per_example_dot(model, collate([examples[0], examples[2]]), direction, norms=True)
    assert found.total.isnan().tolist() == found.norms.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found.dots[:, [0, 2]], finite.dots, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.norms[[0, 2]], finite.norms)
    scores, losses = head_scores(model, collate(examples), head)
    assert scores.isnan().tolist() == losses.loss.isnan().tolist() == [False, True, False]


def test_example_without_target_scores_zero():
    model, examples = made("gemma"), random_examples(2, seed=10)
    empty = Encoded([1, 2, 3], [False] * 3)
    direction = random_direction(model)
    for batch in (collate([*examples, empty]), collate([empty])):
        found = per_example_dot(model, batch, direction, norms=True)
        assert found.total[-1] == found.norms[-1] == found.losses.loss[-1] == 0
        scores, losses = head_scores(model, batch, direction[head_name(model)])
        assert scores[-1] == losses.loss[-1] == 0


def test_part_of_a_direction_is_its_rows():
    model, batch = made("llama"), collate(random_examples(3, seed=11))
    direction = random_direction(model)
    everything = per_example_dot(model, batch, direction)
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"]
    found = per_example_dot(model, batch, {name: direction[name] for name in names})
    rows = [everything.parameters.index(name) for name in names]
    torch.testing.assert_close(found.dots, everything.dots[rows])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    with pytest.raises(SettingError, match="norms=True"):
        _ = found.norms


def test_bfloat16_model_is_summed_in_float32():
    model, batch = made("gemma3"), collate(random_examples(4, seed=12))
    direction = random_direction(model)
    expected = per_example_dot(model, batch, direction, norms=True)
    model.model.to(torch.bfloat16)
    found = per_example_dot(model, batch, direction, norms=True)
    assert found.dots.dtype == found.squares.dtype == torch.float32
    assert F.cosine_similarity(found.dots.flatten(), expected.dots.flatten(), dim=0) > 0.99
    scores, _ = head_scores(model, batch, direction[head_name(model)])
    assert scores.dtype == torch.float32


def test_loss_difference_is_the_mean_score_on_the_line_between():
    base, final = made("gemma"), made("gemma")
    rng = torch.Generator().manual_seed(13)
    for weight in final.model.parameters():
        weight.add_(torch.randn(weight.shape, generator=rng) * 0.02)
    ends = [dict(model.model.named_parameters()) for model in (base, final)]
    direction = {name: ends[0][name] - ends[1][name] for name in ends[0]}
    examples = random_examples(5, seed=14)
    for example in examples:  # no token 0, whose row pads: it shapes the loss and has no gradient
        example.ids[:] = [max(token, 1) for token in example.ids]
    batch, points = collate(examples), 20
    total = torch.zeros(5)
    for point in range(points):
        with interpolated(base, final, (point + 0.5) / points) as between:
            total += per_example_dot(between, batch, direction).total / points
    expected = token_losses(base, batch).loss - token_losses(final, batch).loss
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolation_meets_both_ends_and_is_undone(dtype):
    base, final, batch = made("gpt2"), made("gpt2", seed=1), collate(random_examples(3, seed=15))
    base.model.to(dtype)
    final.model.to(dtype)
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    after = {name: weight.clone() for name, weight in final.model.named_parameters()}
    for s in (0.0, 0.25, 1.0):
        with interpolated(base, final, s) as between:
            for name, weight in between.model.named_parameters():
                first, last = before[name].float(), after[name].float()
                assert weight.dtype == torch.float32
                torch.testing.assert_close(weight.data, first + s * (last - first))
                assert s == 0.25 or torch.equal(weight, last if s else first)
            assert token_losses(between, batch).loss.isfinite().all()
            assert between.base.lm_head.weight is between.base.get_input_embeddings().weight
    with pytest.raises(ZeroDivisionError), interpolated(base, final, 0.5):
        raise ZeroDivisionError
    for model, weights in ((base, before), (final, after)):
        for name, weight in model.model.named_parameters():
            assert weight.dtype == dtype
            assert torch.equal(weight, weights[name])


def test_what_cannot_be_scored_is_refused():
    model, batch = made("tied llama"), collate(random_examples(3, seed=16))
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    wrong = [
        ({}, "no parameter"),
        ({"lm_head.weight": torch.zeros(VOCABULARY, 16)}, "first name"),
        ({up: torch.zeros(16, 24)}, "which is"),
        ({up: (torch.zeros(24, 2), torch.zeros(3, 16))}, "which is"),
        ({norm: (torch.zeros(16, 1), torch.zeros(1, 1))}, "which is"),
    ]
    for direction, message in wrong:
        with pytest.raises(SettingError, match=message):
            per_example_dot(model, batch, direction)
    with pytest.raises(SettingError, match="output head"):
        head_scores(model, batch, torch.zeros(16, VOCABULARY))
    with (
        pytest.raises(ModelError, match=r"no line between them: .* in one and absent"),
        interpolated(model, made("gpt2"), 0.5),
    ):
        pass


def test_adapter_on_the_head_and_on_the_embedding():
    import peft

    plain, examples = made("llama"), random_examples(4, seed=19)
    wrapped = peft.get_peft_model(plain.model, peft.LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"]))
    model = LoadedModel(model=wrapped.eval().requires_grad_(False), tokenizer=None, path="lora", has_adapter=True)
    for name, parameter in wrapped.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if "lora_" in name else 0))
    direction, batch, gradients = random_direction(model), collate(examples), oracle(model, examples)
    head, inside = "base_model.model.lm_head.base_layer.weight", "base_model.model.model.embed_tokens.lora_embedding_A"
    scores, _ = head_scores(model, batch, direction[head])
    expected = gradients[head] @ direction[head].double().flatten()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    known = {name: part for name, part in direction.items() if "lora_embedding" not in name}
    assert not disagreements(per_example_dot(model, batch, known), gradients, known)
    with pytest.raises(ModelError, match="a parameter of a ParameterDict"):
        per_example_dot(model, batch, {f"{inside}.default": direction[f"{inside}.default"]})


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [("opt", "embed_positions.weight", "more than its input"), ("mixtral", "experts.gate_up_proj", "no closed form")],
)
def test_parameters_without_a_closed_form_are_refused_and_the_rest_is_exact(architecture, name, message):
    model, examples = made(architecture), random_examples(3, seed=17)
    direction, batch = random_direction(model), collate(examples)
    with pytest.raises(ModelError, match=message):
        per_example_dot(model, batch, {full: part for full, part in direction.items() if name in full})
    known = {full: part for full, part in direction.items() if ".mlp." not in full and "embed_positions" not in full}
    assert not disagreements(per_example_dot(model, batch, known), oracle(model, examples), known)


def test_biases_of_modules_that_share_a_weight_stay_apart():
    model, examples = made("gpt2"), random_examples(3, seed=18)
    first, second = (model.base.transformer.h[number].mlp.c_fc for number in (0, 1))
    second.weight = first.weight
    direction = random_direction(model, ["transformer.h.0.mlp.c_fc.bias"])
    gradients = {name: part for name, part in oracle(model, examples).items() if name in direction}
    assert not disagreements(per_example_dot(model, collate(examples), direction), gradients, direction)


def test_norms_of_a_weight_that_modules_share_are_refused():
    model, batch = made("llama"), collate(random_examples(3, seed=18))
    first, second = (model.base.model.layers[number].mlp for number in (0, 1))
    second.up_proj.weight = first.up_proj.weight
    name = "model.layers.0.mlp.up_proj.weight"
    direction = random_direction(model, [name])
    gradients = {name: oracle(model, random_examples(3, seed=18))[name]}
    assert not disagreements(per_example_dot(model, batch, direction), gradients, direction)
    with pytest.raises(ModelError, match="several modules use"):
        per_example_dot(model, batch, direction, norms=True)
