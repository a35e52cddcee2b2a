"""A notebook as a page of the site, in Markdown: text as it is, code in blocks, and under each what it showed.

A value is shown in its richest form that the site can show: HTML, else text. Zensical reads Markdown alone, so that no
plugin of MkDocs for notebooks works with it; and a page made here has the site's search, contents, links and colours.
"""

import re
from collections.abc import Callable
from typing import Any

BLANK = re.compile(r"\n\s*\n")


def notebook_page(notebook: dict[str, Any], name: str, text: Callable[[str], str]) -> str:
    """The page of a notebook.

    Args:
        notebook: As its file has it.
        name: The file's name, which the page offers for download from beside it.
        text: Makes Markdown of the repository into that of the site.
    """
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts += [_block(source, "python"), *map(_output, cell["outputs"])]
        else:
            parts.append(text(source))
    heading, rest = parts[0].split("\n", 1)
    download = f'<p class="notebook-file"><a href="../{name}" download>{name}</a>: this page, to run yourself</p>'
    return "\n\n".join([heading, download, rest.strip(), *parts[1:]]) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _block("".join(output["text"]), "", "notebook-output")
    data = output["data"]
    if "text/html" not in data:
        return _block("".join(data["text/plain"]), "", "notebook-output")
    html = BLANK.sub("\n", re.sub(r"<style scoped>.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL))
    return f'<div class="notebook-output">\n{html.strip()}\n</div>'


def _block(text: str, language: str, name: str = "") -> str:
    """A block of code whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`{3,}", text)), default=0))
    return f"{fence}{f' {{ .text .{name} }}' if name else language}\n{text.rstrip()}\n{fence}"
