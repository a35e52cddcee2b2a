"""Griffe extension of the site's API page: doctests in docstrings become blocks of code. zensical.toml names it.

A docstring of ours shows its example as it is, with no heading "Examples:"; Markdown would take `>>>` for a quotation.
"""

import re

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
"""From a prompt to the next empty line."""


class FencedDoctests(griffe.Extension):
    """Fences every doctest of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change a docstring before its sections are read."""
        if obj.docstring and ">>>" in obj.docstring.value:
            text = DOCTEST.sub(lambda found: f"```pycon\n{found.group()}\n```", obj.docstring.value)
            obj.docstring.value = text
