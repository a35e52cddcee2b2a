"""Which texts say the same."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whence.errors import SettingError
from whence.selection.duplicates import ChosenTexts, _bands, _signature, band_rows, jaccard, normalised, shingles


def kept(threshold, *texts):
    """Texts kept as rows 0, 1, ..., whatever they repeat."""
    chosen = ChosenTexts(threshold)
    for row, text in enumerate(texts):
        chosen.add(row, chosen.fingerprint(text))
    return chosen


def twin(chosen, text):
    return chosen.twin(chosen.fingerprint(text))


def test_texts_equal_but_for_spaces_and_capitals_are_duplicates():
    found = kept(1.0, "The  heron\nnests.", "STRASSE", "")
    assert twin(found, " the heron NESTS. ") == 0
    assert twin(found, "Straße") == 1
    assert twin(found, " \t") == 2
    assert twin(found, "The heron nests") is None


def test_similarity_worked_by_hand():
    """`abcdefgh` has 4 stretches of 5 characters, `abcdefghi` those and one more: 4 of 5."""
    first, second = shingles("abcdefgh"), shingles("abcdefghi")
    assert (len(first), len(second)) == (4, 5)
    assert jaccard(first, second) == pytest.approx(0.8)
    assert twin(kept(0.8, "abcdefgh"), "abcdefghi") == 0
    assert twin(kept(0.81, "abcdefgh"), "abcdefghi") is None


def test_threshold_decides_and_the_first_twin_is_named():
    story = "Once upon a time a heron nested in an old willow by the water, and nobody minded it at all."
    edited = story.replace("nobody", "no one")
    other = "A heap of apples was sold at the market on Tuesday morning for less than it had cost."
    found = kept(0.7, other, story, story.upper())
    assert twin(found, edited) == 1
    assert twin(kept(0.95, story), edited) is None
    assert twin(found, "Once upon a time there was a king.") is None


def test_short_and_strange_texts_have_one_stretch_or_more():
    for text in ("", "a", "abcd", "日本", "\ud800"):
        assert len(shingles(text)) == 1
    assert len({int(shingles(text)[0]) for text in ("a", "b", "ab", "ba", "日")}) == 5
    japanese = "鷺は柳の木に巣を作り、水辺で魚を待っている。" * 2
    assert twin(kept(0.8, japanese), japanese[:-1] + "!") == 0


def test_shingles_of_a_text_are_its_different_stretches():
    rng = random.Random(0)
    text = "".join(rng.choice("ab c") for _ in range(3000))
    assert len(shingles(text)) == len({text[place : place + 5] for place in range(len(text) - 4)})
    every = "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(200_000))
    assert len(shingles(every)) == len({every[place : place + 5] for place in range(len(every) - 4)})


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_pairs_at_the_threshold_are_found(threshold):
    """Of 2,000 pairs of sets with just this similarity at most 8 are missed (2 are expected)."""
    rng = np.random.default_rng(0)
    size = 90
    common = round(2 * size * threshold / (1 + threshold))
    missed = 0
    for _ in range(2000):
        drawn = np.unique(rng.integers(0, 2**63, size=4 * size, dtype=np.uint64))
        rng.shuffle(drawn)
        one, two = drawn[:size], np.concatenate([drawn[:common], drawn[size : 2 * size - common]])
        bands = [set(_bands(_signature(some), band_rows(threshold))) for some in (one, two)]
        missed += not bands[0] & bands[1]
    assert missed <= 8


def test_signature_estimates_the_similarity():
    """Share of equal least values of 128, over 200 pairs of similarity 1/3: within four standard errors."""
    rng, share = np.random.default_rng(1), []
    for _ in range(200):
        drawn = np.unique(rng.integers(0, 2**63, size=150, dtype=np.uint64))
        rng.shuffle(drawn)
        share.append((_signature(drawn[:60]) == _signature(drawn[30:90])).mean())
    assert np.mean(share) == pytest.approx(1 / 3, abs=4 * (2 / 9 / 128 / 200) ** 0.5)


@given(st.text(max_size=40), st.text(max_size=40))
def test_twins_are_just_the_texts_at_or_above_the_threshold(one, two):
    """What is called a duplicate is one; equal texts always are."""
    known = kept(0.6, one)
    if normalised(one) == normalised(two):
        assert twin(known, two) == 0
    elif twin(known, two) is not None:
        assert jaccard(shingles(normalised(one)), shingles(normalised(two))) >= 0.6


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1])
def test_threshold_is_a_similarity(threshold):
    with pytest.raises(SettingError, match="--duplicates"):
        ChosenTexts(threshold)
