"""The stretch of a completion that a question is about. The command line reads it before it imports torch."""

from whence.errors import SettingError


def span_of(text: str | None, tokens: str | None, location: str) -> str | tuple[int, int] | None:
    """The stretch of a completion to trace: its text, or its tokens FROM:TO.

    >>> span_of(None, "3:7", "--span-tokens"), span_of("a word", None, "--span-tokens")
    ((3, 7), 'a word')

    Raises:
        SettingError: The tokens are no range, or there is a text beside them.
    """
    if tokens is None:
        return text
    first, colon, end = tokens.partition(":")
    if text is not None or not (colon and first.isdecimal() and end.isdecimal()):
        flag = "--span" if location.startswith("--") else "`span`"
        raise SettingError(f"{location} {tokens}: FROM:TO is expected, such as 3:7, and no {flag} beside it")
    return int(first), int(end)
