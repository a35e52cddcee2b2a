"""Stage the pages of the site in build/pages, from where zensical.toml reads them. `make docs` runs it.

Pages link to files that are no pages: a table of results, a module. A reader of the repository follows such a link; on
the site, which holds pages alone, it becomes the file's path, in code. A link to a file that is nowhere stays as it is,
and the strict build fails on it. The changelog and CONTRIBUTING are pages too; docs/index.md stands for the README. A
notebook becomes a page (`notebook_pages`), which offers the notebook itself.

python docs/make_site.py
"""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

from notebook_pages import notebook_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STAGED = ROOT / "build/pages"
MOVED = {ROOT / "CHANGELOG.md": "changelog.md", ROOT / "CONTRIBUTING.md": "contributing.md"}
"""Pages that are not below docs/, and their places on the site."""
FRONT = ROOT / "README.md", "index.md"
"""What a reader of the repository sees first, and a reader of the site."""
KINDS = {".md", ".svg", ".png", ".html", ".css", ".yml", ".ipynb"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
"""A link or a picture with a relative address; addresses with a scheme hold a colon."""
CODE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*?$|(`+)(?!`).+?(?<!`)\3(?!`)", re.MULTILINE | re.DOTALL)


def site_page(text: str, source: Path, place: str) -> str:
    """A page as the site has it.

    Args:
        text: Of the page in the repository.
        source: Its file there.
        place: Its path on the site.
    """

    def readdress(link: re.Match[str]) -> str:
        picture, words, address, anchor = link.groups()
        file = Path(os.path.normpath(source.parent / address))
        if file == FRONT[0]:
            home = FRONT[1]
        elif file in MOVED:
            home = MOVED[file]
        elif file.is_relative_to(DOCS):
            home = page_place(file).relative_to(DOCS).as_posix()
        elif file.exists():
            path = file.relative_to(ROOT).as_posix()
            return f"`{path}`" if words.strip("`") in (path, file.name) else f"{words} (`{path}`)"
        else:
            return link.group()
        return f"{picture}[{words}]({os.path.relpath(home, Path(place).parent)}{anchor or ''})"

    pieces, end = [], 0
    for code in CODE.finditer(text):  # an example of a link is no link
        pieces += [LINK.sub(readdress, text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*pieces, LINK.sub(readdress, text[end:])])


def page_place(file: Path) -> Path:
    """Where the page of a file stands: a notebook's is beside it."""
    return file.with_suffix(".md") if file.suffix == ".ipynb" else file


def stage() -> None:
    """Write every page, and what pages show, below `STAGED`; nothing of an earlier time stays."""
    shutil.rmtree(STAGED, ignore_errors=True)
    files = {file: file.relative_to(DOCS).as_posix() for file in sorted(DOCS.rglob("*")) if file.suffix in KINDS}
    for source, place in (MOVED | files).items():
        target = STAGED / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(site_page(source.read_text(), source, place))
        else:
            shutil.copyfile(source, target)
        if source.suffix == ".ipynb":
            page = page_place(target)
            text = partial(site_page, source=source, place=page.relative_to(STAGED).as_posix())
            page.write_text(notebook_page(json.loads(source.read_text()), source.name, text))


if __name__ == "__main__":
    stage()
