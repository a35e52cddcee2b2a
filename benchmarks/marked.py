"""Pages with parts that a script fills in: what is between `<!-- NAME -->` and `<!-- /NAME -->`."""

import re


def filled(text: str, name: str, body: str) -> str:
    """A page with one of its marked parts replaced.

    Raises:
        SystemExit: There is no such part.
    """
    marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"there is no place <!-- {name} --> in the page")
    return marks.sub(lambda found: found.group(1) + body.rstrip() + "\n" + found.group(2), text)
