"""Adam's view of a gradient: by hand, against AdamW's own step, and against a slow loop on a real training."""

import json
import shutil

import pytest
import torch
from torch import nn

from conftest import contents, corpus_rows, cut_short, plain_trainer_run, random_examples, tiny_model
from whence import catalogue
from whence.corpus.tokens import collate, encode
from whence.errors import ManifestMismatchError, ModelError
from whence.gradients.adam import FrozenGamma, Gamma
from whence.gradients.capture import gradients, sketch
from whence.gradients.flat_width import flat_width
from whence.gradients.projections.identity import Identity
from whence.gradients.space import GradientSpace
from whence.indexing.build import append, index
from whence.indexing.opening import open_index
from whence.indexing.speed import bench
from whence.indexing.vectors import IndexSettings, projection_for
from whence.models.loading import layer_shape, load_model
from whence.models.moments import Moments, read_moments
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query, encode_queries, query_vectors

ADAM = {"view": "adam", "width": 64, "codec": "float32", "progress": False}
ROWS = corpus_rows(20)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A plain Trainer's run of LoRA on a Llama: checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("adam") / "run"
    plain_trainer_run(out, "lora")
    return out


@pytest.fixture
def copy(lora, tmp_path):
    return shutil.copytree(lora, tmp_path / "run")


def change(checkpoint, edit):
    """Edit a checkpoint's optimizer file."""
    content = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    edit(content)
    torch.save(content, checkpoint / "optimizer.pt")


def vectors(built, checkpoint=0):
    store = built.store
    shards = [store.shard(checkpoint, part) for part in range(len(store.manifest.parts))]
    return torch.cat([shard.decoded(store.codec, store.manifest.width) for shard in shards])


# -- the formula


def test_gamma_worked_by_hand():
    """Two weights; b1 = 1/2, b2 = 3/4, eps = 9, one step done.

    n1 = (2 + 4) / 2 = 3 and (-4 + 8) / 2 = 2;  n2 = (9 + 16) / 4 = 6.25 and (0 + 64) / 4 = 16.
    less:  3 / sqrt(6.25 + 9) = 0.7682213 and 2 / sqrt(16 + 9) = 0.4.
    torch: n1 / (1 - 1/4) = 4 and 2.6666667; n2 / (1 - 9/16) = 14.2857143 and 36.5714286, with roots 3.7796447 and
    6.0474316; 4 / 12.7796447 = 0.3129977 and 2.6666667 / 15.0474316 = 0.1772174.
    """
    held = Moments(torch.tensor([[2.0, -4.0]]), torch.tensor([[3.0, 0.0]]), 1, (0.5, 0.75), 9.0)
    g = torch.tensor([[[4.0, 8.0]]])
    for mode, expected in (("less", [0.7682213, 0.4]), ("torch", [0.3129977, 0.1772174])):
        found = Gamma({"x": held}, mode=mode)(g, "x")
        torch.testing.assert_close(found, torch.tensor([[expected]]), rtol=1e-6, atol=0)


def test_gamma_at_the_sizes_of_a_training_worked_by_hand():
    """LESS' constants; m1 = 1e-4, m2 = 1e-10, g = 3e-3, 9 steps done.

    n1 = 0.9e-4 + 3e-4 = 3.9e-4;  n2 = 0.999e-10 + 9e-9 = 9.0999e-9, below eps = 1e-8.
    less:  3.9e-4 / sqrt(1.90999e-8) = 2.8219483.
    torch: 1 - 0.9^10 = 0.6513216 and 1 - 0.999^10 = 0.0099551198: 5.9878259e-4 / (9.5609240e-4 + 1e-8) = 0.6262814.
    """
    held = Moments(torch.tensor([[1e-4]]), torch.tensor([[1e-10]]), 9, (0.9, 0.999), 1e-8)
    for mode, expected in (("less", 2.8219483), ("torch", 0.6262814)):
        found = Gamma({"x": held}, mode=mode)(torch.tensor([[[3e-3]]]), "x")
        assert found.item() == pytest.approx(expected, rel=2e-6)


def test_torch_mode_is_the_step_that_adamw_takes_next():
    torch.manual_seed(0)
    weight, lr = nn.Parameter(torch.randn(4, 5)), 1e-3
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0, betas=(0.8, 0.99), eps=1e-4)
    for _ in range(3):
        weight.grad = torch.randn(4, 5)
        optimizer.step()
    state = optimizer.state[weight]
    held = Moments(state["exp_avg"].clone(), state["exp_avg_sq"].clone(), int(state["step"]), (0.8, 0.99), 1e-4)
    g, before = torch.randn(4, 5), weight.detach().clone().double()
    weight.grad = g.clone()
    weight.data = weight.data.double()  # the step is small beside the weight
    weight.grad = weight.grad.double()
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].double(), state["exp_avg_sq"].double()
    optimizer.step()
    found = Gamma({"x": held}, mode="torch")(g[None], "x")[0]
    torch.testing.assert_close(found.double(), (before - weight.data) / lr, rtol=1e-5, atol=1e-7)


def test_frozen_is_gamma_where_the_second_moment_does_not_move():
    """b2 = 1: f = offset + factor * g, so <q, f> = <q, offset> + <factor * q, g>."""
    torch.manual_seed(0)
    held = {"x": Moments(torch.randn(3, 4), torch.rand(3, 4), 5, (0.9, 1 - 1e-12), 1e-3)}
    g, q = torch.randn(6, 3, 4), torch.randn(2, 3, 4)
    gamma, frozen = Gamma(held, mode="less"), FrozenGamma(held, mode="less")
    true = torch.einsum("qoi,boi->qb", q, gamma(g, "x"))
    offset = torch.einsum("qoi,oi->q", q, gamma(torch.zeros(1, 3, 4), "x")[0])
    found = torch.einsum("qoi,boi->qb", frozen(q, "x"), g) + offset[:, None]
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)


# -- a real training


def slow(checkpoint, rows, mode, projection):
    """One example at a time: autograd through the adapter as peft loads it, Gamma in float64, the same sketch."""
    import peft
    from transformers import AutoModelForCausalLM

    base = json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint, is_trainable=True)
    model.eval()
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    tokenizer, found = load_model(checkpoint).tokenizer, []
    for row in rows:
        example = encode(row, tokenizer)
        labels = [token if kept else -100 for token, kept in zip(example.ids, example.supervised, strict=True)]
        model.zero_grad()
        model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss.backward()
        vector = torch.zeros(1, projection.width)
        for number, (name, weight) in enumerate(trained):
            g, m1, m2 = (x.double() for x in (weight.grad, state[number]["exp_avg"], state[number]["exp_avg_sq"]))
            n1, n2, t = 0.9 * m1 + 0.1 * g, 0.999 * m2 + 0.001 * g * g, state[number]["step"].item() + 1
            if mode == "less":
                f = n1 / torch.sqrt(n2 + 1e-8)
            else:
                f = (n1 / (1 - 0.9**t)) / (torch.sqrt(n2 / (1 - 0.999**t)) + 1e-8)
            layer = name.removeprefix("base_model.model.").removesuffix(".weight")
            vector[:, projection.columns(layer)] += projection.flat(f.float()[None], layer=layer)
        found.append(vector[0])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["count_sketch", "two_sided", "identity"])
@pytest.mark.parametrize("mode", ["less", "torch"])
def test_an_index_equals_a_slow_loop_at_two_checkpoints(lora, tmp_path, mode, name):
    width = {"count_sketch": 64, "two_sided": 4, "identity": None}[name]
    options = ADAM | {"adam_mode": mode, "projection": name, "width": width, "checkpoints": "all"}
    built = index(lora, ROWS[:9], tmp_path / "index", **options)
    model = load_model(lora / "checkpoint-4")
    projection = projection_for(model, IndexSettings(space=GradientSpace(projection=name, width=width)))
    for number, step in enumerate((2, 4)):
        expected = slow(lora / f"checkpoint-{step}", ROWS[:9], mode, projection)
        found = vectors(built, number)
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
        assert torch.allclose(built.store.shard(number, 0).norm, expected.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_moment_moves_the_features_of_its_own_layer_alone(tmp_path, architecture):
    """Every entry of one parameter's first moment is moved; which one, is looked up in the Trainer's own groups."""
    trainer = plain_trainer_run(tmp_path / "run", architecture, 2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    model, batch = load_model(checkpoint), collate([encode(row, load_model(checkpoint).tokenizer) for row in ROWS[:3]])
    layers = model.layers()
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})

    def features():
        gamma = Gamma(read_moments(model, layers), mode="torch")
        return sketch(model, layers, batch, projection, transform=gamma)[0]

    before = features()
    numbers = {id(weight): n for n, weight in enumerate(w for g in trainer.optimizer.param_groups for w in g["params"])}
    for name in layers:
        number = numbers[id(trainer.model.get_submodule(name).weight)]
        moved = torch.rand_like(trainer.model.get_submodule(name).weight) + 0.5
        change(checkpoint, lambda content: content["state"][number]["exp_avg"].add_(moved))  # noqa: B023
        after = features()
        changed = (after != before).any(0)
        assert changed[projection.columns(name)].all(), name
        changed[projection.columns(name)] = False
        assert not changed.any(), name
        wanted = after[:, projection.columns(name)] - before[:, projection.columns(name)]
        towards = (moved if isinstance(layers[name], nn.Linear) else moved.T).flatten()
        assert torch.equal(wanted.sign(), towards.sign().expand_as(wanted)), name  # a larger moment, a larger step
        before = after


def test_the_head_in_chunks_and_examples_in_pieces_change_nothing(tmp_path, monkeypatch):
    plain_trainer_run(tmp_path / "run", "llama", 2)
    model = load_model(tmp_path / "run" / "checkpoint-2")
    layers, batch = model.layers("*"), collate([encode(row, model.tokenizer) for row in ROWS[:5]])
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    gamma = Gamma(read_moments(model, layers), mode="torch")
    whole, _ = sketch(model, layers, batch, projection, transform=gamma)
    exact, _ = gradients(model, layers, batch)
    expected = torch.cat([gamma(exact[name], name).flatten(1) for name in layers], 1)
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr("whence.gradients.capture.LOGITS_PER_CHUNK", {"cpu": 1})
    monkeypatch.setattr("whence.gradients.capture.LEAST_POSITIONS", 7)
    monkeypatch.setattr("whence.gradients.capture.FORMED_ENTRIES", {"cpu": 1})
    parts, _ = sketch(model, layers, batch, projection, transform=gamma)
    assert ((parts - whole).norm() / whole.norm()) < 1e-4
    unit, _ = sketch(model, layers, batch, projection, transform=gamma, normalise="layer")
    assert torch.allclose(unit[:, projection.columns("lm_head")].norm(dim=1), torch.ones(5))


def test_the_view_of_a_layer_used_twice_is_of_the_sum_of_its_uses():
    model = tiny_model("llama")
    model.base.model.layers[1].mlp.up_proj = model.base.model.layers[0].mlp.up_proj
    layers, batch = model.layers("*layers.0.mlp.up_proj"), collate(random_examples(3, seed=5))
    projection = Identity({name: layer_shape(layer) for name, layer in layers.items()})
    (exact,) = gradients(model, layers, batch)[0].values()
    found, _ = sketch(model, layers, batch, projection, transform=lambda gradient, layer: gradient.sign())
    assert torch.equal(found, exact.flatten(1).sign())


# -- an index


def test_the_manifest_says_view_mode_projection_and_the_files_digest(lora, tmp_path):
    built = index(lora, ROWS, tmp_path / "index", view="adam", progress=False)
    space = built.store.manifest.settings["space"]
    assert (space["view"], space["adam_mode"], space["projection"]) == (
        "adam",
        "torch",
        catalogue.default_projection("adam"),
    )
    assert built.store.manifest.width == flat_width(
        {name: layer_shape(layer) for name, layer in built.layers(built.model()).items()}
    )
    assert len(built.store.manifest.checkpoints[0]["moments"]) == 64
    assert open_index(tmp_path / "index").space == GradientSpace(view="adam", projection="count_sketch")
    plain = index(lora, ROWS, tmp_path / "plain", progress=False)
    assert "adam_mode" not in plain.store.manifest.settings["space"]
    assert plain.store.manifest.settings["space"]["projection"] == catalogue.default_projection("sgd")
    assert "moments" not in plain.store.manifest.checkpoints[0]


def test_stopped_builds_and_appends_resume_to_the_same_bytes(lora, tmp_path, small_parts, monkeypatch):
    options = ADAM | {"checkpoints": "all"}
    index(lora, ROWS, tmp_path / "whole", **options)
    append(tmp_path / "whole", corpus_rows(18, first=20), progress=False)
    for calls in (0, 1, 2):
        with monkeypatch.context() as patch:
            cut_short(patch, "add_shard", calls)
            with pytest.raises(KeyboardInterrupt):
                index(lora, ROWS, tmp_path / "stopped", **options)
    index(lora, ROWS, tmp_path / "stopped", **options)
    with monkeypatch.context() as patch:
        cut_short(patch, "add_shard", 2)
        with pytest.raises(KeyboardInterrupt):
            append(tmp_path / "stopped", corpus_rows(18, first=20), progress=False)
    append(tmp_path / "stopped", corpus_rows(18, first=20), progress=False)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_another_optimizer_file_is_refused_and_rows_stay(copy, tmp_path):
    index(copy, ROWS, tmp_path / "index", **ADAM)
    before = contents(tmp_path / "index")
    change(copy / "checkpoint-4", lambda content: content["state"][0]["exp_avg"].mul_(2))
    with pytest.raises(ManifestMismatchError, match=r"the model is .*moments .* there"):
        index(copy, ROWS, tmp_path / "index", **ADAM)
    with pytest.raises(ManifestMismatchError, match="its optimizer file has digest"):
        append(tmp_path / "index", corpus_rows(5, first=20), progress=False)
    with pytest.raises(ManifestMismatchError, match=r'--adam-mode is "torch" there, "less" here'):
        index(copy, ROWS, tmp_path / "index", **ADAM | {"adam_mode": "less"})
    (copy / "checkpoint-4" / "optimizer.pt").unlink()
    found = trace(tmp_path / "index", "5 and 3?", " yes", null=False)  # queries need no moments
    assert len(found.hits) == 20
    assert contents(tmp_path / "index") == before


@pytest.mark.parametrize("harm", ["gone", "of another model"])
def test_moments_that_cannot_be_used_are_told_before_anything_is_written(copy, tmp_path, harm):
    if harm == "gone":
        (copy / "checkpoint-2" / "optimizer.pt").unlink()
    else:
        change(copy / "checkpoint-4", lambda content: content["state"].update({0: {"exp_avg": torch.zeros(1)}}))
    with pytest.raises(ModelError, match="--view sgd needs no optimizer file"):
        index(copy, ROWS, tmp_path / "index", checkpoints="all", **ADAM)
    assert not (tmp_path / "index").exists()


def test_queries_are_plain_gradients_under_the_view_adam(lora, tmp_path):
    options = {"projection": "count_sketch", "width": 64, "codec": "float32", "progress": False}
    plain = index(lora, ROWS, tmp_path / "plain", **options)
    built = index(lora, ROWS, tmp_path / "adam", view="adam", **options)
    asked = encode_queries([Query("5 and 3?", " yes"), Query("6 and 2?", " no")], built.model(), kind=built.layout)
    queries = [query_vectors(opened, [one.sequences for one in asked]) for opened in (plain, built)]
    assert torch.equal(*queries)
    scores = {hit.id: hit.score for hit in trace(built, "5 and 3?", " yes", method="dot", top=20, null=False).hits}
    expected = vectors(built) @ queries[1][0, 0]
    for number, row in enumerate(ROWS):
        assert scores[row["id"]] == pytest.approx(expected[number].item(), rel=1e-4, abs=1e-6)


def test_an_adam_index_can_be_timed(lora):
    sizes = {"batch_size": 4, "length": 16, "batches": 2, "memory": False}
    assert bench(lora, ROWS, view="adam", width=64, **sizes).width == 64


def test_adam_takes_every_projection_by_name(lora, tmp_path):
    for name in catalogue.PROJECTIONS:
        options = {"width": None} if name == "identity" else {"width": 16}
        built = index(lora, ROWS[:4], tmp_path / name, view="adam", projection=name, progress=False, **options)
        assert torch.isfinite(vectors(built)).all()
