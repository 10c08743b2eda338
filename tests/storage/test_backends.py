import errno
import os
import uuid
from pathlib import Path

import pytest
from backend_contract import BackendContract

from storage import AlreadyExistsError, StorageError
from storage.backends import LocalBackend, backend_for
from storage.objects import MARKER, ObjectBackend


class TestLocal(BackendContract):
    """A directory of the file system that the tests run on."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "root")


class TestMemory(BackendContract):
    """obstore's store in memory: the object backend without a network, and without other processes."""

    test_processes_racing_for_every_shard_leave_whole_shards = None

    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4()}/root"


class TestS3(BackendContract):
    """moto's server, a re-implementation of S3 that honours conditional puts, over HTTP; it is not Amazon's."""

    @pytest.fixture
    def url(self, s3_url: str) -> str:
        return s3_url


def test_failed_local_creation_leaves_nothing_beside_the_root(tmp_path: Path) -> None:
    def failing() -> object:
        yield "a", b"1"
        raise RuntimeError("out of luck")

    backend = LocalBackend(tmp_path / "root")
    with pytest.raises(RuntimeError, match="out of luck"):
        backend.create(failing())  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
    assert backend.create([("a", b"1")]) is True
    assert os.listdir(tmp_path) == ["root"]


def test_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    backend = LocalBackend(tmp_path)
    backend.write("a", [b"1"])
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"must stand on a file system with hard links.*Choose a path on another"):
        backend.publish("a", "b")


def killed_creation(url: str, files: list[tuple[str, bytes]], n_put: int) -> ObjectBackend:
    """What is there when a creator of these files dies after some of them."""
    backend = backend_for(url)
    assert isinstance(backend, ObjectBackend)

    def dying() -> object:
        for number, file in enumerate(files):
            if number > n_put:
                raise KeyboardInterrupt
            yield file

    with pytest.raises(KeyboardInterrupt):
        backend.create(dying())  # type: ignore[arg-type]
    return backend


FILES = [("spec.json", b"settings"), ("data/0", b"0"), ("data/1", b"1")]


def test_killed_creation_in_an_object_store_is_finished_by_the_next() -> None:
    backend = killed_creation("memory://killed", FILES, 1)
    assert backend.list("") == [MARKER, "data"]
    assert backend.create(FILES) is True
    assert {name: backend.read(name) for name, _ in FILES} == dict(FILES)
    assert backend.list("") == ["data", "spec.json"]
    assert backend.create(FILES) is False


@pytest.mark.parametrize("other", [[("spec.json", b"others"), *FILES[1:]], [*FILES[:1], ("data/0", b"x"), *FILES[2:]]])
def test_killed_creation_of_another_store_is_not_built_upon(other: list[tuple[str, bytes]]) -> None:
    backend = killed_creation(f"memory://other/{other[0][1].decode()}", FILES, 1)
    with pytest.raises(
        AlreadyExistsError, match=r"creation of a store with other contents.*remove everything under mem"
    ):
        backend.create(other)
    assert backend.size("spec.json") is None
    assert backend.create(FILES) is True


def test_creation_killed_before_its_last_removal_is_finished() -> None:
    backend = ObjectBackend.from_url("memory://almost")
    backend.create(FILES)
    backend.write(MARKER, [b"whatever"])
    assert backend.create([("spec.json", b"others")]) is False
    assert backend.list("") == ["data", "spec.json"]
