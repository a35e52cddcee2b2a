"""Tables for the terminal in the one style that all reports have.

Corpus text is untrusted: it is shown as text, never read as markup, and `text.visible` makes its control characters
visible.
"""

from rich.table import Table
from rich.text import Text

from whence.reports.text import visible


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


def unbroken(line: str, style: str) -> Text:
    """A line that holds a command: it is copied, so that the terminal may wrap it but no line break is put into it."""
    return Text(visible(line), style, no_wrap=True, overflow="ignore")
