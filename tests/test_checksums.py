"""Documents that carry their own checksum, files that are recorded in one, and what damage of either comes to."""

import json

import pytest

from whence.checksums import document_of, is_sealed, sealed
from whence.errors import ChecksumError
from whence.storage import Place


def test_every_flipped_bit_of_a_sealed_document_is_refused():
    data = sealed({"member": "a", "nats": [1.5, 2.25]})
    assert document_of(data) == {"member": "a", "nats": [1.5, 2.25]} and json.loads(data)["nats"][0] == 1.5
    for place in range(8 * len(data)):
        harmed = bytearray(data)
        harmed[place // 8] ^= 1 << place % 8
        assert is_sealed(bytes(harmed)), "what is damaged is not taken for what an older Whence wrote"
        with pytest.raises(ValueError):
            document_of(bytes(harmed))


def test_a_document_of_an_older_whence_is_taken_as_it_is():
    for old in ({"base": "0" * 64, "final": "1" * 64}, {"key": [1]}):
        for data in (json.dumps(old).encode(), json.dumps(old, indent=1).encode()):
            assert not is_sealed(data) and document_of(data) == old


@pytest.mark.parametrize("name", ["part-0.bin", "part-0.json"])
def test_a_recorded_file_is_read_once_and_refused_when_it_or_its_record_changes(tmp_path, monkeypatch, name):
    place, reads = Place.at(tmp_path), []
    place.write_recorded("part-0.bin", b"0123456789")
    pieces = Place._pieces
    monkeypatch.setattr(Place, "_pieces", lambda self, name: reads.append(name) or pieces(self, name))
    place.check_recorded("part-0.bin")
    place.check_recorded("part-0.bin")
    assert reads == ["part-0.bin"]
    data = bytearray((tmp_path / name).read_bytes())
    data[5] ^= 4
    (tmp_path / f"{name}.new").write_bytes(data)
    (tmp_path / f"{name}.new").replace(tmp_path / name)  # another inode: clocks of files tick slowly
    with pytest.raises(ChecksumError, match=rf"{name} is not what was written \(wrong checksum\)\. Remove it"):
        place.check_recorded("part-0.bin")
