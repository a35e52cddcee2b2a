"""Which of a row's columns are the question and the answer, as far as their names and contents say.

Only messages use it, to show a `--map` that a user can take or change: what a row is read as is never guessed.
"""

import re
import shlex
from typing import Any

from whence.corpus.message_forms import are_turns, turns_in

DESCRIBING = {
    *("id", "source", "url", "license", "language", "lang", "category", "tags", "author", "date", "created"),
    *("timestamp", "meta", "metadata", "split", "dataset", "file", "path", "subset"),
}
"""Columns that describe a row."""
WORDS = 4
"""Words of a text that may have been trained on; a label or a place's name has fewer."""
QUESTIONS = (
    r"prompt|question|instruction|query|problem|inputs?|article|document|dialogue|passage|context|ctx|history|post"
)
ANSWERS = r"answers?|responses?|completions?|outputs?|solutions?|summary|highlights|targets?|reply|abstract|chosen"
CONTAINED = rf"{ANSWERS}|choices|options|endings"
COLUMN = "COLUMN"
"""Stands for a column that nothing suggests."""


def suggested_map(row: dict[str, Any]) -> str:
    """A `--map` for a row, and which columns it cannot name.

    >>> suggested_map({"article": "a b c d", "summary": "a", "id": "1"}), suggested_map({"content": "a b c d"})
    ('--map prompt=article,completion=summary', '--map text=content')
    >>> suggested_map({"question": "Why?", "answers": {"text": ["So."]}})
    '--map prompt=question,completion=COLUMN (a column of text, which `answers` is not)'
    """
    row = {name: value for name, value in row.items() if name not in DESCRIBING and value not in (None, "", [], {})}
    texts = {name: len(value.split()) for name, value in row.items() if isinstance(value, str) and value.strip()}
    talks = [name for name, value in row.items() if _is_talk(value) and not _named(CONTAINED, [name])]
    nested = [name for name, value in row.items() if isinstance(value, list | dict) and name not in talks]
    long = [name for name, words in texts.items() if words >= WORDS]
    answers = [name for name in texts if _named(ANSWERS, [name])]
    completion = _named(ANSWERS, [name for name in answers if name in long]) or _named(ANSWERS, answers)
    prompt = _named(QUESTIONS, [*(name for name in texts if name not in answers), *talks])
    others = sorted((name for name in long if name not in (prompt, *answers)), key=lambda name: len(row[name]))
    if prompt is None and completion is None and not talks:
        candidates = others or ([] if nested else list(texts))
        if len(candidates) == 1:
            return _flag({"text": candidates[0]}, nested)
        if candidates:
            prompt, completion = sorted(candidates[-2:], key=list(row).index)
    elif completion is None and talks and prompt in (None, *talks):
        return _flag({"messages": prompt or talks[0]}, nested)
    elif completion is None and not _named(CONTAINED, nested):
        if not others and not nested:
            return _flag({"text": prompt}, nested)
        completion = others[-1] if others else None
    elif prompt is None and not _named(QUESTIONS, nested):
        prompt = others[-1] if others else None
    if prompt is None and completion is None:
        return _flag({"text" if nested else "messages": COLUMN}, nested)
    return _flag({"prompt": prompt or COLUMN, "completion": completion or COLUMN}, nested)


def _flag(names: dict[str, Any], nested: list[str]) -> str:
    pairs = ",".join(f"{name}={own}" for name, own in names.items() if name != own)
    flag = f"--map {shlex.quote(pairs)}"
    if COLUMN not in names.values() or not nested:
        return flag
    listed = ", ".join(f"`{name}`" for name in nested)
    return f"{flag} (a column of text, which {listed} {'is' if len(nested) == 1 else 'are'} not)"


def _is_talk(value: Any) -> bool:
    """Whether a value is a conversation: messages, or the words of two in turns."""
    turns = turns_in(value)
    if are_turns(turns):
        return bool(turns)
    return isinstance(value, list) and len(value) > 1 and all(isinstance(x, str) and len(x.split()) > 1 for x in value)


def _named(pattern: str, names: list[str]) -> str | None:
    """The first of the names that are one of some words, or else hold one."""
    whole = next((name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)), None)
    word = re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z])")
    return whole or next((name for name in names if word.search(name.lower())), None)
