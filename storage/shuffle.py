"""`ShuffledReader`: rows of a store in seeded random order, as batches for training.

Each epoch permutes the contexts of the split and cuts them in windows of `window_contexts`. A window is loaded into
memory by contiguous reads, one ahead of its use, its rows (without attention sinks) are permuted, and batches are cut
from the resulting stream, across the ends of windows and epochs. So batch b is a function of (store, settings, seed, b)
alone, and the number b is all the state there is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from storage.activations import SINK_MULTIPLE, ActivationStore
from storage.spec import Split

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class _Window:
    """Rows in memory, [n, d_in], and the numbers of those still to give, in order."""

    rows: NDArray[Any]
    order: NDArray[np.int64]


class _Prefetch:
    """Passes windows from the loading thread to the reader, and used buffers back: two buffers are all there is."""

    def __init__(self) -> None:
        self.loaded: queue.SimpleQueue[_Window | BaseException] = queue.SimpleQueue()
        self.free: queue.SimpleQueue[NDArray[Any] | None] = queue.SimpleQueue()
        self.stopped = False
        for _ in range(2):
            self.free.put(None)  # to be allocated when first needed

    def exchange(self, used: _Window | None) -> _Window:
        """The next window, for a used one. Raises what stopped the loader."""
        if used is not None:
            self.free.put(used.rows)
        window = self.loaded.get()
        if isinstance(window, BaseException):
            raise window
        return window

    def stop(self) -> None:
        """Ends the loader once it has finished the window that it is at."""
        self.stopped = True
        self.free.put(None)


class ShuffledReader:
    """Iterates over shuffled batches of one hook, forever or for some epochs.

        for x in ShuffledReader(store, "model.layers.8", split="train", batch_size=4096, seed=0):
            ...                                             # x: [batch_size / world_size, d_in]

    An epoch's rows that do not fill a batch go into the first batch of the next; at the very end they are dropped. Each
    of `world_size` readers with the same settings gets rows rank::world_size of every batch. At most two windows are in
    memory.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        *,
        split: Split = "train",
        batch_size: int,
        seed: int,
        window_contexts: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        exclude_sinks: bool = True,
        sink_multiple: float = SINK_MULTIPLE,
        epochs: int | None = None,
        start_batch: int = 0,
    ) -> None:
        """Args:
            batch_size: rows of a global batch, over all ranks.
            epochs: passes over the split; None repeats forever.
            start_batch: number of the first batch to give.
        Raises: ValueError for settings that cannot work, or if the split is smaller than one batch.
        """
        self.store = store
        self.hook = store.spec.hook(hook).name
        self.split: Split = split
        self.batch_size, self.seed, self.window_contexts = batch_size, seed, window_contexts
        self.rank, self.world_size = rank, world_size
        self.exclude_sinks, self.sink_multiple, self.epochs = exclude_sinks, sink_multiple, epochs
        self._first_context, stop = store.spec.split_range(split)
        self._n_contexts = stop - self._first_context
        self._check_settings(start_batch)
        self._batch = start_batch
        self._usable = self._count_usable_rows()
        self.n_rows = int(self._usable.sum())
        """Rows of one epoch."""
        self.n_batches = None if epochs is None else epochs * self.n_rows // batch_size
        """Batches until the end, counted from batch 0; None without end."""
        if not self.n_rows or self.n_batches == 0:
            raise ValueError(
                f"The split {split!r} of {store.path} must have at least one batch of {batch_size} rows, but "
                f"{epochs or 1} epoch(s) of it have "
                f"{(epochs or 1) * self.n_rows} usable rows. Take a smaller batch_size, or collect more tokens."
            )

    @property
    def expected_same_context(self) -> float:
        """Expected number of other rows of a batch that share a given row's context: the lower, the better mixed.

        (batch_size - 1) * (rows per context - 1) / (rows per window - 1)
        """
        rows_per_context = self.n_rows / self._n_contexts
        rows_per_window = max(2.0, rows_per_context * min(self.window_contexts, self._n_contexts))
        return (self.batch_size - 1) * (rows_per_context - 1) / (rows_per_window - 1)

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` goes on after the last batch given. The same for every rank."""
        return {"batch": self._batch, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the saved batch; iterate anew afterwards. The number of ranks may differ from that of the saving run.

        Raises: ValueError listing the settings that differ, since with others the same number means another batch.
        """
        saved, own = dict(state["settings"]), self._settings()
        differing = [
            f"{key}: saved {saved.get(key)!r}, here {own.get(key)!r}"
            for key in sorted({*saved, *own})
            if saved.get(key) != own.get(key)
        ]
        if differing:
            raise ValueError(
                f"The saved position belongs to a reader with other settings ({'; '.join(differing)}). Resume with "
                "those, or start anew."
            )
        self._batch = int(state["batch"])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches from the current position on, [batch_size / world_size, d_in] in the hook's own dtype."""
        import torch

        bfloat16 = self.store.spec.hook(self.hook).dtype == "bfloat16"
        rows = self._rank_rows(self._batch)
        while self.n_batches is None or self._batch < self.n_batches:
            values = next(rows)
            self._batch += 1
            tensor = torch.from_numpy(values)
            yield tensor.view(torch.bfloat16) if bfloat16 else tensor

    def _rank_rows(self, first_batch: int) -> Iterator[NDArray[Any]]:
        """This rank's rows of each batch, without end."""
        epoch, row = divmod(first_batch * self.batch_size, self.n_rows)
        prefetch = _Prefetch()
        loader = threading.Thread(
            target=self._load_windows, args=(epoch, row, prefetch), daemon=True, name="ShuffledReader"
        )
        loader.start()
        try:
            window = prefetch.exchange(None)
            while True:
                pieces, filled = [], 0
                while filled < self.batch_size:
                    if not len(window.order):
                        window = prefetch.exchange(window)
                    taken = window.order[: self.batch_size - filled]
                    window.order = window.order[len(taken) :]
                    # every rank counts from the batch's first row, and `filled` of its rows came before
                    mine = taken[(self.rank - filled) % self.world_size :: self.world_size]
                    pieces.append(np.take(window.rows, mine, axis=0))
                    filled += len(taken)
                yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        finally:
            prefetch.stop()
            loader.join()

    def _load_windows(self, epoch: int, row: int, prefetch: _Prefetch) -> None:
        """Body of the prefetch thread: loads windows in order, the first from its row `row` of the epoch on."""
        try:
            while True:
                contexts = np.random.default_rng([self.seed, epoch]).permutation(self._n_contexts)
                for number, start in enumerate(range(0, self._n_contexts, self.window_contexts)):
                    members = np.sort(contexts[start : start + self.window_contexts])
                    n_rows = int(self._usable[members].sum())
                    if row >= n_rows:
                        row -= n_rows
                        continue
                    buffer = prefetch.free.get()
                    if prefetch.stopped:
                        return
                    rows, usable = self._load(members, self._new_buffer() if buffer is None else buffer)
                    order = np.random.default_rng([self.seed, epoch, number]).permutation(usable)
                    prefetch.loaded.put(_Window(rows, order[row:]))
                    row = 0
                epoch += 1
        except BaseException as error:  # noqa: BLE001 - it is raised again where the batch is asked for
            prefetch.loaded.put(error)

    def _new_buffer(self) -> NDArray[Any]:
        hook = self.store.spec.hook(self.hook)
        n_rows = min(self.window_contexts, self._n_contexts) * self.store.spec.context_length
        return np.empty((n_rows, hook.d_in), hook.element_type)

    def _load(self, members: NDArray[np.int64], buffer: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The buffer with the rows of the given contexts (ascending), and the numbers of those that may be used."""
        length = self.store.spec.context_length
        data = buffer.reshape(-1, length, buffer.shape[1])
        usable = np.ones((len(members), length), bool)
        breaks = np.flatnonzero(np.diff(members) != 1) + 1
        for low, high in zip([0, *breaks], [*breaks, len(members)], strict=True):  # runs of neighbours
            start = self._first_context + int(members[low])
            stop = start + int(high - low)
            self.store.activations_numpy(self.hook, start, stop, out=data[low:high])
            if self.exclude_sinks:
                usable[low:high] = ~self.store.sink_mask(self.hook, start, stop, self.sink_multiple)
        return buffer, np.flatnonzero(usable)

    def _count_usable_rows(self) -> NDArray[np.int64]:
        """Usable rows of each context of the split."""
        spec = self.store.spec
        counts = np.full(self._n_contexts, spec.context_length, np.int64)
        if self.exclude_sinks:
            for start in range(0, self._n_contexts, spec.contexts_per_shard):
                stop = min(start + spec.contexts_per_shard, self._n_contexts)
                sinks = self.store.sink_mask(
                    self.hook, self._first_context + start, self._first_context + stop, self.sink_multiple
                )
                counts[start:stop] -= sinks.sum(axis=1)
        return counts

    def _settings(self) -> dict[str, Any]:
        """Everything that a batch depends on besides its number."""
        names = ("hook", "split", "batch_size", "seed", "window_contexts", "exclude_sinks", "sink_multiple")
        return {"fingerprint": self.store.spec.fingerprint} | {name: getattr(self, name) for name in names}

    def _check_settings(self, start_batch: int) -> None:
        problems = []
        if self.batch_size < 1 or self.world_size < 1 or self.batch_size % self.world_size:
            problems.append(
                f"batch_size must be a positive multiple of world_size, got {self.batch_size} and {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            problems.append(f"rank must lie in [0, world_size), got {self.rank} of {self.world_size}")
        if self.window_contexts < 1:
            problems.append(f"window_contexts must be at least 1, got {self.window_contexts}")
        if self.seed < 0:
            problems.append(f"seed must not be negative, got {self.seed}")
        if self.epochs is not None and self.epochs < 1:
            problems.append(f"epochs must be at least 1 or None, got {self.epochs}")
        if start_batch < 0:
            problems.append(f"start_batch must not be negative, got {start_batch}")
        if problems:
            raise ValueError("A ShuffledReader cannot work so: " + "; ".join(problems) + ".")
