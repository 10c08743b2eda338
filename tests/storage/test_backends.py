import errno
import os
from pathlib import Path

import numpy as np
import pytest

from storage import NotFoundError, StorageError
from storage.backends import LocalBackend


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend(tmp_path / "root")


def test_written_file_reads_back_in_every_way(backend: LocalBackend) -> None:
    backend.write("a/b", [b"12", np.array([[51, 52]], np.uint8), memoryview(b""), np.empty((0, 3))])
    assert backend.read("a/b") == b"1234"
    assert bytes(backend.map("a/b")) == b"1234"
    assert backend.size("a/b") == 4
    assert backend.list("a") == ["b"]


def test_empty_file_maps_to_an_empty_array(backend: LocalBackend) -> None:
    backend.write("empty", [])
    assert backend.map("empty").size == 0


def test_map_is_read_only(backend: LocalBackend) -> None:
    backend.write("a", [b"1"])
    assert not backend.map("a").flags.writeable


def test_absent_file_is_named(backend: LocalBackend) -> None:
    for read in (backend.read, backend.map):
        with pytest.raises(NotFoundError, match=r"There must be a file at .*/root/x/y, but there is none"):
            read("x/y")
    assert backend.size("x/y") is None
    assert backend.list("x/y") == []
    backend.remove("x/y")


def test_write_never_overwrites(backend: LocalBackend) -> None:
    backend.write("a", [b"1"])
    with pytest.raises(FileExistsError):
        backend.write("a", [b"2"])
    assert backend.read("a") == b"1"


def test_only_the_first_publication_of_a_name_wins(backend: LocalBackend) -> None:
    backend.write("first", [b"1"])
    backend.write("second", [b"2"])
    assert backend.publish("first", "commits/name") is True
    assert backend.publish("second", "commits/name") is False
    assert backend.read("commits/name") == b"1"


def test_install_may_be_repeated(backend: LocalBackend) -> None:
    backend.write("staged", [b"1"])
    assert backend.install("staged", "deep/er/key") is True
    assert backend.install("staged", "deep/er/key") is False
    assert backend.read("deep/er/key") == b"1"


def test_create_is_all_or_nothing(backend: LocalBackend) -> None:
    def failing() -> object:
        yield "a", b"1"
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        backend.create(failing())  # type: ignore[arg-type]
    assert os.listdir(backend.root.parent) == []
    assert backend.create([("a", b"1"), ("b/c", b"2")]) is True
    assert backend.create([("a", b"other")]) is False
    assert backend.read("a") == b"1"
    assert os.listdir(backend.root.parent) == ["root"]


def test_file_system_without_hard_links_is_refused(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    backend.write("a", [b"1"])
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"must stand on a file system with hard links.*Choose a path on another"):
        backend.publish("a", "b")
