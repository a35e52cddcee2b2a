"""The width of a flat sketch follows the size of the model."""

import pytest

from whence import catalogue
from whence.gradients.flat_width import FLAT, MEASURED, MEASURED_WEIGHTS, flat_width


def shapes(weights, layers=4):
    return {f"layer {number}": (weights // layers, 1) for number in range(layers)}


@pytest.mark.parametrize(
    ("weights", "width"), [(4743168, 43008), (16 * 4743168, 2 * 43008), (10**9, 163840), (8 * 10**9, 275456)]
)
def test_sixteen_times_the_weights_are_twice_the_numbers(weights, width):
    assert flat_width(shapes(weights)) == width


def test_a_width_is_whole_registers_of_bits_and_no_more_than_the_weights():
    widths = [flat_width(shapes(4 * 2**power)) for power in range(30)]
    assert widths == sorted(widths) and widths[0] == 4
    assert all(width % 512 == 0 for width in widths if width >= MEASURED)
    assert flat_width({"all": (MEASURED_WEIGHTS, 1)}) == MEASURED


@pytest.mark.parametrize(("weights", "width"), [(40000, 40000), (43012, 43008), (430000, 43008), (4 * 10**6, 43008)])
def test_a_smaller_model_has_no_fewer_numbers_than_the_measured_one(weights, width):
    assert flat_width(shapes(weights)) == width


@pytest.mark.parametrize("name", FLAT)
def test_flat_sketches_take_it_and_are_stored_in_one_bit(name):
    layers = {"one": (48, 64), "two": (64, 48)}
    assert catalogue.projection(name)(layers).width == flat_width(layers)
    assert catalogue.projection_entry(name).codec == "onebit"
    assert {*catalogue.DEFAULT_PROJECTIONS.values()} <= {*FLAT}
