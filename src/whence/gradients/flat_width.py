"""Numbers in a flat sketch of a model's gradient, by the model's size.

    k = 43,008 max(1, d / 4,743,168)^(1/4), to the nearest multiple of 512, and at most d      d = traced weights

The noise of a cosine is about sqrt(pi / 2 / k) in one bit a number, whatever the size of the model (Johnson and
Lindenstrauss). What the noise is held against shrinks: gradients of a larger model have more directions, and rows lie
further apart in them. The constant was measured on a model of 4.7 million traced weights, where k numbers in one bit
keep nine of the exact first ten (docs/results/indexing.md). The fourth root is a choice, not a measurement: it doubles
k for a model sixteen times as large. Smaller models get no fewer numbers: by the root alone the demo's model, of 0.4
million traced weights, had 23,552, which kept .36 of its exact first ten; 43,008 keep .47. Numbers in one bit, and 1
million rows:

    traced weights       k       bytes a row    1 M rows
    to 4.7 million     43,008         5,376       5.4 GB
    1 billion         163,840        20,480        20 GB
    8 billion         275,456        34,432        34 GB

(`two_sided` 16 in bfloat16, the default of old, takes 512 bytes a layer: 57 KB for a model of 1 B with 112 layers.)
"""

import math

from whence.gradients.protocols import Shapes

FLAT = ("tensor_sketch", "count_sketch")
"""Projections of so many numbers where nobody says otherwise."""
MEASURED = 43008
"""k that was measured."""
MEASURED_WEIGHTS = 4743168
"""Traced weights of the model on which it was."""
MULTIPLE = 512
"""Bits of a vector register: rows in one bit are whole ones."""


def flat_width(shapes: Shapes) -> int:
    """Width k for the layers of these shapes.

    >>> flat_width({"layer": (4096, 1152)}), flat_width({"layer": (32768, 32768)}), flat_width({"layer": (8, 4)})
    (43008, 166912, 32)
    """
    weights = sum(math.prod(shape) for shape in shapes.values())
    exact = MEASURED * max(1, weights / MEASURED_WEIGHTS) ** 0.25
    return min(weights, MULTIPLE * round(exact / MULTIPLE))
