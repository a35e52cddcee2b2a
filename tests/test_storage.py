"""Files are written whole by one writer at a time, and what is temporary goes whenever a process is stopped."""

import shutil
import threading
from pathlib import Path

import pytest

from whence.local_files import remove_directory
from whence.storage import Place


def test_two_writers_of_one_file_wait_for_each_other(tmp_path):
    place, begun, going_on = Place.at(tmp_path), threading.Event(), threading.Event()

    def pieces():
        yield b"first "
        begun.set()
        assert going_on.wait(10)
        yield b"writer"

    first = threading.Thread(target=place.write, args=("rows.csv", pieces()), kwargs={"total": 12})
    second = threading.Thread(target=place.write, args=("rows.csv", [b"second"]), kwargs={"total": 6})
    first.start()
    assert begun.wait(10)
    second.start()
    second.join(0.1)
    assert second.is_alive() and not (tmp_path / "rows.csv").exists()
    going_on.set()
    first.join(10)
    second.join(10)
    assert (tmp_path / "rows.csv").read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_draft_that_a_third_writer_renames_is_no_error(tmp_path, monkeypatch):
    """The second waits for the first, and then looks for its draft while a third renames one of the same name."""
    real = Path.stat

    def renamed_meanwhile(self, **more):
        if self.name == "rows.csv.tmp" and not renamed:
            renamed.append(self.unlink())
        return real(self, **more)

    renamed = []
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "stat", renamed_meanwhile)
    Place.at(tmp_path).write("rows.csv", [b"rows"], total=4)
    monkeypatch.undo()
    assert renamed and [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("rows.csv", b"rows")]


def test_a_draft_of_a_killed_process_is_written_over(tmp_path):
    (tmp_path / "rows.csv.tmp").write_bytes(b"much longer than what comes")
    Place.at(tmp_path).write("rows.csv", [b"rows"], total=4)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("rows.csv", b"rows")]


def test_a_stop_at_the_renaming_leaves_nothing(tmp_path, monkeypatch):
    def stopped(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        Place.at(tmp_path).write("rows.csv", [b"rows"], total=4)
    assert not any(tmp_path.iterdir())


def test_a_directory_is_removed_though_the_removal_is_stopped(tmp_path, monkeypatch):
    folder, real = tmp_path / "training", shutil.rmtree
    (folder / "checkpoint").mkdir(parents=True)
    calls = []

    def stopped_once(path, **more):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(path, **more)

    monkeypatch.setattr(shutil, "rmtree", stopped_once)
    with pytest.raises(KeyboardInterrupt):
        remove_directory(folder)
    assert not any(tmp_path.iterdir())
