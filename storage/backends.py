"""The file operations that a store is built on, and the local file system's way of doing them.

Everything else in this package names files by a key ("commits/000003.json") relative to the root of a store and goes
through a `Backend`, which `backend_for` chooses; `objects` has the one for object stores.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.errors import NotFoundError, StorageError

Buffer = bytes | memoryview | NDArray[Any]
"""Contiguous bytes."""


def as_bytes(buffer: Buffer) -> memoryview:
    """The buffer's own bytes, not copied."""
    if isinstance(buffer, np.ndarray):
        buffer = np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")


class ByteSource(Protocol):
    """A file's bytes: an array, or something that fetches what is asked for."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, range_: slice, /) -> NDArray[np.uint8]:
        """Bytes of a contiguous range, read-only."""


class Backend(Protocol):
    """Files under the root of one store. Keys are relative, with "/" between their parts."""

    def location(self, key: str = "") -> str:
        """Where the key is, for messages to people."""

    def create(self, files: Iterable[tuple[str, Buffer]]) -> bool:
        """Creates the store with these files, durably and at once: nobody who looks for the first of them ever sees a
        part. On an object store that file is put last.

        Returns False if the root is taken. Raises AlreadyExistsError if parts of another store lie in an object store.
        """

    def read(self, key: str) -> bytes:
        """The whole file. Raises NotFoundError."""

    def map(self, key: str) -> NDArray[np.uint8]:
        """The whole file as a read-only array, read as it is touched. Raises NotFoundError."""

    def open(self, key: str) -> ByteSource:
        """A file to read ranges of. An array if reading the same range again gives the same bytes, that is, if it is a
        map of a local file. Raises NotFoundError."""

    def size(self, key: str) -> int | None:
        """Size in bytes, None if there is no such file."""

    def list(self, prefix: str) -> list[str]:
        """Sorted names directly under the prefix; empty if there is no such prefix."""

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Writes a new file durably: when this returns, its bytes survive a power cut (its name only after `sync`)."""

    def sync(self, prefix: str) -> None:
        """Makes the names directly under the prefix durable."""

    def publish(self, source: str, key: str) -> bool:
        """Gives the file at `source` the name `key` too, durably, if nothing has it: exactly one caller gets True, as
        long as no two publish the same bytes."""

    def install(self, source: str, key: str) -> bool:
        """Moves a file, durably, over what stands at the key. Returns False if there is no file at `source`: somebody
        else moved it."""

    def remove(self, key: str) -> None:
        """Removes a file, or everything under a prefix; nothing happens if there is neither."""


OBJECT_SCHEMES = ("s3", "gs", "memory")


def check_url(url: str) -> None:
    """Raises ValueError unless that is the URL of a place in an object store, and nothing more."""
    scheme, _, rest = url.partition(":/")
    if not rest.startswith("/"):
        raise ValueError(
            f"The URL of a store must have two slashes after its scheme, got {url!r}. A pathlib.Path cannot hold a "
            "URL: pass it as a string."
        )
    if any(character in rest for character in "@?#"):
        # The URL is not repeated here: it may hold a secret.
        raise ValueError(
            f"The {scheme} URL of a store must be a bucket and a prefix only. Endpoint, region and credentials are "
            "taken from the environment (for S3: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY)."
        )
    if scheme not in OBJECT_SCHEMES:
        raise ValueError(
            f"A store must stand at a local path or at a URL of one of the schemes {', '.join(OBJECT_SCHEMES)}, got "
            f"{url!r}."
        )
    if not rest.strip("/"):
        raise ValueError(f"The URL of a store must name a bucket, got {url!r}.")


def backend_for(path: str | os.PathLike[str]) -> Backend:
    """The backend of the store at a local path or at a URL (`s3://bucket/prefix`, `gs://bucket/prefix`).

    Raises: ValueError for a URL of another scheme, or one that went through `pathlib` and lost a slash;
        storage.StorageError if what the scheme needs is not installed.
    """
    name = os.fspath(path)
    scheme, separator, _ = name.partition(":/")
    if not separator or "/" in scheme:
        return LocalBackend(path)
    if scheme not in OBJECT_SCHEMES and not name.startswith(f"{scheme}://"):
        return LocalBackend(path)
    from storage.objects import ObjectBackend

    return ObjectBackend.from_url(name)


REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "this user may not write there",
}


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns what a person has to put right on the machine into a StorageError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise StorageError(
            f"{where} must be writable, but {REASONS[error.errno]}. What was committed is safe, nothing half-written "
            "was kept: put that right, then run the same command again, and it goes on from there."
        ) from error


class LocalBackend:
    """A directory on a local file system with hard links (ext4, xfs, btrfs, apfs, tmpfs, NFS)."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def location(self, key: str = "") -> str:
        return str(self.root / key) if key else str(self.root)

    def create(self, files: Iterable[tuple[str, Buffer]]) -> bool:
        with _explained(str(self.root)):
            return self._create(files)

    def _create(self, files: Iterable[tuple[str, Buffer]]) -> bool:
        parent = self.root.parent
        parent.mkdir(parents=True, exist_ok=True)
        if self.root.exists() and not (self.root.is_dir() and not os.listdir(self.root)):
            return False
        draft_prefix = f".{self.root.name}.creating-"
        draft = type(self)(parent / f"{draft_prefix}{uuid.uuid4().hex}")
        try:
            for key, buffer in files:
                draft.write(key, [buffer])
            for directory, _, _ in os.walk(draft.root):
                draft.sync(os.path.relpath(directory, draft.root))
            self._rename_to_root(draft)
        except FileNotFoundError:  # another creator finished first and removed this draft
            if not self.root.exists():
                raise
            created = False
        except FileExistsError:
            created = False
        except BaseException:
            draft.remove("")
            raise
        else:
            created = True
        for name in os.listdir(parent):  # once the root stands, every draft is rubbish, whoever left it
            if name.startswith(draft_prefix):
                type(self)(parent).remove(name)
        return created

    def _rename_to_root(self, draft: LocalBackend) -> None:
        """Raises FileExistsError if something stands at the root already."""
        try:
            os.rename(draft.root, self.root)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(str(self.root)) from error
            raise
        type(self)(self.root.parent).sync("")

    def read(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"There must be a file at {self.location(key)}, but there is none.") from error

    def map(self, key: str) -> NDArray[np.uint8]:
        try:
            descriptor = os.open(f"{self.root}/{key}", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            try:
                if os.fstat(descriptor).st_size == 0:
                    return np.empty(0, np.uint8)
                return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"There must be a file at {self.location(key)}, but there is none.") from error

    def open(self, key: str) -> ByteSource:
        return self.map(key)

    def size(self, key: str) -> int | None:
        try:
            found = (self.root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        path = self.root / key
        with _explained(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
            try:
                for buffer in buffers:
                    view = as_bytes(buffer)
                    while view:  # one write(2) may take less than it was given, and at most 2 GiB
                        view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync(self, prefix: str) -> None:
        descriptor = os.open(self.root / prefix, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self, source: str, key: str) -> bool:
        target = self.root / key
        with _explained(str(target)):
            return self._link(self.root / source, target)

    def _link(self, source: Path, target: Path) -> bool:
        self._make_durable_directory(target.parent)
        try:
            # atomic and exclusive: the name appears with all of its bytes, or not at all
            os.link(source, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise StorageError(
                f"A store must stand on a file system with hard links, but linking {target} was refused ({error}). "
                f"Choose a path on another file system."
            ) from error
        self.sync(str(target.parent.relative_to(self.root)))
        return True

    def install(self, source: str, key: str) -> bool:
        target = self.root / key
        with _explained(str(target)):
            self._make_durable_directory(target.parent)
            try:
                os.replace(self.root / source, target)
                moved = True
            except FileNotFoundError:
                moved = False
            self.sync(str(target.parent.relative_to(self.root)))  # also what another process has just moved
        return moved

    def remove(self, key: str) -> None:
        path = self.root / key
        with _explained(str(path)):
            if not path.is_dir() and os.path.lexists(path):
                path.unlink(missing_ok=True)
            while path.is_dir():
                try:
                    shutil.rmtree(path)
                except OSError as error:  # somebody else removes it, or still writes into it, at the same time
                    if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                        raise

    def _make_durable_directory(self, path: Path) -> None:
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for directory in reversed(missing):
            directory.mkdir(exist_ok=True)
            self.sync(str(directory.parent.relative_to(self.root)))
