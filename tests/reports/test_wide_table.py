"""A table that is wider than the terminal is told in parts; no label is lost."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from whence.reports.wide_table import LABEL, WideTable

SETS = [f"set number {place}" for place in range(10)]


def table(label="code + stories", columns=SETS):
    found = WideTable("Losses", "mixture", columns)
    for row in (label, "the parent"):
        found.add_row(Text(row), [f"{place}.5" for place in range(len(columns))])
    return found


def told(found, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(found)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_table_that_fits_is_one():
    lines = told(table(), 200)
    assert lines[0] == "Losses" and len(lines) == 4
    assert lines[1].split("  ")[0] == "mixture" and all(name in lines[1] for name in SETS)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_wider_one_is_told_in_parts_that_fit_with_the_label_in_each(width):
    lines = told(table(), width)
    blocks = "\n".join(lines).split("\n\n")
    assert len(blocks) > 1 and max(map(len, lines)) <= width
    assert all("code + stories" in block and "the parent" in block for block in blocks)
    heads = [line for line in lines if line.startswith("mixture")]
    assert [name for head in heads for name in SETS if name in head] == SETS  # each once, in order
    values = [float(value) for line in lines if line.startswith("code") for value in line.split()[3:]]
    assert values == [place + 0.5 for place in range(10)]


def test_a_long_label_is_cut_and_a_column_that_never_fits_stands_alone():
    lines = told(table(label="x" * 60), 50)
    assert any("x" * (LABEL - 1) + "…" in line for line in lines)
    assert table(columns=["y" * 70, "z"]).parts(40) == [range(1), range(1, 2)]


def test_as_many_cells_as_columns():
    with pytest.raises(ValueError, match="1 cells for 10 columns"):
        table().add_row(Text("a"), ["1"])
