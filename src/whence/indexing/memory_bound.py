"""The tokens of a pass that a bound on memory allows, found by the passes themselves.

What a pass takes depends on the model's code and on what allocators keep, so it is measured: the largest passes of a
few powers of two of tokens, from the fewest on, as long as the next is expected to stay below the bound too. The
process then has not gone over the bound to find it. Fewer tokens are no slower on a CPU; rows longer than a pass are
each a pass of their own, so that the longest row is the least there is.
"""

import math

from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.indexing.pilot import Pilot, Sample
from whence.indexing.vectors import batch_tokens
from whence.sizes import shown_size

GROWTH = 1.1
"""Growth of a long build's memory over that of the first passes, at most: allocators keep pieces of many sizes."""
ROOM = 2**24
"""Bytes for the rest: the part's rows, its file."""


def expected_peak(pilot: Pilot, measured: int) -> int:
    """Peak of a build, in bytes, from that of its largest passes alone."""
    return round(pilot.start + GROWTH * (measured - pilot.start)) + ROOM


def bounded(pilot: Pilot, sample: Sample, memory: int) -> int:
    """Most tokens of a pass under which a build stays below `memory` bytes: a power of two, or those that are set.

    Raises:
        SettingError: The longest row alone takes more.
    """
    examples = pilot.tokenised(sample.widest)
    most = batch_tokens(pilot.settings, pilot.model.device)
    tokens, fitting = least_tokens(examples, most), 0
    before, peak_before = 0, pilot.start
    while True:
        peak = pilot.peak(examples, tokens)
        if (expected := expected_peak(pilot, peak)) > memory:
            break
        fitting, following = tokens, min(most, 2 * tokens)
        growth = (peak - peak_before) * (following - tokens) / (tokens - before)
        if tokens == most or expected + GROWTH * growth > memory:
            break
        before, peak_before, tokens = tokens, peak, following
    if not fitting:
        _refuse(pilot, examples, memory, expected)
    return fitting


def least_tokens(examples: list[Encoded], most: int) -> int:
    """The least power of two that holds the longest example, `most` at most."""
    longest = max((example.positions for example in examples), default=2)
    return min(most, 2 ** math.ceil(math.log2(longest)))


def _refuse(pilot: Pilot, examples: list[Encoded], memory: int, expected: int) -> None:
    longest = max((example.positions for example in examples), default=0)
    remedies = [f"--memory {math.ceil(expected / 1e7) * 10}M"]
    if longest > 64:
        remedies.append(f"a shorter longest row (--max-tokens {longest // 2})")
    if not pilot.settings.gradient_checkpointing:
        remedies.append("--gradient-checkpointing")
    raise SettingError(
        f"--memory {shown_size(memory)}: with the longest row, of {longest:,} tokens, as a pass of its own the build "
        f"takes {shown_size(expected)}, of which {shown_size(pilot.start)} are the loaded model and libraries. To mend "
        f"it: {', or '.join(remedies)}."
    )
