"""Evidence of rows against a weight difference: a slow loop of autograd, parts that go on, refusals."""

import pytest
import torch

from conftest import byte_tokenizer, corpus_rows
from whence.corpus.reading import open_corpus
from whence.corpus.tokens import encode
from whence.errors import ChecksumError, ManifestMismatchError, SettingError
from whence.gradients.space import GradientSpace
from whence.indexing.vectors import IndexSettings, projection_for
from whence.models.loading import LoadedModel
from whence.recovery.evidence import ROWS_PER_PART, direction_by_layer, gather_point, length_of, sketch_of
from whence.storage import Place

ROWS = [*corpus_rows(9), {"id": "nothing", "prompt": "a", "completion": None}]
SETTINGS = IndexSettings(space=GradientSpace(projection="count_sketch", width=64), tokens_per_batch=64)


def worded(architecture):
    """A tiny model that reads text."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    config = t.LlamaConfig(**sizes, intermediate_size=24) if architecture == "llama" else t.GPT2Config(**sizes)
    model = t.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
    return LoadedModel(model=model, tokenizer=byte_tokenizer(), path=architecture)


def drawn(model, seed=0):
    """A random direction by parameter."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=rng) for name, weight in model.model.named_parameters()}


def gathered(model, place, rows=None, settings=SETTINGS, seeds=(0, 1)):
    layers = model.layers(settings.space.layers)
    targets = {f"t{seed}": direction_by_layer(model, layers, drawn(model, seed)) for seed in seeds}
    return gather_point(
        model,
        open_corpus(rows or ROWS),
        targets,
        rows=len(rows or ROWS),
        work=Place.at(place),
        settings=settings,
        provenance={"point": 1},
    )


def by_autograd(model, row):
    """Gradient of every parameter, by its name, of one row alone."""
    row = encode(row, model.tokenizer)
    ids = torch.tensor([row.ids])
    labels = ids.masked_fill(~torch.tensor([row.supervised]), -100)
    for weight in model.model.parameters():
        weight.requires_grad_(True)
    loss = model.model(input_ids=ids, labels=labels, use_cache=False).loss
    found = torch.autograd.grad(loss, list(model.model.parameters()), allow_unused=True)
    for weight in model.model.parameters():
        weight.requires_grad_(False)
    names = [name for name, _ in model.model.named_parameters()]
    return float(loss.detach()), dict(zip(names, found, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_evidence_is_that_of_single_gradients(architecture, tmp_path):
    model = worded(architecture)
    found = gathered(model, tmp_path)
    layers, projection = model.layers(), projection_for(model, SETTINGS)
    names = {id(weight): name for name, weight in model.model.named_parameters()}
    for number, row in enumerate(ROWS[:-1]):
        loss, gradients = by_autograd(model, row)
        own = {layer: gradients[names[id(module.weight)]] for layer, module in layers.items()}
        assert float(found.loss[number]) == pytest.approx(loss, rel=1e-4)
        norm = torch.stack([gradient.norm() for gradient in own.values()]).norm()
        assert float(found.norm[number]) == pytest.approx(float(norm), rel=1e-4)
        for seed in (0, 1):
            direction = drawn(model, seed)
            expected = torch.stack([(own[layer] * direction[names[id(layers[layer].weight)]]).sum() for layer in own])
            scale = float(expected.abs().max())
            torch.testing.assert_close(found.dots[f"t{seed}"][:, number], expected, rtol=1e-4, atol=1e-4 * scale)
        sketch = torch.zeros(projection.width)
        for layer, module in layers.items():
            laid = own[layer] if isinstance(module, torch.nn.Linear) else own[layer].T
            sketch[projection.columns(layer)] += projection.flat(laid[None], layer=layer)[0]
        held = found.vectors(torch.tensor([number]))[0]
        torch.testing.assert_close(held, sketch, rtol=0.01, atol=0.01 * float(sketch.abs().max()))


def test_cosines_and_what_cannot_be_used(tmp_path):
    model = worded("llama")
    found = gathered(model, tmp_path)
    assert found.usable.tolist() == [True] * 9 + [False]
    target = direction_by_layer(model, model.layers(), drawn(model))
    length = length_of(target, target)
    assert length == pytest.approx(float(torch.cat([part.flatten() for part in target.values()]).norm()), rel=1e-5)
    expected = found.dots["t0"].sum(0)[:9] / found.norm[:9] / length
    assert torch.allclose(found.cosine("t0", length)[:9], expected) and found.cosine("t0", length)[9] == 0
    other = projection_for(model, SETTINGS)
    by_hand = torch.stack([other.flat(target[layer][None], layer=layer)[0] for layer in target]).sum(0)
    torch.testing.assert_close(sketch_of(target, model, SETTINGS), by_hand)


def test_parts_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.recovery.evidence.ROWS_PER_PART", 4)
    model = worded("llama")
    whole = gathered(model, tmp_path / "whole")
    calls = []
    from whence.recovery import evidence

    made = evidence.Pass.rows

    def stop(self, encoded, tick):
        calls.append(len(encoded))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(self, encoded, tick)

    monkeypatch.setattr(evidence.Pass, "rows", stop)
    with pytest.raises(KeyboardInterrupt):
        gathered(model, tmp_path / "cut")
    names = ["evidence.json", "part-00000.json", "part-00000.safetensors"]
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == names
    again = gathered(model, tmp_path / "cut")
    assert calls == [4, 4, 4, 2], "the first part was kept"
    for name in ("loss", "norm"):
        assert torch.equal(getattr(whole, name)[:9], getattr(again, name)[:9])
    rows = torch.tensor([8, 0, 5])
    assert torch.equal(whole.vectors(rows), again.vectors(rows))
    assert torch.equal(whole.vectors(torch.arange(10))[rows], whole.vectors(rows))


def test_a_directory_of_other_evidence_is_refused(tmp_path):
    model = worded("llama")
    gathered(model, tmp_path)
    other = IndexSettings(space=GradientSpace(projection="count_sketch", width=32))
    with pytest.raises(ManifestMismatchError, match="evidence is of another space"):
        gathered(model, tmp_path, settings=other)
    with pytest.raises(ManifestMismatchError, match="another targets"):
        gathered(model, tmp_path, seeds=(0, 2))


def test_a_target_needs_every_layer(tmp_path):
    model = worded("llama")
    with pytest.raises(SettingError, match="has no matrix for the layer"):
        gather_point(
            model,
            open_corpus(ROWS),
            {"t": {}},
            rows=len(ROWS),
            work=Place.at(tmp_path),
            settings=SETTINGS,
            provenance={},
        )
    assert ROWS_PER_PART == 512


def test_damaged_evidence_is_refused(tmp_path):
    model = worded("llama")
    for name in ("part-00000.safetensors", "part-00000.json", "evidence.json"):
        gathered(model, tmp_path / name)
        file = tmp_path / name / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 8
        file.write_bytes(data)
        with pytest.raises(ChecksumError, match=rf"{name} is not what was written .*run the same command again"):
            gathered(model, tmp_path / name)
