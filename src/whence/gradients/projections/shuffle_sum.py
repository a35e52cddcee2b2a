"""RapidIn's compression: shuffle the whole flattened vector, flip signs at random, add up groups.

The vector of all layers, padded with zeros to D, goes through 2 lambda shuffles (lambda = 20): D is factored into
primes, their order is shuffled, and a random quarter to half of them is multiplied to d. At even steps the vector, as a
matrix of d rows, has its rows permuted; at odd steps, as a matrix of d columns, its columns. Then v *= r with random
signs r, and groups of D / k neighbours are added. Inner products are unbiased over the signs, unscaled.

The map is linear and every entry ends in one bin, so it is stored as one bin and one sign per entry, and each layer
fills in its own entries: the same numbers as shuffling the whole vector, without ever holding it.

It is here for comparisons. The shuffles move blocks, not entries: where D is a power of two, 40 of them act as
one permutation of rows and one of columns, blocks of neighbours stay together, and padding does not spread
(research/less_rapidin.md, 2.3). `count_sketch` and `sjlt` have neither fault.

It differs from the released code in that D is the next power of two below 2^24 (above, a multiple of 2^24, as theirs),
the seed can be chosen, and sums are fp32.

Cost: t d and d scattered additions per layer, five bytes of memory per weight.
Source: Lin et al. 2024, RapidIn, https://arxiv.org/abs/2405.11724, section 4.2. Written from the description.
"""

import functools
import math

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from whence.errors import SettingError
from whence.gradients.capture import example_gradients
from whence.gradients.protocols import Shapes
from whence.numerics import generator, signs

PADDING = 2**24


class ShuffleSum:
    """A sketch of `width` numbers in all, by default 65,536; the width must divide the padded length."""

    forms_gradient = True

    def __init__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0, rounds: int = 20):
        self.rounds = rounds  # lambda
        self.width = 65536 if width is None else width
        self.seed = seed
        self._first: dict[str, int] = {}
        self.length = 0
        for layer, shape in shapes.items():
            self._first[layer] = self.length
            self.length += math.prod(shape)
        self.padded = padded_length(max(self.length, self.width))
        if self.padded % self.width:
            raise SettingError(
                f"--width {self.width}: shuffle_sum needs a divisor of its padded length {self.padded}, "
                "such as a power of two"
            )
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def columns(self, layer: str) -> slice:
        """All columns, since layers are added."""
        return slice(0, self.width)

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """The sums in the bins of the layer's entries of the whole vector."""
        return self.flat(example_gradients(a, g), layer=layer)

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same for a gradient that is formed already."""
        flat = gradient.flatten(1)
        bins, sign = self._on(flat.device)
        place = slice(self._first[layer], self._first[layer] + flat.shape[1])
        return flat.new_zeros(len(flat), self.width).index_add_(1, bins[place], flat * sign[place])

    @functools.cached_property
    def _bins_and_signs(self) -> tuple[Int32[Tensor, " d"], Tensor]:
        """Bin and sign of every entry of the whole vector, in its own order."""
        source = shuffled(self.padded, self.rounds, self.seed)  # the entry that ends at each place
        place = torch.empty_like(source).scatter_(0, source, torch.arange(self.padded))[: self.length]
        drawn = signs(self.padded, generator(self.seed, "shuffle_sum", "signs"))
        return (place // (self.padded // self.width)).to(torch.int32), drawn[place]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._by_device:
            bins, sign = self._bins_and_signs
            self._by_device[device] = (bins.to(device), sign.to(device))
        return self._by_device[device]


def padded_length(length: int) -> int:
    """Length after padding: the next power of two up to 2^24, above it the next multiple of 2^24."""
    return 1 << (length - 1).bit_length() if length <= PADDING else -(-length // PADDING) * PADDING


def shuffled(length: int, rounds: int, seed: int) -> Int64[Tensor, " d"]:
    """The entry that ends at each place after `2 * rounds` shuffles of rows and columns."""
    rng = generator(seed, "shuffle_sum", "shuffles")
    primes, v = prime_factors(length), torch.arange(length)
    for step in range(2 * rounds):
        quarter, half = len(primes) // 4, len(primes) // 2
        factors = int(torch.randint(quarter, half + 1, (), generator=rng))
        order = torch.randperm(len(primes), generator=rng).tolist()
        d = math.prod(primes[number] for number in order[:factors])
        permutation = torch.randperm(d, generator=rng)
        v = v.view(d, -1)[permutation, :] if step % 2 == 0 else v.view(-1, d)[:, permutation]
        v = v.reshape(-1)
    return v


def prime_factors(number: int) -> list[int]:
    """Prime factors with multiplicity, ascending.

    >>> prime_factors(360)
    [2, 2, 2, 3, 3, 5]
    """
    factors, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return [*factors, number] if number > 1 else factors
