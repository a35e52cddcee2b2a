"""Repair what `verification` finds wrong in an index: recompute shards, read parts again, remove stray files.

A shard can be recomputed as long as its part and the model exist; a part can be read again only from the corpus that it
was copied from. Each file is written whole and listed before the next is looked at, so that a kill loses nothing.
"""

from collections.abc import Callable, Iterable, Sequence

from whence.counts import number_of
from whence.errors import CorpusError
from whence.indexing.index_files import is_index_file
from whence.indexing.manifest import PartEntry, ShardEntry
from whence.indexing.store import Store
from whence.indexing.verification import problems_of

Recompute = Callable[[Sequence[tuple[int, int]]], Iterable[ShardEntry]]
"""Writes the shards of (checkpoint, part) again, in whatever order."""
Reread = Callable[[int], Sequence[dict]]
"""The corpus rows of a part, from the original corpus."""


def repair(store: Store, recompute: Recompute, reread: Reread | None = None) -> list[str]:
    """Repair what `verification` finds and return a note on each. Without `reread`, damaged parts are only reported."""
    notes, shards = [], list[ShardEntry]()
    for problem in problems_of(store):
        if problem.is_forbidden:
            notes.append(f"{problem.file}: left alone, for it may not be read; allow that, and verify again")
        elif isinstance(problem.entry, ShardEntry):
            shards.append(problem.entry)
        elif isinstance(problem.entry, PartEntry):
            notes.append(_repair_part(store, problem.entry, reread))
        elif is_index_file(problem.file):
            store.place.remove(problem.file)
            notes.append(f"{problem.file}: removed, it was not part of the index")
        else:
            notes.append(f"{problem.file}: left alone, it is not a file of Whence's")
    return notes + _repair_shards(store, shards, recompute)  # last: recomputing a shard reads its part


def _repair_shards(store: Store, wrong: Sequence[ShardEntry], recompute: Recompute) -> list[str]:
    notes, able = [], dict[tuple[int, int], ShardEntry]()
    for old in wrong:
        part = store.manifest.parts[old.part]
        if store.place.defect(part.file, part) is not None:
            notes.append(f"{old.file}: not recomputed, for its rows are in {part.file}, which is wrong")
        else:
            able[old.checkpoint, old.part] = old
    for new in recompute([*able]):
        store.add_shard(new)
        if new.sha256 == able[new.checkpoint, new.part].sha256:
            notes.append(f"{new.file}: recomputed, the same bytes as before")
        else:
            why = "another machine or library version?"
            notes.append(f"{new.file}: recomputed and listed anew; its bytes differ ({why})")
    return notes


def _repair_part(store: Store, old: PartEntry, reread: Reread | None) -> str:
    advice = f"index the original corpus again into {store.place.root} with --restart"
    if reread is None:
        return f"{old.file}: cannot be mended from shards; {advice}"
    number = store.manifest.parts.index(old)
    try:
        rows = reread(number)
    except CorpusError as error:
        return f"{old.file}: cannot be read again from the corpus ({error}); {advice}"
    if len(rows) != old.rows:
        return f"{old.file}: the corpus now gives {number_of(len(rows), 'row')} for it, not {old.rows}; {advice}"
    new = store.replace_part(number, rows)
    is_same = new.sha256 == old.sha256
    outcome = "the same bytes as before" if is_same else "listed anew, its bytes differ: has the corpus changed?"
    return f"{old.file}: read again from the corpus, {outcome}"
