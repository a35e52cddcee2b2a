"""The best and the worst rows, against a plain sort of all of them."""

import pytest
import torch

from whence.explorer.ranking import ranked


def plain(scores, passes, groups, m, opposing):
    """By Python's own sort, one row after another."""
    rows = [row for row in range(len(scores)) if passes[row] and abs(scores[row]) < float("inf")]
    counts = {}
    for row in rows:
        counts[groups[row]] = counts.get(groups[row], 0) + 1
    out, seen = [], set()
    for row in sorted(rows, key=lambda row: (scores[row] if opposing else -scores[row], row)):
        if groups[row] not in seen:
            out.append((row, scores[row], counts[groups[row]]))
            seen.add(groups[row])
    return out[:m]


@pytest.mark.parametrize("opposing", [False, True])
@pytest.mark.parametrize("folds", [False, True])
def test_rows_are_those_of_a_plain_sort(opposing, folds):
    generator = torch.Generator().manual_seed(0)
    for n in (0, 1, 7, 400):
        scores = torch.randint(-5, 5, (n,), generator=generator).float() / 4  # many are equal
        scores[::7] = -torch.inf
        scores[5::11] = torch.nan
        passes = torch.rand(n, generator=generator) < 0.7
        groups = torch.randint(0, max(1, n // 3), (n,), generator=generator)
        own = groups if folds else torch.arange(n)
        for m in (1, 3, 50, 1000):
            found = ranked(scores, passes, groups if folds else None, m, opposing=opposing)
            expected = plain(
                scores.masked_fill(scores.isnan(), torch.inf).tolist(), passes.tolist(), own.tolist(), m, opposing
            )
            assert [*zip(found.rows, found.scores, found.copies, strict=True)] == expected


def test_most_rows_may_be_of_one_text():
    scores, groups = torch.arange(1000).float(), torch.zeros(1000, dtype=torch.int64)
    groups[:3] = torch.tensor([1, 2, 3])
    found = ranked(scores, torch.ones(1000, dtype=torch.bool), groups, 3)
    assert (found.rows, found.copies) == ([999, 2, 1], [997, 1, 1])
