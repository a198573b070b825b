"""fastvae._files: locks that hold, or say that they do not."""

import pytest

from fastvae import _files

fcntl = pytest.importorskip("fcntl")


def test_a_lock_is_held_by_one_and_given_back(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    with _files.locked(path):
        with pytest.raises(BlockingIOError):
            _files.locked(path)
    with _files.locked(path), _files.locked(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["gone", "another file"])
def test_a_lock_on_a_file_that_is_no_longer_there_is_none(tmp_path, monkeypatch, kind):
    path, flock = tmp_path / "lock", fcntl.flock
    path.touch()

    def while_another_ends(*arguments):
        path.unlink()
        if kind == "another file":
            (tmp_path / "other").touch()
            path.touch()
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", while_another_ends)
    with pytest.raises(FileNotFoundError):
        _files.locked(path)


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with _files.locked(tmp_path):
        pass


def test_two_threads_that_write_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with _files.replacing(path) as one, _files.replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["file"]
