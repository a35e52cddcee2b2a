"""Files are asked for one item ahead, and what is mapped stays what it is."""

import torch

from whence.indexing import readahead
from whence.indexing.readahead import advise, ahead


def test_the_next_item_is_asked_for_before_one_is_given(monkeypatch):
    told = []
    monkeypatch.setattr(readahead, "advise", lambda tensor: told.append(int(tensor)))
    given = []
    for item in ahead(range(3), lambda item: [torch.tensor(item), torch.tensor(10 + item)]):
        given.append((item, [*told]))
    assert given == [(0, [0, 10, 1, 11]), (1, [0, 10, 1, 11, 2, 12]), (2, [0, 10, 1, 11, 2, 12])]
    assert [*ahead([], lambda item: [])] == []


def test_any_stretch_of_a_mapped_file_can_be_asked_for(tmp_path):
    data = torch.arange(50_000, dtype=torch.uint8)
    (tmp_path / "file").write_bytes(bytes(data.tolist()))
    mapped = torch.from_file(str(tmp_path / "file"), shared=False, size=len(data), dtype=torch.uint8)
    for tensor in (mapped, mapped[17:40_000], mapped[:0], torch.zeros(3)):
        advise(tensor)
    assert torch.equal(mapped, data)


def test_a_system_without_such_a_call_is_not_asked(monkeypatch):
    monkeypatch.setattr(readahead, "_madvise", lambda: None)
    advise(torch.zeros(3))
