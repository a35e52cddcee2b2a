"""TensorSketch over blocks: a flat sketch of `sum over t of g_t a_t^T`, as a rule without forming it.

a and g get random signs and are cut into R blocks each, of k1 = i / R and k2 = o / R features (the last is padded with
zeros); a Walsh-Hadamard transform H mixes the blocks, whose order is random. The sketch is R small products,

    z[f] = sum over t of (H g_t)[f] (H a_t)[f]^T / sqrt(R)      f = 1 .. R, each k2 x k1

R k1 k2 = d / R numbers in all. It is the XOR convolution of both sides' blocks: TensorSketch with that group in place
of a circle, and without the last transform, which would change no inner product. Two entries of the gradient meet only
if rows and columns both differ in block and agree inside it: with a chance of at most 1 / ((R - 1) k1 k2), and never
because one side alone was folded, as in `two_sided`. With R = 1 the gradient itself is formed.

The numbers of a layer are added to a window of the row's k columns; windows of many layers overlap, spread evenly. If
there are more than k, pieces of k are rotated at random, as in `count_sketch`. Over seeds, inner products are unbiased;
the variance is about (|x|^2 |y|^2 + <x, y>^2) / k of the whole gradient, as of any flat sketch, and for each layer up
to four times its own |x|^2 |y|^2 R / d. Places inside a block do not depend on the seed, so that entries a multiple of
k1 and of k2 apart meet more often than others.

R is chosen by layer, as what takes least time by `cost` and leaves no layer fewer than `LEAST_SHARE` of the columns.
The choice is in an index' manifest. On base-6m it is 4 and 16, and the sketch takes half the time of `count_sketch`;
for layers of 4,096 x 4,096 it is 64, and takes a twenty-fifth.

Cost: t (i + o) R + t d / R multiplications a layer.
Source: Pham and Pagh 2013, TensorSketch, https://doi.org/10.1145/2487575.2487591; Ahle et al. 2020, with Hadamard
transforms, https://arxiv.org/abs/1909.01410.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from whence.errors import SettingError
from whence.gradients.flat_width import flat_width
from whence.gradients.protocols import Shapes
from whence.numerics import generator, hadamard_matrix, product, signs

LEAST_SHARE = 4
"""A layer gets at least k / 4 numbers, if its gradient has as many; at least k / l if there are fewer layers."""
AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Entries of both sides that are mixed at a time: 4 MB on a CPU, in arrays that stay in its caches."""

MULTIPLICATIONS_PER_BYTE = 4
"""Multiplications of a matrix product in the time in which a byte is moved: 50 G/s and 12 GB/s of one CPU core."""
TYPICAL_TOKENS = 128


@dataclass(frozen=True)
class Cut:
    """How a layer's gradient [o i] is cut."""

    o: int
    i: int
    blocks: int
    """R, a power of two."""

    @property
    def rows(self) -> int:
        """k2, outputs in a block."""
        return -(-self.o // self.blocks)

    @property
    def columns(self) -> int:
        """k1, inputs in a block."""
        return -(-self.i // self.blocks)

    @property
    def size(self) -> int:
        """Numbers that are left of the gradient."""
        return self.blocks * self.rows * self.columns

    def cost(self) -> float:
        """Time of a token, in multiplications. Each pass over a side reads and writes it, in fp32.

        >>> [round(Cut(4096, 4096, blocks).cost() / 4096**2, 3) for blocks in (1, 4, 16, 64)]
        [1.391, 0.377, 0.125, 0.084]
        """
        sides = self.blocks * (self.rows + self.columns)
        passes = 1 if self.blocks == 1 else 2  # signs, and the transform
        multiplications = self.size + (self.blocks * sides if self.blocks > 1 else 0)
        moved = 8 * passes * sides + 12 * self.size / TYPICAL_TOKENS
        return multiplications + MULTIPLICATIONS_PER_BYTE * moved


def cheapest(shape: tuple[int, int], least: float) -> Cut:
    """The cut of a layer that takes least time and keeps at least so many numbers; the whole gradient if it has fewer.

    >>> [cheapest(shape, 43008 / 4).blocks for shape in ((256, 256), (688, 256), (4096, 4096), (8, 4096))]
    [4, 16, 64, 1]
    """
    best = Cut(*shape, 1)
    blocks = 2
    while blocks <= min(shape) and (cut := Cut(*shape, blocks)).size >= least:
        best = min(best, cut, key=Cut.cost)
        blocks *= 2
    return best


class _Buffers(threading.local):
    """Memory of one thread that is written again at every call: a CPU has it in its caches, and new memory nowhere."""

    def __init__(self):
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, x: Tensor, name: str, *shape: int) -> Float[Tensor, "..."]:
        """An array of that shape and x's type: in the buffer `name`; a new one if it is large, or not on a CPU."""
        key, size = (name, x.dtype), math.prod(shape)
        if x.device.type != "cpu" or size > AT_ONCE["cpu"]:
            return x.new_empty(shape)
        if key not in self._kept or len(self._kept[key]) < size:
            self._kept[key] = x.new_empty(size)
        return self._kept[key][:size].view(shape)


_BUFFERS = _Buffers()


@dataclass(frozen=True)
class _Side:
    """What is drawn for one side of a layer."""

    sign: Float[Tensor, " n"]
    transform: Float[Tensor, "r r"]
    """H, +1 and -1, with its columns in random order."""
    labels: list[int]
    """Number of each block in that order."""

    @staticmethod
    def draw(features: int, blocks: int, rng: torch.Generator) -> "_Side":
        sign, labels = signs(features, rng).float(), torch.randperm(blocks, generator=rng)
        return _Side(sign, hadamard_matrix(blocks).sign()[:, labels], labels.tolist())

    def to(self, like: Tensor) -> "_Side":
        return _Side(self.sign.to(like), self.transform.to(like), self.labels)

    def mixed(self, x: Float[Tensor, "b t n"], blocks: int, name: str) -> Float32[Tensor, "br t k"]:
        """Signed features with their blocks mixed, block by block. 16 bits hold the signed features, fp32 the sums.

        On a CPU the result is in the buffer `name`, until the next call that names it.
        """
        b, t, n = x.shape
        sign, k = self.sign, -(-n // blocks)
        if blocks == 1:
            return x.float() * sign
        if short := blocks * k - n:
            x, sign = F.pad(x, (0, short)), F.pad(sign, (0, short))
        signed = _BUFFERS.like(x, "signed", b, blocks, t, k)
        torch.mul(x.view(b, t, blocks, k).transpose(1, 2), sign.view(blocks, 1, k), out=signed)
        transform, signed = self.transform.expand(b, blocks, blocks), signed.view(b, blocks, t * k)
        if signed.dtype != torch.float32:
            return product(transform, signed).view(b * blocks, t, k)
        return torch.bmm(transform, signed, out=_BUFFERS.like(x, name, b, blocks, t * k)).view(b * blocks, t, k)


class TensorSketch:
    """A sketch of `width` numbers in all, by default those of `flat_width`.

    Args:
        shapes: Shapes of the traced layers.
        width: k.
        seed: Of the signs, the blocks' order and the rotations.
        blocks: R of each layer, in the layers' order, as in the manifest of an index; None: chosen by cost.
    """

    forms_gradient = False

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0, blocks: Sequence[int] | None = None):
        self.width = flat_width(shapes) if width is None else width
        self.seed = seed
        if blocks is None:
            least = self.width / max(1, min(LEAST_SHARE, len(shapes)))
            self._cuts = {layer: cheapest(shape, least) for layer, shape in shapes.items()}
        else:
            self._cuts = _given(shapes, blocks)
        self._starts = windows(self._cuts, self.width)
        self._sides: dict[tuple[str, torch.device, torch.dtype], tuple[_Side, _Side]] = {}
        self._rotations: dict[str, list[tuple[int, int]]] = {}

    @property
    def blocks(self) -> tuple[int, ...]:
        """R of each layer."""
        return tuple(cut.blocks for cut in self._cuts.values())

    def columns(self, layer: str) -> slice:
        """The layer's window."""
        return slice(self._starts[layer], self._starts[layer] + min(self.width, self._cuts[layer].size))

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float32[Tensor, "b k"]:
        """The R products of mixed blocks, folded if they are more than the columns."""
        cut, (left, right) = self._cuts[layer], self._drawn(layer, a)
        b, r = len(a), cut.blocks
        products = a.new_empty(b * r, cut.rows, cut.columns, dtype=torch.float32)
        entries = AT_ONCE.get(a.device.type, AT_ONCE["cuda"])
        step = max(1, entries // (a.shape[1] * (cut.o + cut.i)))
        for first in range(0, b, step):
            outputs = left.mixed(g[first : first + step], r, "outputs")
            inputs = right.mixed(a[first : first + step], r, "inputs")
            out = products[first * r : first * r + len(outputs)]
            torch.baddbmm(out, outputs.mT, inputs, beta=0, alpha=r**-0.5, out=out)
        return self._folded(products.view(b, cut.size), layer)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same of a gradient that is formed already: its blocks are added up by the XOR of their numbers."""
        cut, (left, right) = self._cuts[layer], self._drawn(layer, gradient)
        b, r = len(gradient), cut.blocks
        signed = gradient * left.sign[:, None] * right.sign
        padded = F.pad(signed, (0, r * cut.columns - cut.i, 0, r * cut.rows - cut.o))
        rows = padded.view(b, r, cut.rows, r, cut.columns).unbind(1)
        sums = gradient.new_zeros(b, r, cut.rows, cut.columns)
        for label, blocks in zip(left.labels, rows, strict=True):
            sums[:, [label ^ other for other in right.labels]] += blocks.transpose(1, 2)
        mixed = hadamard_matrix(r).to(sums) @ sums.flatten(2)
        return self._folded(mixed.flatten(1), layer)

    def _folded(self, numbers: Float[Tensor, "b size"], layer: str) -> Float[Tensor, "b k"]:
        k, size = self.width, numbers.shape[1]
        if size <= k:
            return numbers
        if layer not in self._rotations:
            rng, pieces = generator(self.seed, "tensor_sketch", layer, "rotations"), -(-size // k)
            offsets = torch.randint(k, (pieces,), generator=rng)
            self._rotations[layer] = [*zip(offsets.tolist(), signs(pieces, rng).tolist(), strict=True)]
        out = numbers.new_zeros(len(numbers), k)
        for piece, (offset, sign) in zip(numbers.split(k, 1), self._rotations[layer], strict=True):
            before, after = piece[:, : k - offset], piece[:, k - offset :]  # the rotation wraps round between them
            out[:, offset : offset + before.shape[1]].add_(before, alpha=sign)
            out[:, : after.shape[1]].add_(after, alpha=sign)
        return out

    def _drawn(self, layer: str, like: Tensor) -> tuple[_Side, _Side]:
        """What is drawn for the outputs' and the inputs' side of a layer."""
        key = (layer, like.device, like.dtype)
        if key not in self._sides:
            cut, rng = self._cuts[layer], generator(self.seed, "tensor_sketch", layer)
            left, right = (_Side.draw(features, cut.blocks, rng) for features in (cut.o, cut.i))
            self._sides[key] = left.to(like), right.to(like)
        return self._sides[key]


def _given(shapes: Shapes, blocks: Sequence[int]) -> dict[str, Cut]:
    if len(blocks) != len(shapes):
        raise SettingError(f"blocks {list(blocks)}: one number for each of {len(shapes)} layers is expected")
    cuts = {layer: Cut(*shape, number) for (layer, shape), number in zip(shapes.items(), blocks, strict=True)}
    for layer, cut in cuts.items():
        if cut.blocks & (cut.blocks - 1) or not 0 < cut.blocks <= min(cut.o, cut.i):
            raise SettingError(f"blocks {cut.blocks}: {layer} takes a power of two up to {min(cut.o, cut.i)}")
    return cuts


def windows(cuts: Mapping[str, Cut], k: int) -> dict[str, int]:
    """First column of each layer's window: in the layers' order, where least lies so far.

    >>> windows({"a": Cut(4, 4, 1), "b": Cut(4, 4, 1), "c": Cut(2, 4, 1)}, 40)
    {'a': 0, 'b': 16, 'c': 32}
    """
    load = torch.zeros(k, dtype=torch.float64)
    starts = {}
    for layer, cut in cuts.items():
        size = min(k, cut.size)
        before = F.pad(load.cumsum(0), (1, 0))
        candidates = torch.arange(0, k - size + 1, 8)
        loads = (before[candidates + size] - before[candidates]).mul(1e9).round()  # ties go to the first
        starts[layer] = start = int(candidates[loads.argmin()])
        load[start : start + size] += 1 / size
    return starts
