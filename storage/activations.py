"""`ActivationStore`: reads a sealed activation store. `ActivationWriter` (in `writer`) makes one.

    store = ActivationStore.open("runs/quickstart/activations")
    x = store.activations("model.layers.8", 0, 4)          # [4, context_length, d_in], bfloat16
    store.contexts(0, 4).tokens                            # the token ids of the same contexts

Ranges are of contexts. Reads are contiguous copies out of memory maps; to train on shuffled rows use `ShuffledReader`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.backends import Backend, backend_for
from storage.commits import CommitLog
from storage.documents import DocumentIndex, Span
from storage.errors import CorruptionError, IncompleteError, NotFoundError
from storage.layout import RING, activations_array, norms_array, scales_array, table_array
from storage.quantisation import dequantise
from storage.rows import RowReader
from storage.spec import BOS, DELETED, FLAGS, PADDING, SINK, SPECIAL, TABLE_NAMES, Split, StoreSpec
from storage.statistics import Statistics
from storage.writer import (
    ActivationWriter,
    Path,
    Receipt,
    merged_statistics,
    read_first_retained,
    read_spec,
    read_tables,
    retained_train_shards,
)

if TYPE_CHECKING:
    import torch

__all__ = ["ActivationStore", "ActivationWriter", "Contexts", "Receipt"]

SINK_MULTIPLE = 3.0
"""A token whose norm reaches about this many median norms is an attention sink."""


class Contexts(NamedTuple):
    """What is known of each token, int32 [n_contexts, context_length] each."""

    tokens: NDArray[np.int32]
    document: NDArray[np.int32]
    position: NDArray[np.int32]


class ActivationStore:
    """Read access to one store. Threads may share it; processes open their own."""

    def __init__(self, backend: Backend, spec: StoreSpec, *, verify: bool, tail: bool) -> None:
        self.spec = spec
        self._backend = backend
        self._tail = tail
        self._committed: set[int] = set()
        self._log = CommitLog(backend, spec.fingerprint, spec.n_shards)
        self._files: Mapping[str, Any] = read_tables(backend, spec)["files"]
        self._verify = verify
        self._seal = None if tail else self._log.read_seal()
        self._first_retained = read_first_retained(backend) if RING in self._files else None
        self.first_kept = 0 if tail or self._first_retained is None else self._first_retained * spec.contexts_per_shard
        """The first context that is there; those before it were deleted on purpose, if the store was a ring."""
        self._tables = {name: RowReader(backend, table_array(spec, name), verify=verify) for name in spec.table_dtypes}
        self._activations, self._norms = (
            {hook.name: RowReader(backend, layout(spec, hook), verify=verify) for hook in spec.hooks}
            for layout in (activations_array, norms_array)
        )
        self._scales = {
            hook.name: RowReader(backend, scales_array(spec, hook), verify=verify)
            for hook in spec.hooks
            if hook.quantisation == "int8"
        }

    @classmethod
    def open(
        cls, path: Path, *, verify: bool = True, tail: bool = False, backend: Backend | None = None
    ) -> ActivationStore:
        """Opens a store for reading.

        Args:
            verify: test the checksum of every chunk when it is first read.
            tail: also open a store that is still being written; reading a shard that is not there yet raises
                IncompleteError.
        Raises: NotFoundError if there is no store; IncompleteError if it is not sealed; FormatError if it is of a newer
            format version.
        """
        backend = backend or backend_for(path)
        return cls(backend, read_spec(backend), verify=verify, tail=tail)

    @property
    def path(self) -> str:
        return self._backend.location()

    def split_range(self, split: Split) -> tuple[int, int]:
        """Contexts [start, stop) of a split, as far as they are there: of a ring, those that were retained."""
        start, stop = self.spec.split_range(split)
        return max(start, self.first_kept), stop

    def retained_range(self, split: Split) -> tuple[int, int]:
        """Contexts [start, stop) of a split that nobody will delete: all of them, unless the store is a ring."""
        start, stop = self.spec.split_range(split)
        return max(start, (self._first_retained or 0) * self.spec.contexts_per_shard), stop

    def missing(self) -> list[int]:
        """Shards that are not committed yet, ascending; looks at the directory and changes nothing."""
        return self._log.missing()

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids of all contexts, int32 [n_contexts, context_length]; read whole on first use."""
        return self._table("tokens", 0, self.spec.n_contexts)

    @cached_property
    def document(self) -> NDArray[np.int32]:
        """Row of each token's document in the caller's table of documents; read whole on first use."""
        return self._table("document", 0, self.spec.n_contexts)

    @cached_property
    def position(self) -> NDArray[np.int32]:
        """Position of each token in its document piece; read whole on first use."""
        return self._table("position", 0, self.spec.n_contexts)

    def contexts(self, start: int, stop: int) -> Contexts:
        """Tokens, documents and positions of contexts [start, stop)."""
        return Contexts(*(self._table(name, start, stop) for name in TABLE_NAMES))

    def sidecar(self, name: str) -> bytes:
        """A file that was given to `ActivationWriter.create`.

        Raises: NotFoundError if the store has none of that name; CorruptionError if it is not what was given.
        """
        if name not in self._files or "/" in name:
            known = sorted(key for key in self._files if "/" not in key)
            raise NotFoundError(f"{self.path} has no sidecar {name!r}; it has {', '.join(known) or 'none'}.")
        try:
            data = self._backend.read(name)
        except NotFoundError:
            data = None
        if data is None or (self._verify and hashlib.sha256(data).hexdigest() != self._files[name]["sha256"]):
            fact = "it is missing" if data is None else "it does not match its SHA-256"
            raise CorruptionError(
                f"{self._backend.location(name)} must be what the store was created with, but {fact}. Restore the file "
                "from a copy, or make the store anew."
            )
        return data

    def activations(self, hook: str, start: int, stop: int) -> torch.Tensor:
        """Activations of contexts [start, stop) in the hook's own dtype, [stop - start, context_length, d_in]; a copy.

        Raises: ValueError for an unknown hook or range; CorruptionError naming file and shard.
        """
        import torch

        tensor = torch.from_numpy(self.activations_numpy(hook, start, stop))
        return tensor.view(torch.bfloat16) if self.spec.hook(hook).dtype == "bfloat16" else tensor

    def activations_numpy(self, hook: str, start: int, stop: int, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """As `activations`, but in NumPy: uint16 holds the bits of bfloat16. Copied into `out` if it is given, which
        has the hook's `element_type`."""
        spec = self.spec.hook(hook)
        shape = (stop - start, self.spec.context_length, spec.d_in)
        flat = None if out is None else out.reshape(-1, spec.d_in)
        if spec.quantisation == "none":
            return self._rows(self._activations[spec.name], start, stop, flat).reshape(shape)
        quantised = self._rows(self._activations[spec.name], start, stop, None)
        scales = self._rows(self._scales[spec.name], start, stop, None)
        return dequantise(quantised, scales, spec.dtype, flat).reshape(shape)

    def compression_ratio(self, hook: str) -> float:
        """Bytes of the activations as the hook's dtype has them, per byte of their files (with scales, if any)."""
        spec = self.spec.hook(hook)
        readers = [self._activations[spec.name], *([self._scales[spec.name]] if spec.name in self._scales else [])]
        n_bytes = sum(
            self._backend.size(reader.array.file_key(shard)) or 0
            for reader in readers
            for shard in range(self.spec.n_shards)
        )
        held = self.spec.n_shards - len(self.missing())
        n_rows = min(held * self.spec.contexts_per_shard * self.spec.context_length, self.spec.n_tokens)
        return n_rows * spec.d_in * np.dtype(spec.element_type).itemsize / n_bytes if n_bytes else float("nan")

    def activations_pieces(self, hook: str, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Rows of contexts [start, stop) as `activations_numpy` gives them, in order, in pieces [n, d_in] of at most a
        chunk: views of the file where it is mapped and plain, and not to be written to."""
        self._check_range(start, stop)
        if self._tail and start < stop:
            self._require_committed(start, stop)
        spec, length = self.spec.hook(hook), self.spec.context_length
        row = start * length
        try:
            for piece in self._activations[spec.name].pieces(row, stop * length):
                if spec.quantisation == "none":
                    yield piece
                else:
                    scales = self._scales[spec.name].read(row, row + len(piece))
                    yield dequantise(piece, scales, spec.dtype)
                row += len(piece)
        except CorruptionError as error:
            self._explain(start, stop, error)
            raise

    def forget(self, context: int) -> None:
        """Lets go of the files that end before a context, so that a deleted one frees its space."""
        for reader in (*self._activations.values(), *self._scales.values(), *self._norms.values()):
            reader.forget(context * self.spec.context_length)

    def norms(self, hook: str, start: int, stop: int) -> NDArray[np.float32]:
        """L2 norm of each activation of contexts [start, stop), float32 [stop - start, context_length]."""
        return self._rows(self._norms[self.spec.hook(hook).name], start, stop, None).reshape(
            stop - start, self.spec.context_length
        )

    def table(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """A per-token table over contexts [start, stop) in its own type, [stop - start, context_length].

        Raises: ValueError for a table that the store does not have.
        """
        return self._table(name, start, stop)

    def sink_mask(self, hook: str, start: int, stop: int, multiple: float = SINK_MULTIPLE) -> NDArray[np.bool_]:
        """True for rows that no figure may count, bool [stop - start, context_length]: sinks, padding, deleted rows.

        A sink has position 0, or a norm that is not below `Statistics.sink_threshold(multiple)` (so also one that is
        not finite). `mask` tells sinks and padding apart.
        """
        mask: NDArray[np.bool_] = self.mask(hook, start, stop, multiple) & (SINK | PADDING | DELETED) != 0
        return mask

    def mask(self, hook: str, start: int, stop: int, multiple: float = SINK_MULTIPLE) -> NDArray[np.uint8]:
        """Bits `BOS`, `PADDING`, `SPECIAL`, `SINK` and `DELETED` of each token, uint8 [stop - start, context_length].

        Neither padding nor what was deleted is ever a sink.
        """
        self._check_range(start, stop)
        if FLAGS in self._tables:
            mask: NDArray[np.uint8] = self._table(FLAGS, start, stop) & np.uint8(BOS | PADDING | SPECIAL)
        else:
            mask = np.zeros((stop - start, self.spec.context_length), np.uint8)
        kept = min(max(start, self.first_kept), stop)
        mask[: kept - start] |= DELETED
        there = mask[kept - start :]
        below = self.norms(hook, kept, stop) < self.statistics(hook).sink_threshold(multiple)
        sinks = ~below | (self._table("position", kept, stop) == 0)
        there[sinks & (there & PADDING == 0)] |= SINK
        return mask

    def select(self, selection: Mapping[str, Collection[int]], start: int, stop: int) -> NDArray[np.bool_]:
        """True for tokens whose value in each named table is among the given ones, bool [stop - start, context_length].

        An empty selection takes every token, padding too.

        Raises: ValueError for a table that the store does not have.
        """
        self._check_range(start, stop)
        chosen = np.ones((stop - start, self.spec.context_length), bool)
        for name, values in selection.items():
            chosen &= np.isin(self._table(name, start, stop), np.array(sorted(values), np.int64))
        return chosen

    def document_spans(self, document: int) -> list[Span]:
        """Where a document's tokens are: (context, start, stop), by context; padding is left out.

        The first call reads the table of documents through once.

        Raises: ValueError for a document of which the store holds no token.
        """
        spans = self._document_index.spans(document)
        if not spans:
            raise ValueError(f"The store at {self.path} holds no token of document {document!r}.")
        return spans

    def document_activations(self, hook: str, document: int) -> torch.Tensor:
        """Activations of a document's tokens, in the order of `document_spans`, [n_tokens, d_in]; reads no other
        context."""
        import torch

        spans = self.document_spans(document)
        pieces = [self.activations(hook, span.context, span.context + 1)[0, span.start : span.stop] for span in spans]
        return torch.cat(pieces)

    @cached_property
    def _document_index(self) -> DocumentIndex:
        rows = table_array(self.spec, "document").rows_per_file  # one file of each table at a time
        return DocumentIndex(self.spec, self._table, rows)

    def statistics(self, hook: str) -> Statistics:
        """Statistics over all rows of a hook; with `tail`, over the shards committed when it is first asked for.

        Of a ring, over its retained training shards, also when others are there.

        Raises: IncompleteError if one of those is not committed yet.
        """
        return self._statistics[self.spec.hook(hook).name]

    @cached_property
    def _statistics(self) -> dict[str, Statistics]:
        if self._seal is not None:
            values = self._seal["statistics"]
        elif self._first_retained is None:
            values = merged_statistics(self._log, self.spec)
        else:
            shards = retained_train_shards(self.spec, self._first_retained)
            absent = set(shards) & set(self._log.missing())
            if absent:
                raise IncompleteError(f"{self.path} does not hold shard {min(absent)} yet; wait for its commit.")
            values = merged_statistics(self._log, self.spec, shards)
        return {name: Statistics.from_json(value) for name, value in values.items()}

    def _table(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name not in self._tables:
            raise ValueError(f"The store has no table {name!r}; it has {', '.join(self._tables)}.")
        self._check_range(start, stop)
        return self._tables[name].read(start, stop)

    def _rows(self, reader: RowReader, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        self._check_range(start, stop)
        if self._tail and start < stop:
            self._require_committed(start, stop)
        length = self.spec.context_length
        try:
            return reader.read(start * length, stop * length, out)
        except CorruptionError as error:
            self._explain(start, stop, error)
            raise

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.spec.n_contexts:
            raise ValueError(f"Contexts must lie in [0, {self.spec.n_contexts}], got [{start}, {stop}).")

    def _require_committed(self, start: int, stop: int) -> None:
        """Raises IncompleteError if a shard of the range is not committed yet, whatever stands in its place."""
        shards = self._shards(start, stop)
        if not shards <= self._committed:
            self._committed = set(self._log.committed())
        absent = sorted(shards - self._committed - self._log.tombstoned())
        if absent:
            raise IncompleteError(f"{self.path} does not hold shard {absent[0]} yet; wait for its commit.")

    def _explain(self, start: int, stop: int, error: CorruptionError) -> None:
        """Raises NotFoundError if the trouble is only that a shard of the range was deleted on purpose."""
        gone = sorted(self._shards(start, stop) & self._log.tombstoned())
        if gone:
            raise NotFoundError(
                f"Shard {gone[0]} of {self.path} was deleted on purpose after it had been read: the store was filled "
                f"as a ring. Read contexts from {(self._first_retained or 0) * self.spec.contexts_per_shard} on."
            ) from error

    def _shards(self, start: int, stop: int) -> set[int]:
        """Shards that hold contexts [start, stop)."""
        size = self.spec.contexts_per_shard
        return set(range(start // size, -(-stop // size)))
