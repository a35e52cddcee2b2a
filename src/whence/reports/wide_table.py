"""A table with a column for each evaluation set, of which there may be more than a terminal is wide.

Rich takes what is missing from the first column, which is the one that says what a row is. Here the columns are told
in several tables below one another instead, each with the first column.
"""

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from whence.reports.text import visible

LABEL = 34
"""Widest first column, in characters; longer names are cut."""
GAP = 2
"""Characters between columns."""


class WideTable:
    """A table of rows with a label, folded to the width that there is.

    Args:
        title: Above it.
        label: Head of the first column.
        columns: Heads of the others.
    """

    def __init__(self, title: str, label: str, columns: Sequence[str]) -> None:
        self.title, self.label = title, label
        self.columns = [Text(visible(name)) for name in columns]
        self.rows: list[tuple[Text, list[Text]]] = []

    def add_row(self, label: Text, cells: Sequence[Text | str]) -> None:
        """Append a row.

        Raises:
            ValueError: Not as many cells as columns.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append((label, [cell if isinstance(cell, Text) else Text(cell) for cell in cells]))

    def parts(self, width: int) -> list[range]:
        """Columns of each table, so that none is wider than `width` characters; one at least."""
        widths = [max(cell.cell_len for cell in column) for column in self._down()]
        label = min(LABEL, max(text.cell_len for text in (Text(self.label), *(label for label, _ in self.rows))))
        tables, start, used = [], 0, label
        for place, needed in enumerate(widths):
            if place > start and used + GAP + needed > width:
                tables.append(range(start, place))
                start, used = place, label
            used += GAP + needed
        return [*tables, range(start, len(widths))]

    def _down(self) -> list[list[Text]]:
        return [[head, *(cells[place] for _, cells in self.rows)] for place, head in enumerate(self.columns)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Padding]:
        """The tables, with a blank line between."""
        for number, places in enumerate(self.parts(options.max_width)):
            table = Table(title=None if number else self.title, title_justify="left", box=None, pad_edge=False,
                          header_style="bold dim")  # fmt: skip
            table.add_column(self.label, no_wrap=True, overflow="ellipsis", max_width=LABEL)
            for place in places:
                table.add_column(self.columns[place], justify="right", no_wrap=True)
            for label, cells in self.rows:
                table.add_row(label, *(cells[place] for place in places))
            yield Padding(table, (1, 0, 0, 0)) if number else table
