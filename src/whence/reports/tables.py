"""Tables for the terminal in the one style that all reports have.

Corpus text is untrusted: it is shown as text, never read as markup, and `text.visible` makes its control characters
visible.
"""

from rich.table import Table
from rich.text import Text


def pairs_table(lines: dict[str, str]) -> Table:
    """Names and values, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table


def plain_table(title: str | None = None) -> Table:
    """A table without lines, its title and head at the left."""
    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold dim")
