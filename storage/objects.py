"""Stores in object storage: S3 and what speaks its protocol, Google Cloud Storage, and memory, through obstore.

    publish   a conditional put: the server lets one caller create a name          (local: a hard link)
    install   a copy on the server, then a removal                                 (local: a rename)
    create    every file is put under a condition, the one that names the store last  (local: a renamed directory)
    sync      nothing to do: what was put is durable, and every later list shows it

Endpoint and credentials come from the environment, as obstore documents (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …;
GOOGLE_SERVICE_ACCOUNT …), never from a URL, so that they reach no file, log or message.

A request that fails (5xx, 429, a lost or slow answer) is repeated with exponential back-off. A conditional put may be
answered twice: where the first answer was lost, the second says that the name is taken, by us. So whoever is told that
reads what stands there, and has won if it is what they sent.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.backends import Buffer, as_bytes, check_url
from storage.errors import AlreadyExistsError, NotFoundError, StorageError
from storage.ranges import RangeReader, RemoteFile

if TYPE_CHECKING:
    from obstore.store import MemoryStore, ObjectStore

T = TypeVar("T")

PART_BYTES = 16 * 2**20
"""Size of the requests that a large file is put and read in."""
N_PARALLEL = 4
"""Requests under way at once for one file; an upload holds that many parts in memory."""
CONFLICTS = 20
"""Conditional puts in a row that may be refused although nothing stands at their name."""
MARKER = ".creating"
"""Stands while a store is being created and holds the digest of its first file, so that creators of one store finish
each other's work and those of another stop."""

_memory: dict[str, MemoryStore] = {}


@dataclass(frozen=True)
class Patience:
    """How long a request is repeated before its failure is reported."""

    budget_s: float = 120.0
    """No request is repeated later than this after the first try."""
    timeout_s: float = 60.0
    """An answer that takes longer counts as lost."""
    first_wait_s: float = 0.1
    max_wait_s: float = 10.0


class ObjectBackend:
    """The files of one store under a prefix of a bucket. See `backends.Backend` for what each method promises."""

    def __init__(
        self, store: ObjectStore, url: str, *, patience: Patience | None = None, cache_bytes: int = 256 * 2**20
    ) -> None:
        """
        Args:
            store: obstore's, rooted at the prefix of the store.
            url: where that is, for messages.
            cache_bytes: most recently read ranges kept in memory, over all files.
        """
        self._store = store
        self._url = url.rstrip("/")
        self._patience = patience or Patience()
        self._ranges = RangeReader(self._fetch, cache_bytes)

    @classmethod
    def from_url(cls, url: str, *, patience: Patience | None = None) -> ObjectBackend:
        """The backend at `s3://bucket/prefix`, `gs://bucket/prefix` or `memory://name` (this process only).

        Raises: ValueError for a URL with credentials or options in it; StorageError if obstore is not installed.
        """
        check_url(url)
        scheme, _, rest = url.partition("://")
        try:
            import obstore.store
        except ImportError as error:
            raise StorageError(
                f"{url} needs the package obstore, which is not installed. Install the extra: "
                "pip install 'sae-pipelines[s3]'."
            ) from error
        patience = patience or Patience()
        if scheme == "memory":
            return cls(_memory.setdefault(rest.strip("/"), obstore.store.MemoryStore()), url, patience=patience)
        store = obstore.store.from_url(
            url,
            client_options={
                "timeout": timedelta(seconds=patience.timeout_s),
                "connect_timeout": timedelta(seconds=min(5.0, patience.timeout_s)),
                "allow_http": True,  # only an endpoint that the environment names can be http
            },
            retry_config={
                "max_retries": 100,  # the budget is what ends it
                "retry_timeout": timedelta(seconds=patience.budget_s),
                "backoff": {
                    "init_backoff": timedelta(seconds=patience.first_wait_s),
                    "max_backoff": timedelta(seconds=patience.max_wait_s),
                    "base": 2,
                },
            },
        )
        return cls(store, url, patience=patience)

    def location(self, key: str = "") -> str:
        return f"{self._url}/{key}" if key else self._url

    def create(self, files: Iterable[tuple[str, Buffer]]) -> bool:
        remaining = iter(files)
        name, first = next(remaining)
        content = bytes(as_bytes(first))
        names = self.list("")
        if names and MARKER not in names:
            return False  # a finished store, or something else
        if MARKER not in names or self.size(name) is None:
            if not self._put_new(MARKER, hashlib.sha256(content).hexdigest().encode()):
                raise self._other_creation(MARKER)
            if self.size(name) is None:  # nobody has finished since the names were listed
                self._create_files(remaining)
                created = self._put_new(name, content)
                self.remove(MARKER)
                return created
        self.remove(MARKER)
        return False

    def _create_files(self, files: Iterator[tuple[str, Buffer]]) -> None:
        def put(key: str, data: bytes) -> None:
            if not self._put_new(key, data):
                raise self._other_creation(key)

        with ThreadPoolExecutor(N_PARALLEL) as pool:
            pending: deque[Future[None]] = deque()
            for key, buffer in files:
                pending.append(pool.submit(put, key, bytes(as_bytes(buffer))))
                if len(pending) >= 2 * N_PARALLEL:
                    pending.popleft().result()
            for future in pending:
                future.result()

    def _other_creation(self, key: str) -> AlreadyExistsError:
        return AlreadyExistsError(
            f"{self.location(key)} is left from the creation of a store with other contents that was not finished. If "
            f"nobody is creating a store there, remove everything under {self.location()}; or choose another path."
        )

    def read(self, key: str) -> bytes:
        data = self._call(key, lambda obstore: obstore.get(self._store, key).bytes().to_bytes())
        return bytes(data)

    def map(self, key: str) -> NDArray[np.uint8]:
        file = self.open(key)
        return file[0 : file.size]

    def open(self, key: str) -> RemoteFile:
        size = self.size(key)
        if size is None:
            raise NotFoundError(f"There must be a file at {self.location(key)}, but there is none.")
        return RemoteFile(self._ranges, key, size)

    def _fetch(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of a file that has as many, read-only; in several requests if they are many."""
        if stop - start <= PART_BYTES:
            return self._get_range(key, start, stop)
        data = np.empty(stop - start, np.uint8)

        def fetch(low: int) -> None:
            high = min(low + PART_BYTES, stop)
            data[low - start : high - start] = self._get_range(key, low, high)

        with ThreadPoolExecutor(N_PARALLEL) as pool:
            for _ in pool.map(fetch, range(start, stop, PART_BYTES)):
                pass
        data.flags.writeable = False
        return data

    def _get_range(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        data = self._call(key, lambda obstore: obstore.get_range(self._store, key, start=start, end=stop))
        return np.frombuffer(data, np.uint8)

    def size(self, key: str) -> int | None:
        try:
            return int(self._call(key, lambda obstore: obstore.head(self._store, key))["size"])
        except NotFoundError:
            return None

    def list(self, prefix: str) -> list[str]:
        found = self._call(prefix, lambda obstore: obstore.list_with_delimiter(self._store, prefix or None))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        views = (as_bytes(buffer) for buffer in buffers)
        head: list[memoryview] = []
        n_bytes = 0
        for view in views:
            head.append(view)
            n_bytes += view.nbytes
            if n_bytes > PART_BYTES:
                break
        else:
            if not self._put_new(key, b"".join(head)):
                raise self._taken(key)
            return
        # In parts, which are repeated one by one. There is no condition on a name put in parts; nobody else uses this.
        if self.size(key) is not None:
            raise self._taken(key)
        parts = _parts(itertools.chain(head, views))
        self._call(
            key,
            lambda obstore: obstore.put(
                self._store, key, parts, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=N_PARALLEL
            ),
            repeat=False,
        )

    def _taken(self, key: str) -> AlreadyExistsError:
        return AlreadyExistsError(f"A new file is to be written at {self.location(key)}, but one is there already.")

    def sync(self, prefix: str) -> None:
        pass

    def publish(self, source: str, key: str) -> bool:
        return self._put_new(key, self.read(source))

    def install(self, source: str, key: str) -> bool:
        try:
            self._call(source, lambda obstore: obstore.copy(self._store, source, key))
        except NotFoundError:
            return False
        self._ranges.forget(key)
        self._delete([source])
        return True

    def remove(self, key: str) -> None:
        below = f"{key}/" if key else None
        pages = self._call(key, lambda obstore: [*obstore.list(self._store, below)])
        self._delete([*([key] if key else []), *(entry["path"] for page in pages for entry in page)])

    def _delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._ranges.forget(key)
        try:
            self._call(keys[0] if keys else "", lambda obstore: obstore.delete(self._store, keys))
        except NotFoundError:  # unlike S3, other stores cannot delete again what is gone
            if len(keys) > 1:
                for key in keys:
                    self._delete([key])

    def _put_new(self, key: str, data: bytes) -> bool:
        """Creates an object unless another one has the name; True if what stands there is what was given."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        for _ in range(CONFLICTS):
            try:
                self._call(key, lambda obstore: obstore.put(self._store, key, data, mode="create", use_multipart=False))
            except (AlreadyExistsError, PreconditionError):
                try:
                    return self.read(key) == data
                except NotFoundError:  # a rival's put was under way and came to nothing, or what stood there is removed
                    time.sleep(self._patience.first_wait_s)
                    continue
            return True
        raise StorageError(
            f"The object store must either create {self.location(key)} or show what stands there, but {CONFLICTS} "
            "times it did neither. Run the same command again."
        )

    def _call(self, key: str, request: Callable[[Any], T], *, repeat: bool = True) -> T:
        """Sends a request, again after failures that may pass; obstore itself repeats those it knows to be harmless.

        Raises: NotFoundError; obstore's AlreadyExistsError and PreconditionError; StorageError for everything else,
            naming the URL and the last cause.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

        began, wait = time.monotonic(), self._patience.first_wait_s
        while True:
            try:
                return request(obstore)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise StorageError(f"{self.location()} must be in a bucket that exists. {_cause(error)}") from error
                raise NotFoundError(f"There must be a file at {self.location(key)}, but there is none.") from error
            except (AlreadyExistsError, PreconditionError):
                raise
            except GenericError as error:
                elapsed = time.monotonic() - began
                if not repeat or _is_final(error) or elapsed > self._patience.budget_s:
                    raise self._failed(key, error, elapsed) from error
            except (BaseError, OSError, PermissionError) as error:
                raise self._failed(key, error, time.monotonic() - began) from error
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, self._patience.max_wait_s)

    def _failed(self, key: str, error: Exception, elapsed: float) -> StorageError:
        return StorageError(
            f"The object store must answer for {self.location(key)}, but it did not in {elapsed:.1f} s (requests are "
            f"repeated for {self._patience.budget_s:g} s). Last cause: {_cause(error)} Nothing that was committed is "
            "lost: check endpoint, credentials and network, then run the same command again."
        )


def _parts(views: Iterable[memoryview]) -> Iterator[memoryview]:
    """The views, cut so that none is longer than a part: obstore copies what it is given."""
    for view in views:
        for start in range(0, view.nbytes, PART_BYTES):
            yield view[start : start + PART_BYTES]


def _is_final(error: Exception) -> bool:
    """Whether the server understood the request and refused it, so that asking again is of no use."""
    text = str(error)
    return "status code: 4" in text and not any(f"status code: {code}" in text for code in (408, 409, 429))


def _cause(error: Exception) -> str:
    """What obstore says, without its dump of the same in another form, on one line."""
    return " ".join(str(error).partition("Debug source:")[0].split())[:500].rstrip(".") + "."
