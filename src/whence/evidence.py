"""What was measured of each method, beside what a better one would cost: the line under every answer.

Two tables, of docs/results: how well a method's scores predict retrainings (`AGREEMENT`), and how much better than on
random rows a model trains on a method's choice (`GAINS`). Both are of models of one to six million weights: they say
which method to try, not what it will reach elsewhere.
"""

from whence.counts import duration

AGREEMENT = {
    "replay": (0.81, 0.74),
    "ekfac": (0.60, 0.43),
    "source": (0.45, 0.29),
    "trak": (0.39, 0.29),
    "trackstar": (0.38, 0.28),
    "tracin_cosine": (0.36, 0.17),
    "cosine": (0.33, 0.19),
    "tracin": (0.30, 0.17),
    "datainf": (0.27, 0.18),
    "dot": (0.27, 0.18),
    "bm25": (0.22, 0.36),
    "embedding": (0.03, 0.04),
    "random": (-0.03, 0.02),
}
"""Rank correlation of summed scores with the losses of 60 retrainings on halves of the rows, mean over 30 questions: 1
would be perfect, 0 is chance. Of a model fine-tuned on 2,000 rows, and of one trained from scratch on 1,000. Source:
docs/results/evaluation.md, banks 1 and 2. Of a model that has learned its rows by heart none is above 0 but BM25 (.14).
"""
REFINED, REFINING = (0.66, 0.45), "--set refine=2 --set sample=128"
"""The same of `ekfac` refined by conjugate gradients, and how."""
EXACT = {"cosine": "tracin_cosine", "dot": "tracin"}
"""Methods of an index, and the ones whose scores decide their order where a short list is re-ranked."""
MEASURING = 2.3
"""What `whence curvature` takes, in passes of exact gradients over the rows (Bank 1: 165 and 73 seconds)."""
TASKS = ("gsm8k", "BBH", "MMLU")
GAINS = {
    "less": (0.36, 0.98, 2.41),
    "influence": (0.34, 1.01, 2.23),
    "datainf": (0.34, 1.00, 2.52),
    "bm25": (0.50, -0.02, 0.26),
    "rds+": (0.50, 0.12, 0.26),
    "rds": (0.45, -0.33, 1.09),
    "density": (-0.10, 0.45, -0.14),
    "loss_drop": (-0.58, -0.42, -0.40),
    "loss": (-2.37, -0.08, 0.27),
    "replay": (0.16, 0.42, 1.89),
}
"""Nats a token by which the loss on each of `TASKS` is lower than after training on random rows, 5% of 12,000 rows
chosen. Source: docs/results/selection.md; `less`, `influence` and `datainf` by the default index."""


NEIGHBOURS = {"bm25": "less", "rds+": "less", "rds": "less"}
"""What to compare with a choice by a method; with one by any other, BM25's, which costs a second."""


def trace_evidence(
    method: str,
    place: str,
    *,
    is_exact: bool = False,
    is_as_measured: bool = True,
    passes: tuple[int, int] | None = None,
    run: str | None = None,
) -> str:
    """How well a method predicts retrainings, and what a better one costs.

    Args:
        method: Name in `catalogue.TRACE_METHODS`.
        place: The index, or the run of a replay.
        is_exact: Whether exact scores decided the order.
        is_as_measured: Whether the method is as it was held against retrainings, but for model and corpus.
        passes: How many rows `whence curvature` would measure, and how many a trace by it reads; None where it cannot.
        run: Directory of a run that can be replayed, if the index' model is of one.

    >>> trace_evidence("bm25", "my-index")
    'bm25 predicts retrainings of a fine-tuned model by 0.22 of 1, of one from scratch by 0.36.'
    >>> words = trace_evidence("cosine", "my-index", is_exact=True, passes=(4096, 10000))
    >>> words.partition("; ")[0]
    'cosine predicts retrainings of a fine-tuned model by 0.36 of 1, of one from scratch by 0.17'
    >>> words.partition("; ")[2]
    'trak by 0.39 and 0.29 (--method trak); curvature by 0.60 and 0.43, for 9,421 exact gradients once and 10,000 a \
trace. For curvature: whence curvature my-index -o my-index-curvature'
    """
    own = AGREEMENT.get(EXACT.get(method, method) if is_exact else method) if is_as_measured else None
    words = f"{method}{'' if is_as_measured else ' asked so'} was not held against retrainings"
    if own is not None:
        words = f"{method} predicts retrainings of a fine-tuned model by {own[0]:.2f} of 1"
        words += f", of one from scratch by {own[1]:.2f}"
    if method == "ekfac" and own is not None:
        words += f"; refined by {_both(REFINED)} ({REFINING})"
    if own is not None and method in EXACT:
        words += f"; trak by {_both(AGREEMENT['trak'])} (--method trak)"
    command = ""
    if passes is not None and (own is None or own < AGREEMENT["ekfac"]):
        once, each = round(MEASURING * passes[0]), passes[1]
        words += f"; curvature by {_both(AGREEMENT['ekfac'])}, for {once:,} exact gradients once and {each:,} a trace"
        command = f"curvature: whence curvature {place} -o {place}-curvature"
    if run is not None and method != "replay":
        words += f"; replay by {_both(AGREEMENT['replay'])}, for two trainings a question"
        command = command or f"replay: whence trace {run} --method replay"
    return f"{words}. For {command}" if command else f"{words}."


def _both(figures: tuple[float, float]) -> str:
    return f"{figures[0]:.2f} and {figures[1]:.2f}"


def curvature_time(passes: tuple[int, int], seconds_a_row: float) -> str:
    """What curvature takes here, as far as this trace's exact gradients can tell.

    >>> curvature_time((4096, 10000), 0.05)
    'Here curvature would take about 7.9 minutes once and 8.3 minutes a trace.'
    """
    once, each = (duration(seconds_a_row * rows) for rows in (MEASURING * passes[0], passes[1]))
    return f"Here curvature would take about {once} once and {each} a trace."


def select_evidence(method: str) -> str:
    """What training on a method's choice gained, beside another one's.

    >>> select_evidence("less")
    'less gained 0.36, 0.98 and 2.41 nats over random rows on gsm8k, BBH and MMLU; bm25 gained 0.50, -0.02 and 0.26. \
What that would choose: --compare bm25'
    """
    other = NEIGHBOURS.get(method, "bm25")
    words = (
        f"{method} gained {_gains(method)} nats over random rows on {TASKS[0]}, {TASKS[1]} and {TASKS[2]}"
        if method in GAINS
        else f"On {TASKS[0]}, {TASKS[1]} and {TASKS[2]} training on the choice of {method} was not measured"
    )
    where = " (of an index)" if other == "less" else ""
    return f"{words}; {other} gained {_gains(other)}. What that would choose{where}: --compare {other}"


def _gains(method: str) -> str:
    first, second, third = (f"{nats:.2f}" for nats in GAINS[method])
    return f"{first}, {second} and {third}"
