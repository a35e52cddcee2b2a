"""Edited JSON: every value of a document replaced by others, removed, or listed twice."""

import copy
import random
from functools import partial

import pytest

from whence.errors import WhenceError

OTHERS = (None, True, -1, 10**12, 10**30, 0.5, float("nan"), "", "../../x", "/etc/passwd", "a" * 64, [], {}, [[1]])


def some_changed(document, count, seed=0):
    """Some of `changed`, drawn at random."""
    every = list(changed(document))
    return random.Random(seed).sample(every, min(count, len(every)))


def refusals(edits, use):
    """How many edited documents are refused, each in one line. `use` takes one; any other error fails the test."""
    count = 0
    for words, edited in edits:
        try:
            use(edited)
        except WhenceError as error:
            count += 1
            assert "\n" not in str(error), words
        except Exception as error:
            pytest.fail(f"{words}: {error!r}")
    return count


def changed(document, others=OTHERS):
    """Copies of a document, each with one change, and words for it. Of a list the first two entries are changed."""
    for place in _places(document):
        for other in others:
            yield f"{place} = {other!r}", _with(document, place, partial(_set, value=other))
        yield f"{place} removed", _with(document, place, _remove)
        yield f"{place} twice", _with(document, place, _twice)


def _places(value, at=()):
    if at:
        yield at
    for key in value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, list) else ():
        yield from _places(value[key], (*at, key))


def _with(document, place, change):
    document = copy.deepcopy(document)
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    change(parent, place[-1])
    return document


def _set(parent, key, value):
    parent[key] = copy.deepcopy(value)


def _remove(parent, key):
    del parent[key]


def _twice(parent, key):
    parent.append(copy.deepcopy(parent[key])) if isinstance(parent, list) else parent.update({f"{key} 2": parent[key]})
