"""Patterns that leave layers out."""

import fnmatch

from hypothesis import given
from hypothesis import strategies as st

from whence.models.layers import leaving_out

NAMES = [f"model.layers.{n}.{part}.{name}" for n in range(3) for part in ("attn", "mlp") for name in ("q_proj", "proj")]


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sets(st.sampled_from(NAMES)))
def test_patterns_leave_out_all_bad_layers_and_no_good_one(bad, called):
    patterns = leaving_out(bad, called - bad).split(",")
    left_out = {name for pattern in patterns for name in fnmatch.filter(NAMES, pattern.removeprefix("!"))}
    assert left_out >= bad
    assert not left_out & (called - bad)
    assert len(patterns) <= len(bad)
