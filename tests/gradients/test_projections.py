"""The contract of every projection in the catalogue. A new one is tested by its line there."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from whence import catalogue
from whence.errors import SettingError
from whence.gradients.capture import example_gradients
from whence.gradients.projections import count_sketch, tensor_sketch
from whence.gradients.projections.shuffle_sum import ShuffleSum, shuffled
from whence.gradients.projections.tensor_sketch import TensorSketch
from whence.gradients.protocols import Projection
from whence.numerics import generator, hadamard, mixed_seed, signs

SHAPES = {"first": (6, 5), "second": (4, 9)}
WIDTHS = {
    "two_sided": 4,
    "sjlt": 16,
    "count_sketch": 16,
    "tensor_sketch": 16,
    "srht": 16,
    "rademacher": 16,
    "shuffle_sum": 16,
}
NAMES = list(catalogue.PROJECTIONS)
SEEDS = 2000


BLOCKS = (2, 4)
"""Of `tensor_sketch`, by layer of SHAPES: one has more numbers than columns, the other a window and a padded side."""

MODEL = {"q": (256, 256), "k": (256, 256), "v": (256, 256), "o": (256, 256)}
MODEL |= {"gate": (688, 256), "up": (688, 256), "down": (256, 688)}


def make(name, seed=0, shapes=SHAPES):
    blocks = {"blocks": BLOCKS} if name == "tensor_sketch" and shapes is SHAPES else {}
    return catalogue.projection(name)(shapes, width=WIDTHS.get(name), seed=seed, **blocks)


def pairs(seed, shapes=SHAPES, b=3, t=4):
    rng = torch.Generator().manual_seed(seed)
    return {
        layer: (torch.randn(b, t, i, generator=rng), torch.randn(b, t, o, generator=rng))
        for layer, (o, i) in shapes.items()
    }


def whole(projection, seen):
    """Sketch of the whole gradient: every layer's block in its columns, added."""
    b = next(iter(seen.values()))[0].shape[0]
    rows = torch.zeros(b, projection.width)
    for layer, (a, g) in seen.items():
        rows[:, projection.columns(layer)] += projection(a, g, layer=layer)
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_catalogue_entry_is_a_projection_with_its_width(name):
    projection = make(name)
    assert isinstance(projection, Projection)
    assert whole(projection, pairs(0)).shape == (3, projection.width)


@pytest.mark.parametrize("entries", [1, 100, 10**6])
@pytest.mark.parametrize("d", [1, 15, 16, 17, 200])
def test_a_count_sketch_by_looking_up_is_that_by_folding(d, entries, monkeypatch):
    monkeypatch.setattr(count_sketch, "GATHERED_ENTRIES", entries)
    projection, flat = make("count_sketch"), torch.randn(3, d, 1)
    offsets, sign = projection._hash("any", flat.flatten(1))
    looked_up = projection._gathered(flat.flatten(1), torch.tensor(offsets), sign)
    torch.testing.assert_close(looked_up, projection.flat(flat, layer="any"))


@pytest.mark.parametrize("side", [3, 4])
def test_two_sided_of_16_bits_is_that_of_the_same_numbers_in_32(side):
    seen = {layer: (a.bfloat16(), g.bfloat16()) for layer, (a, g) in pairs(3).items()}
    projection = catalogue.projection("two_sided")(SHAPES, width=side)
    found, expected = (
        whole(projection, seen),
        whole(projection, {x: (a.float(), g.float()) for x, (a, g) in seen.items()}),
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_tensor_sketch_of_16_bits_is_that_of_the_same_numbers_in_32():
    seen = {layer: (a.bfloat16(), g.bfloat16()) for layer, (a, g) in pairs(3).items()}
    widened = {layer: (a.float(), g.float()) for layer, (a, g) in seen.items()}
    for blocks in ((1, 1), BLOCKS):
        projection = TensorSketch(SHAPES, width=16, blocks=blocks)
        torch.testing.assert_close(whole(projection, seen), whole(projection, widened))


def test_a_tensor_sketch_a_few_examples_at_a_time_is_the_same(monkeypatch):
    seen = pairs(3)
    expected = whole(make("tensor_sketch"), seen)
    monkeypatch.setitem(tensor_sketch.AT_ONCE, "cpu", 100)
    torch.testing.assert_close(whole(make("tensor_sketch"), seen), expected)


@pytest.mark.parametrize("blocks", [(1, 1), BLOCKS])
def test_a_tensor_sketch_stays_as_it_is_when_the_next_is_made(blocks):
    projection, (layer, (o, i)) = TensorSketch(SHAPES, width=10**4, blocks=blocks), next(iter(SHAPES.items()))
    a, g = torch.randn(3, 4, i), torch.randn(3, 4, o)
    first = projection(a, g, layer=layer)
    before = first.clone()
    projection(torch.ones(3, 4, i), torch.ones(3, 4, o), layer=layer)
    torch.testing.assert_close(first, before, rtol=0, atol=0)
    torch.testing.assert_close(first, projection.flat(g.mT @ a, layer=layer))


def test_tensor_sketches_in_several_threads_are_those_of_one():
    projection, (layer, (o, i)) = make("tensor_sketch"), next(iter(SHAPES.items()))
    seen = [(torch.randn(3, 50, i), torch.randn(3, 50, o)) for _ in range(40)]
    expected = [projection(a, g, layer=layer) for a, g in seen]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda pair: projection(*pair, layer=layer), seen))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("blocks", "error"), [((2,), "2 layers"), ((2, 3), "up to 4"), ((8, 2), "up to 5")])
def test_blocks_that_do_not_fit_the_layers_are_refused(blocks, error):
    with pytest.raises(SettingError, match=error):
        TensorSketch(SHAPES, blocks=blocks)


def test_windows_of_a_tensor_sketch_spread_over_all_columns():
    """The columns of 42 layers, as of a small model, bear within a tenth of the same load."""
    shapes = {f"{block}.{name}": shape for block in range(6) for name, shape in MODEL.items()}
    projection, load = TensorSketch(shapes, width=43008), torch.zeros(43008)
    for layer, (o, i) in shapes.items():
        columns = projection.columns(layer)
        assert columns.stop <= 43008 and columns.stop - columns.start == o * i // projection._cuts[layer].blocks
        load[columns] += 1 / (columns.stop - columns.start)
    assert load.square().mean() < 1.1 * load.mean() ** 2


def test_a_layer_alone_fills_the_columns_of_a_tensor_sketch():
    assert TensorSketch({"head": (4096, 256)}, width=43008).columns("head") == slice(0, 43008)
    assert TensorSketch({"head": (16, 8)}).blocks == (1,)


@pytest.mark.parametrize(("blocks", "width", "bound"), [(4, None, 4 * 4 / 480), (1, 16, 3 / 16), (4, 16, 3 / 16)])
def test_a_tensor_sketch_has_the_variance_that_it_states(blocks, width, bound):
    """Of |x|^2 |y|^2: 4 R / d where every number has a column, about 1 / k where they share; also if a row is heavy."""
    rng = torch.Generator().manual_seed(0)
    for weight in (1, 50):
        a, g = torch.randn(2, 3, 24, generator=rng), torch.randn(2, 3, 20, generator=rng)
        g[..., 3] *= weight
        x, y = example_gradients(a, g).flatten(1)
        made = [TensorSketch({"one": (20, 24)}, width=width, seed=seed, blocks=(blocks,)) for seed in range(100)]
        rows = torch.stack([projection(a, g, layer="one") for projection in made])
        errors = (rows[:, 0] * rows[:, 1]).sum(1) - x @ y
        assert errors.square().mean() < bound * x.square().sum() * y.square().sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("name", NAMES)
def test_the_same_map_on_a_gpu(name):
    seen = pairs(2)
    expected, projection = whole(make(name), seen), make(name)
    there = {layer: (a.cuda(), g.cuda()) for layer, (a, g) in seen.items()}
    rows = torch.zeros(3, projection.width, device="cuda")
    for layer, (a, g) in there.items():
        rows[:, projection.columns(layer)] += projection(a, g, layer=layer)
    torch.testing.assert_close(rows.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_sketch_whatever_the_order_of_calls(name):
    seen = pairs(1)
    expected = whole(make(name, seed=5), seen)
    other = make(name, seed=5)
    backwards = dict(reversed(seen.items()))
    assert torch.equal(whole(other, backwards), expected)
    assert torch.equal(whole(other, seen), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_other_seed_other_sketch_even_in_the_high_bits(name):
    seen = pairs(1)
    base = whole(make(name, seed=5), seen)
    assert not torch.equal(whole(make(name, seed=6), seen), base)
    assert not torch.equal(whole(make(name, seed=5 + (1 << 32)), seen), base)


@pytest.mark.parametrize("name", NAMES)
def test_sketch_is_linear_and_splits_over_tokens(name):
    projection, (x, y) = make(name), (pairs(2), pairs(3))
    joined = {layer: tuple(torch.cat(two, 1) for two in zip(x[layer], y[layer], strict=True)) for layer in x}
    torch.testing.assert_close(
        whole(projection, joined), whole(projection, x) + whole(projection, y), rtol=1e-4, atol=1e-4
    )
    scaled = {layer: (a, -3 * g) for layer, (a, g) in x.items()}
    torch.testing.assert_close(whole(projection, scaled), -3 * whole(projection, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_formed_gradient_has_the_sketch_of_its_factors(name):
    projection = make(name)
    for layer, (a, g) in pairs(9).items():
        found, expected = projection.flat(example_gradients(a, g), layer=layer), projection(a, g, layer=layer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_row_does_not_depend_on_its_batch(name):
    projection, seen = make(name), pairs(4)
    alone = torch.cat([whole(projection, {k: (a[[n]], g[[n]]) for k, (a, g) in seen.items()}) for n in range(3)])
    torch.testing.assert_close(alone, whole(projection, seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_inner_products_are_unbiased_and_layers_independent(name):
    """Within five standard errors over the seeds: same-layer products, and zero between different layers."""
    seen = pairs(6, b=2)
    blocks = {"within": [], "across": []}
    for seed in range(1 if name == "identity" else SEEDS):
        projection = make(name, seed=seed)
        first, second = (whole(projection, {layer: seen[layer]}) for layer in SHAPES)
        rows = first + second
        blocks["within"].append(rows[0] @ rows[1])
        blocks["across"].append(first[0] @ second[1])
    exact = sum((example_gradients(a, g)[0] * example_gradients(a, g)[1]).sum() for a, g in seen.values())
    for expected, found in ((exact, blocks["within"]), (torch.tensor(0.0), blocks["across"])):
        values = torch.stack(found)
        error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(1e-4)
        assert (values.mean() - expected).abs() <= 5 * error + 1e-4


@pytest.mark.parametrize("name", ["sjlt", "count_sketch", "srht", "rademacher"])
def test_flat_sketches_have_the_variance_that_they_state(name):
    """(|x|^2 |y|^2 + <x, y>^2) / k, at most; also for a gradient whose energy sits in one row or one column."""
    rng = torch.Generator().manual_seed(0)
    for heavy in ("none", "row", "column"):
        a, g = torch.randn(2, 3, 24, generator=rng), torch.randn(2, 3, 20, generator=rng)
        if heavy == "row":
            g[..., 3] *= 50
        if heavy == "column":
            a[..., 3] *= 50
        x, y = example_gradients(a, g).flatten(1)
        rows = [make(name, seed, {"layer": (20, 24)})(a, g, layer="layer") for seed in range(600)]
        errors = torch.stack([row[0] @ row[1] for row in rows]) - x @ y
        bound = (x.square().sum() * y.square().sum() + (x @ y) ** 2) / 16
        assert errors.square().mean() < 1.5 * bound, heavy


def test_no_two_layers_of_a_large_model_share_a_stream():
    layers = [f"model.layers.{n}.{part}" for n in range(100) for part in ("q", "k", "v", "o", "up", "down", "gate")]
    assert len({mixed_seed(0, "sjlt", layer) for layer in layers}) == len(layers)


def test_two_sided_equals_dense_algebra():
    projection, (a, g) = make("two_sided"), pairs(7)["first"]
    left, right = (projection._factor("first", side, like) for side, like in (("left", g), ("right", a)))
    expected = torch.stack([left.T @ gradient @ right for gradient in example_gradients(a, g)]).flatten(1)
    torch.testing.assert_close(projection(a, g, layer="first"), expected, rtol=1e-4, atol=1e-4)


def test_shuffle_sum_equals_shuffling_the_whole_vector():
    """The slow way: concatenate all layers, pad, move every entry to its place, flip signs, add up neighbours."""
    projection = ShuffleSum(SHAPES, width=16, seed=3)
    seen = pairs(8)
    vector = torch.cat([example_gradients(a, g).flatten(1) for a, g in seen.values()], 1)
    padded = torch.cat([vector, torch.zeros(3, projection.padded - vector.shape[1])], 1)
    sign = signs(projection.padded, generator(3, "shuffle_sum", "signs"))
    moved = padded[:, shuffled(projection.padded, 20, 3)] * sign
    expected = moved.view(3, 16, -1).sum(2)
    torch.testing.assert_close(whole(projection, seen), expected, rtol=1e-4, atol=1e-4)


def test_shuffled_is_a_permutation():
    assert sorted(shuffled(48, 20, 0).tolist()) == list(range(48))


@pytest.mark.parametrize("d", [1, 2, 64, 128, 512])
def test_hadamard_equals_its_matrix_and_undoes_itself(d):
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(d))
    matrix = torch.tensor([[(-1.0) ** bin(r & c).count("1") for c in range(d)] for r in range(d)]) / d**0.5
    torch.testing.assert_close(hadamard(x), x @ matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-4, atol=1e-4)
