"""`ShuffledReader`: rows of a store in seeded random order, as batches for training.

`streams` says which row goes where. A thread loads one window ahead: it reads the contexts of the reader's own streams
in contiguous pieces of about a chunk and puts each usable row at its shuffled place in the window, which `windows` lays
out batch by batch. Batch b is a function of (store, settings, seed, b) alone, and the number b is all the state.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from storage.activations import SINK_MULTIPLE, ActivationStore
from storage.spec import PADDING, SINK, Split
from storage.streams import Order, Part, Run, Window, WindowPlan, dealt, parts
from storage.windows import Layout, Loaded, Memory, Prefetch, batches_of

if TYPE_CHECKING:
    import torch

    from storage.ring import Consumer

N_STREAMS = 16
"""Default number of streams: divisible by 1, 2, 4, 8 and 16 ranks."""
LOADER_THREADS = 2
"""Threads that test and move rows of different streams, both without Python's lock."""


class ShuffledReader:
    """Iterates over shuffled batches of one hook, forever or for some epochs. Padding is never given.

        for x in ShuffledReader(store, "model.layers.8", split="train", batch_size=4096, seed=0):
            ...                                             # x: [batch_size / world_size, d_in]

    Batch b consists of batch_size / n_streams rows of each stream. Rank r of n reads the streams v with v mod n = r,
    and only their bytes; the ranks' rows of batch b together are batch b of a single reader, whatever n is. Rows of an
    epoch that do not fill a batch go into the first batch of the next epoch; those of the last are dropped, fewer than
    batch_size. Two windows are in memory, of each the reader's own streams, and every window of which a batch is still
    held: a batch is a view of its window, so copy one that is kept for long.
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
        n_streams: int = N_STREAMS,
        rank: int = 0,
        world_size: int = 1,
        exclude_sinks: bool = True,
        sink_multiple: float = SINK_MULTIPLE,
        sink_hook: str | None = None,
        select: Mapping[str, Collection[int]] | None = None,
        max_same_context: float | None = None,
        epochs: int | None = None,
        start_batch: int = 0,
        ring: Consumer | None = None,
    ) -> None:
        """Args:
            batch_size: rows of a global batch, over all ranks; a multiple of `n_streams`.
            window_contexts: most contexts that are shuffled together.
            n_streams: V; a multiple of `world_size`.
            sink_hook: whose norms say which tokens are sinks, by default `hook`'s. Readers that differ in nothing but
                `hook` give the same rows.
            select: give only tokens whose value in each named table is among the given ones (`ActivationStore.select`).
            max_same_context: refuse settings whose `expected_same_context` is greater, if a larger window could help.
            epochs: passes over the split; None repeats forever.
            start_batch: number of the first batch to give.
            ring: read the shards in ascending order as they come, once; `epochs` must be 1. The batches end when fewer
                than batch_size rows are left.
        Raises: ValueError for settings that cannot work, or if the split is smaller than one batch.
        """
        self.store = store
        self.hook = store.spec.hook(hook).name
        self.sink_hook = store.spec.hook(sink_hook or hook).name
        self.split: Split = split
        self.batch_size, self.seed, self.window_contexts = batch_size, seed, window_contexts
        self.n_streams, self.rank, self.world_size = n_streams, rank, world_size
        self.exclude_sinks, self.sink_multiple, self.epochs = exclude_sinks, sink_multiple, epochs
        self.select = None if select is None else {name: sorted(values) for name, values in select.items()}
        self.ring = ring
        self._check_settings(start_batch)
        self._take = batch_size // n_streams
        self._streams = range(rank, n_streams, world_size)
        first, stop = store.split_range(split)
        order: Order = "shuffled" if ring is None else "ring"
        self._plan = WindowPlan(first, stop, store.spec.contexts_per_shard, window_contexts, seed, order)
        self._begun: list[tuple[int, int]] = []
        self._d_in, self._dtype = store.spec.hook(hook).d_in, store.spec.hook(hook).element_type
        self._batch = start_batch
        self._usable = self._count_usable_rows() if ring is None else None
        self.n_rows = (
            self._plan.n_contexts * store.spec.context_length if self._usable is None else int(self._usable.sum())
        )
        """Rows of one epoch; of a ring, sinks included, as they are not known before."""
        self.n_batches = None if epochs is None or ring is not None else epochs * self.n_rows // batch_size
        """Batches until the end, counted from batch 0; None without end, and for a ring."""
        if not self.n_rows or self.n_batches == 0:
            raise ValueError(
                f"The split {split!r} of {store.path} must have at least one batch of {batch_size} rows, but "
                f"{epochs or 1} epoch(s) of it have "
                f"{(epochs or 1) * self.n_rows} usable rows. Take a smaller batch_size, or collect more tokens."
            )
        self._check_mixing(max_same_context)

    @property
    def expected_same_context(self) -> float:
        """Expected number of other rows of a batch that share a given row's context: the lower, the better mixed.

        (B/V - 1) * (c - 1) / (n/V - 1), with c rows per context and n rows in the smallest window; at most c - 1.
        """
        rows_per_context = self.n_rows / self._plan.n_contexts
        rows_per_part = max(2.0, rows_per_context * self._plan.least_window / self.n_streams)
        share = min(1.0, (self._take - 1) / (rows_per_part - 1))
        return share * (rows_per_context - 1)

    def first_needed(self, batch: int) -> int:
        """The first shard of a ring that reading on from a batch needs, for a batch that has been given or is next."""
        return max((shard for count, shard in self._begun if count <= batch * self.batch_size), default=0)

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
        for batch in self._rank_rows(self._batch):
            self._batch += 1
            yield batch.view(torch.bfloat16) if bfloat16 else batch
            del batch  # else it would be held while the next is made

    def _rank_rows(self, first_batch: int) -> Iterator[torch.Tensor]:
        """This rank's rows of each batch, until the windows end."""
        prefetch = Prefetch()
        loader = threading.Thread(
            target=self._load_windows, args=(first_batch, prefetch), daemon=True, name="ShuffledReader"
        )
        loader.start()
        try:
            yield from batches_of(prefetch, len(self._streams), self._take)
        finally:
            prefetch.stop()
            loader.join()

    def _load_windows(self, first_batch: int, prefetch: Prefetch) -> None:
        """Body of the prefetch thread: loads windows in order, from the one with the first row of `first_batch` on."""
        memory = Memory(self._d_in, np.dtype(self._dtype))
        try:
            with ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="ShuffledReader") as pool:
                for window, count in self._windows_from(first_batch * self.batch_size, prefetch):
                    prefetch.wait_for_room()
                    if self.ring is not None:
                        shards = window.shards(self._plan.contexts_per_shard)
                        self.ring.wait(shards, prefetch.stopped, prefetch.starving)
                        self.store.forget(window.runs[0].start)
                        self._begun.append((count, min(shards)))
                    if prefetch.stopped.is_set():
                        return
                    prefetch.loaded.put(self._load(window, count, first_batch, memory, pool))
            prefetch.loaded.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the batch is asked for
            prefetch.loaded.put(error)

    def _windows_from(self, row: int, prefetch: Prefetch) -> Iterator[tuple[Window, int]]:
        """Windows from the one that holds row `row` of all on, each with the number of rows before it."""
        epoch = 0 if self.ring is not None else row // self.n_rows
        count = epoch * self.n_rows
        while self.epochs is None or epoch < self.epochs:
            for window in self._plan.windows(epoch):
                n = self._window_rows(window, prefetch)
                if prefetch.stopped.is_set():
                    return
                if count + n > row:
                    yield window, count
                count += n
            epoch += 1

    def _load(self, window: Window, count: int, first_batch: int, memory: Memory, pool: ThreadPoolExecutor) -> Loaded:
        """Reads the own streams' parts of a window, without what belongs to batches before the first."""
        import torch

        usable = np.concatenate([self._usable_mask(run) for run in window.runs])
        n_usable = usable.sum(axis=1)
        own = parts(window, n_usable, count, self._streams, self.n_streams)
        total = count + int(n_usable.sum())
        layout = Layout(
            starts=tuple(dealt(count, stream, self.n_streams) for stream in self._streams),
            ends=tuple(dealt(total, stream, self.n_streams) for stream in self._streams),
            take=self._take,
            first_batch=first_batch,
        )
        rows = memory.rows(layout.n_rows)
        jobs = []
        for number, part in enumerate(own):
            mask = usable[part.first : part.first + part.n_contexts].reshape(-1)
            jobs.append(pool.submit(self._scatter, window, part, mask, rows, layout.places(number), layout.waste))
        for job in jobs:
            job.result()
        before, after = zip(*(layout.loose(rows, number) for number in range(len(own))), strict=True)
        return Loaded(torch.from_numpy(rows)[: layout.n_whole * layout.batch_rows], list(before), list(after))

    def _scatter(
        self,
        window: Window,
        part: Part,
        usable: NDArray[np.bool_],
        rows: NDArray[Any],
        places: NDArray[np.int64],
        waste: int,
    ) -> None:
        """Puts the rows of a part at their places, in shuffled order, and what else is read at the place for waste."""
        if not part.n_rows:
            return
        rng = np.random.default_rng([self.seed, window.epoch, window.number, part.stream])
        wanted = np.flatnonzero(usable)[part.skip : part.skip + part.n_rows]
        destinations = np.full(len(usable), waste)
        destinations[wanted] = places[rng.permutation(part.n_rows)]
        as_items = np.dtype((np.void, rows.shape[1] * rows.itemsize))  # a row as one item: one copy per row
        target = rows.view(as_items).reshape(-1)
        low = 0
        for run in part.runs:
            for piece in self.store.activations_pieces(self.hook, run.start, run.stop):
                target[destinations[low : low + len(piece)]] = piece.view(as_items).reshape(-1)
                low += len(piece)

    def _usable_mask(self, run: Run) -> NDArray[np.bool_]:
        """Rows that may be given, bool [n_contexts, context_length]."""
        unwanted = np.uint8(PADDING | SINK if self.exclude_sinks else PADDING)
        mask = self.store.mask(self.sink_hook, run.start, run.stop, self.sink_multiple)
        usable: NDArray[np.bool_] = mask & unwanted == 0
        if self.select is not None:
            usable &= self.store.select(self.select, run.start, run.stop)
        return usable

    def _window_rows(self, window: Window, prefetch: Prefetch) -> int:
        """Usable rows of a window; of a ring, as soon as they are known."""
        if self._usable is not None:
            first = self._plan.first
            return sum(int(self._usable[run.start - first : run.stop - first].sum()) for run in window.runs)
        assert self.ring is not None
        self.ring.wait_known(window.shards(self._plan.contexts_per_shard), prefetch.stopped, prefetch.starving)
        if prefetch.stopped.is_set():
            return 0
        return sum(int(self._usable_mask(run).sum()) for run in window.runs)

    def _count_usable_rows(self) -> NDArray[np.int64]:
        """Usable rows of each context of the split."""
        plan = self._plan
        shards = sorted(plan.shards(0))
        runs = [
            Run(max(plan.first, shard * plan.contexts_per_shard), min(plan.stop, (shard + 1) * plan.contexts_per_shard))
            for shard in shards
        ]
        counts = [self._usable_mask(run).sum(axis=1, dtype=np.int64) for run in runs]
        return np.concatenate(counts) if counts else np.zeros(0, np.int64)

    def _settings(self) -> dict[str, Any]:
        """Everything that a batch depends on besides its number."""
        names = (
            *("hook", "split", "batch_size", "seed", "window_contexts", "n_streams"),
            *("exclude_sinks", "sink_multiple", "sink_hook", "select"),
        )
        return {"fingerprint": self.store.spec.fingerprint, "order": self._plan.order} | {
            name: getattr(self, name) for name in names
        }

    def _check_settings(self, start_batch: int) -> None:
        problems = []
        if self.n_streams < 1 or self.batch_size < 1 or self.batch_size % self.n_streams:
            problems.append(
                f"batch_size must be a positive multiple of n_streams, got {self.batch_size} and {self.n_streams}"
            )
        if self.world_size < 1 or self.n_streams % self.world_size:
            problems.append(
                f"n_streams must be a multiple of world_size, got {self.n_streams} and {self.world_size}: "
                "each stream is read by one rank"
            )
        if not 0 <= self.rank < self.world_size:
            problems.append(f"rank must lie in [0, world_size), got {self.rank} of {self.world_size}")
        if self.window_contexts < 1:
            problems.append(f"window_contexts must be at least 1, got {self.window_contexts}")
        if self.seed < 0:
            problems.append(f"seed must not be negative, got {self.seed}")
        if self.epochs is not None and self.epochs < 1:
            problems.append(f"epochs must be at least 1 or None, got {self.epochs}")
        if self.ring is not None and self.epochs != 1:
            problems.append(f"epochs must be 1 for a ring, which is read once, got {self.epochs}")
        if start_batch < 0:
            problems.append(f"start_batch must not be negative, got {start_batch}")
        if problems:
            raise ValueError("A ShuffledReader cannot work so: " + "; ".join(problems) + ".")

    def _check_mixing(self, most: float | None) -> None:
        expected, plan = self.expected_same_context, self._plan
        if most is None or expected <= most or plan.n_windows == 1:
            return
        least = math.ceil(plan.least_window * expected / most)
        enough = -(-plan.n_contexts // max(1, plan.n_contexts // least))
        raise ValueError(
            f"A row of a batch must share its context with at most {most:g} other rows on average, but with windows of "
            f"at most {self.window_contexts} contexts it is {expected:.1f}. Shuffle over {enough} contexts (more "
            "memory), take a smaller batch, or allow more."
        )
