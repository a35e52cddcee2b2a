"""Texts that say the same: equal but for spaces and capitals, or with most of their shingles in common.

Two texts are near duplicates where the Jaccard similarity of their shingles, the sets of 5 characters in a row of the
normalised text, is at least a threshold: |A and B| / |A or B|. Shingles are of characters and not of words, so that
the rule holds for scripts without spaces. Candidates come from MinHash: each of 128 hash functions keeps its least
value over a text's shingles, and the probability that two texts share it is their similarity; rows that agree on all
functions of a band are compared, and their similarity is then computed exactly. No text is called a duplicate that is
not one; of the pairs at the threshold fewer than 1 in 1,000 are missed, above it fewer still.

A text is compared with those that were chosen before, so cost and memory go with the selection, not with the corpus:
128 multiplications for each shingle, and 8 bytes for each shingle of a chosen text.

MinHash is written out here because a library (datasketch) finds the candidates only, and needs the shingles as well.
Source: Broder 1997, On the Resemblance and Containment of Documents, https://doi.org/10.1109/SEQUEN.1997.666900.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from whence.errors import SettingError
from whence.numerics import mixed_seed

CHARACTERS = 5
"""Length of a shingle."""
FUNCTIONS = 128
RECALL = 0.999
"""Share of pairs at the threshold that are found."""
AT_ONCE = 4096
"""Shingles in one array of hashes: 4 MB."""


@dataclass(frozen=True)
class Fingerprint:
    """A text's digest, shingles and bands, by which its duplicates are found."""

    digest: bytes
    shingles: np.ndarray
    bands: list[bytes]


class ChosenTexts:
    """Texts of the rows chosen so far, by row number.

    Args:
        threshold: Similarity from which texts are duplicates; with 1 only texts equal but for spaces and capitals.
    """

    def __init__(self, threshold: float):
        if not 0 < threshold <= 1:
            raise SettingError(f"--duplicates {threshold}: a similarity above 0, at most 1, is expected")
        self.threshold = threshold
        self._by_digest: dict[bytes, int] = {}
        self._by_band: dict[bytes, list[int]] = {}
        self._shingles: dict[int, np.ndarray] = {}

    def fingerprint(self, text: str) -> Fingerprint:
        """A text as `twin` and `add` take it."""
        plain = normalised(text)
        digest = hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()
        if self.threshold == 1:
            return Fingerprint(digest, np.zeros(0, np.uint64), [])
        hashes = shingles(plain)
        return Fingerprint(digest, hashes, _bands(_signature(hashes), band_rows(self.threshold)))

    def twin(self, text: Fingerprint) -> int | None:
        """The first chosen row that a text is a duplicate of."""
        if text.digest in self._by_digest:
            return self._by_digest[text.digest]
        near = {row for band in text.bands for row in self._by_band.get(band, ())}
        alike = (row for row in near if jaccard(text.shingles, self._shingles[row]) >= self.threshold)
        return min(alike, default=None)

    def add(self, row: int, text: Fingerprint) -> None:
        """Compare later texts with this one."""
        self._by_digest.setdefault(text.digest, row)
        self._shingles[row] = text.shingles
        for band in text.bands:
            self._by_band.setdefault(band, []).append(row)


def normalised(text: str) -> str:
    """A text case folded, with single spaces.

    >>> normalised("  Two   WORDS ")
    'two words'
    """
    return " ".join(text.casefold().split())


def shingles(text: str) -> np.ndarray:
    """Hashes of the different stretches of 5 characters, sorted; a shorter text is one stretch."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    letters = np.pad(letters, (0, max(0, CHARACTERS - len(letters))))
    hashes = np.zeros(len(letters) - CHARACTERS + 1, dtype=np.uint64)
    for place in range(CHARACTERS):  # a number of base 2^21 mixed as it grows; no two stretches are known to collide
        hashes = _mixed((hashes << np.uint64(21)) ^ hashes ^ letters[place : place + len(hashes)])
    return np.unique(hashes)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Share of common members among all members of two sets, given as sorted arrays of different numbers.

    >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def band_rows(threshold: float) -> int:
    """The most functions a band that still find `RECALL` of the pairs at the threshold: 1 - (1 - t^r)^(128 / r).

    >>> [band_rows(threshold) for threshold in (0.5, 0.8, 0.9)]
    [2, 5, 8]
    """
    sufficient = [r for r in range(1, FUNCTIONS + 1) if 1 - (1 - threshold**r) ** (FUNCTIONS // r) >= RECALL]
    return max(sufficient, default=1)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the input moves half the bits of the output."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


_rng = np.random.default_rng(mixed_seed(0, "minhash"))
_FACTORS = _rng.integers(0, 2**63, size=(FUNCTIONS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _rng.integers(0, 2**63, size=(FUNCTIONS, 1), dtype=np.uint64)


def _signature(hashes: np.ndarray) -> np.ndarray:
    """Least value of each hash function over a text's shingles."""
    least = np.full(FUNCTIONS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for first in range(0, len(hashes), AT_ONCE):
        least = np.minimum(least, (_FACTORS * hashes[first : first + AT_ONCE] + _SHIFTS).min(1))
    return least


def _bands(signature: np.ndarray, rows: int) -> list[bytes]:
    """Each band's values, with its number, as a key."""
    count = FUNCTIONS // rows
    return [bytes([band]) + signature[band * rows : (band + 1) * rows].tobytes() for band in range(count)]
