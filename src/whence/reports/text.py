"""Untrusted text made safe to show: control characters, which could move a terminal's cursor, become visible."""

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the order in which others are shown."""


def visible(text: str) -> str:
    """Text without control characters but tab and newline; each becomes its Unicode picture or escape."""
    return "".join(
        f"\\u{ord(char):04x}"
        if char in BIDI
        else char
        if (char >= " " and char != "\x7f" and not "\x80" <= char <= "\x9f") or char in "\n\t"
        else _picture(char)
        for char in text
    )


def one_line(text: str) -> str:
    r"""Text as `visible` shows it, its tabs and newlines too: names of files and columns may hold any.

    >>> one_line("a\x1b]0;b\nc")
    'a␛]0;b␊c'
    """
    return visible(text).replace("\n", "␊").replace("\t", "␉")


def encodable(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates, which JSON may hold, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _picture(char: str) -> str:
    return chr(0x2400 + ord(char)) if char < " " else f"\\x{ord(char):02x}"
