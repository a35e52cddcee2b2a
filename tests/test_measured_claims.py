"""The numbers under every answer are those that the benchmarks committed."""

import json
from pathlib import Path

import pytest

from whence import catalogue
from whence.evidence import AGREEMENT, EXACT, GAINS, REFINED, REFINING, TASKS, select_evidence, trace_evidence
from whence.tracing.shortlists import LISTED

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = {
    "ekfac": "EK-FAC",
    "tracin_cosine": "exact-cosine",
    "tracin": "exact-dot",
    "embedding": "rds+",
}
"""What the bank's tables call a method of `trace`."""


def of_the_banks(method: str) -> tuple[float, ...]:
    """Linear datamodeling scores of a method on both banks, as committed."""
    banks = json.loads((BENCHMARKS / "evaluation" / "results" / "banks.json").read_text())
    return tuple(round(row["lds"], 2) for bank in ("base-6m", "docstrings")
                 for row in banks[bank]["lds"]["rows"] if row["method"] == method)  # fmt: skip


@pytest.mark.parametrize("method", AGREEMENT)
def test_agreement_is_what_the_bank_measured(method):
    assert method in catalogue.TRACE_METHODS
    assert AGREEMENT[method] == of_the_banks(NAMES.get(method, method))


def test_refined_curvature_is_what_the_bank_measured():
    assert of_the_banks("EK-FAC + CG") == REFINED
    assert REFINING.split()[1::2] == ["refine=2", "sample=128"]


@pytest.mark.parametrize(("bank", "first", "last"), [("base-6m", ".92", ".73"), ("docstrings", ".92", ".78")])
def test_short_lists_hold_what_the_guide_says(bank, first, last):
    """Of EK-FAC's first ten and last ten, in lists of the length that is taken by default."""
    measured = json.loads((BENCHMARKS / "tracing" / "results" / "short_lists.json").read_text())["banks"][bank]
    listed_by = catalogue.TRACE_METHODS["ekfac"].listed_by
    (line,) = (line for line in measured["recall"]
               if (line["of"], line["listed by"], line["length"]) == ("EK-FAC", listed_by, LISTED))  # fmt: skip
    assert (f"{line['first']:.2f}", f"{line['last']:.2f}") == (f"0{first}", f"0{last}")
    guide = (BENCHMARKS.parent / "docs" / "guide" / "curvature.md").read_text()
    assert f"first and last {LISTED} rows" in guide and first in guide and last in guide
    assert line["first"] >= 0.9


def test_exact_methods_are_measured():
    assert {*EXACT.values()} <= {*AGREEMENT}


def test_gains_are_those_of_the_selection_page():
    page = (BENCHMARKS.parent / "docs" / "results" / "selection.md").read_text()
    for method, gains in GAINS.items():
        of_default = [line for line in page.splitlines() if line.startswith(f"| 5% | {method} | default |")]
        of_table = page[page.index("**5% of the pool's tokens**") : page.index("**20% of the pool's tokens**")]
        if method == "replay":
            of_table = page[page.index("### Replay") : page.index("### The default index")]
        line = of_default[0] if of_default else next(
            line for line in of_table.splitlines() if line.startswith(f"| {method} |")
        )  # fmt: skip
        cells = [cell.strip(" *").split(" (")[0] for cell in line.split("|")]
        signed = [f"{nats:+.2f}" for nats in gains]
        assert [cell for cell in cells if cell in signed] == signed, line
    assert TASKS == ("gsm8k", "BBH", "MMLU")


@pytest.mark.parametrize("method", catalogue.TRACE_METHODS)
def test_every_way_to_trace_has_a_sentence(method):
    words = trace_evidence(method, "my-index", passes=(10, 10), run="my-run")
    assert words.startswith(method)
    assert ("replay by" in words) == (method != "replay")
    assert ("curvature by" in words) == (method not in ("replay", "ekfac"))
    assert ("trak by" in words) == (method in EXACT)


def test_a_method_asked_in_another_way_is_not_called_measured():
    assert "was not held against retrainings" in trace_evidence("cosine", "my-index", is_as_measured=False)


@pytest.mark.parametrize("method", catalogue.SCORERS)
def test_every_way_to_select_has_a_sentence(method):
    words = select_evidence(method)
    assert ("was not measured" in words) == (method not in GAINS)
