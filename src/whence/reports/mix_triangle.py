"""A triangle of mixtures on a law's page: whoever moves its point reads the losses that the law predicts there.

The three domains at its corners share among them what the suggested mixture gives them together; the other domains keep
their shares. Predictions are the law's own, at every step of a grid, so that any law can be looked at and the script
knows none.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float64

from whence.mixing.pipeline import MixLaw
from whence.reports.page import section, sentence

CORNERS = 5
"""Domains that can be corners: those of the largest suggested shares."""
STEPS = 20
"""Steps of the grid along an edge."""
LEAST = 0.02
"""Least share that three corners have together."""
MOST_NUMBERS = 40_000
"""Numbers in the page, at most: some 250 KB."""


def triangle_section(result: MixLaw) -> str:
    """The place that the script fills; empty for fewer than three domains, and without the script never seen."""
    if not grids(result):
        return ""
    caption = (
        "Move the point, or a slider. The bluer, the lower the predicted mean loss; the small dot is the suggested "
        "mixture, the ring the lowest loss of the grid within what was tried and allowed."
    )
    box = (
        '<div class="try"><svg viewBox="0 0 440 400" aria-hidden="true"></svg><div class="reading">'
        '<label class="corners">Between <select></select></label><div class="sliders"></div>'
        '<p class="found" aria-live="polite"></p><div class="numbers"></div></div></div>'
    )
    return f'<div id="try" hidden>{section("Try another mixture", box + sentence(caption))}</div>'


def triangle_data(result: MixLaw) -> dict[str, Any]:
    """What the script reads: names, what was tried, the suggestion and, for each three corners, the grid's losses."""
    return {
        "domains": list(result.table.domains),
        "sets": list(result.table.sets),
        "weights": result.weights.tolist(),
        "steps": STEPS,
        "suggested": [_short(share) for share in result.best.mixture.tolist()],
        "least": [_short(line["least_tried"]) for line in result.rows],
        "most": [_short(line["most_tried"]) for line in result.rows],
        "caps": [line["cap"] for line in result.rows],
        "losses": [_short(loss) for loss in result.best.predicted.tolist()],
        "grids": grids(result),
    }


def grids(result: MixLaw) -> list[dict[str, Any]]:
    """Corners, the share that they have together, and predicted losses at each node of the grid; the largest first."""
    shares = result.best.mixture
    candidates = np.argsort(-shares, kind="stable")[:CORNERS].tolist()
    triples = sorted(itertools.combinations(candidates, 3), key=lambda corners: -shares[list(corners)].sum())
    together = [(corners, float(shares[list(corners)].sum())) for corners in triples]
    places = nodes()
    most = max(1, MOST_NUMBERS // (len(places) * len(result.table.sets)))
    found = []
    for corners, total in [pair for pair in together if pair[1] >= LEAST][:most]:
        mixtures = np.repeat(shares[None], len(places), 0)
        mixtures[:, list(corners)] = total * places
        losses = result.law.predict(mixtures)
        if np.isfinite(losses).all():
            rounded = [[_short(loss) for loss in row] for row in losses.tolist()]
            found.append({"corners": list(corners), "share": _short(total), "losses": rounded})
    return found


def nodes() -> Float64[np.ndarray, "m 3"]:
    """Shares of three corners at every node, in the script's order: by the first corner, then by the second."""
    return np.array(
        [(i, j, STEPS - i - j) for i in range(STEPS + 1) for j in range(STEPS + 1 - i)], dtype=np.float64
    ) / STEPS  # fmt: skip


def _short(value: float) -> float:
    """Five digits, which is more than is shown."""
    return float(f"{value:.5g}")
