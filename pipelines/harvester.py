"""`Harvester`: runs the language model on one shard after another and commits each; knows no Ray.

    forward thread   shard 0 ▶ shard 1 ▶ shard 2 ▶ …
    writer thread              shard 0 ▶ shard 1 ▶ …         statistics, digests, fsync, commit

Activations go from the model straight into one of two buffers, which hold the bytes as they are stored: one is filled
while the other is written, and a third shard waits. On CUDA the buffers are pinned and the copies asynchronous.
"""

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import ModelConfig
from pipelines.models import LanguageModel, ResolvedModel
from pipelines.rundir import now
from pipelines.stores import StorePlace
from pipelines.versions import machine, versions
from storage import ActivationStore, ActivationWriter, Receipt, StoreSpec

SHARDS_IN_FLIGHT = 2
"""Calls of `Harvester.harvest` that are worth having at once: one in the forward pass, one being written."""
WRITER_NICENESS = 4
"""How much lower the writer thread's priority is than the forward pass's: it takes what that leaves of the cores, and
the two buffers bound how far it falls behind."""


class ShardBuffer:
    """Host memory for one shard, all hooks, in the stored dtype; used again and again."""

    def __init__(self, spec: StoreSpec, device: torch.device) -> None:
        self.tensors: dict[str, Tensor] = {}
        """[contexts_per_shard, context_length, d_in] per hook; page-locked where the model is on a CUDA device."""
        for hook in spec.hooks:
            shape = (spec.contexts_per_shard, spec.context_length, hook.d_in)
            dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(hook.dtype, torch.float32)
            self.tensors[hook.name] = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def arrays(self, n_contexts: int) -> dict[str, NDArray[Any]]:
        """The first contexts as the writer takes them: the same memory, uint16 for bfloat16."""
        rows = {name: tensor[:n_contexts] for name, tensor in self.tensors.items()}
        return {
            name: (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
            for name, value in rows.items()
        }


class DeviceCopies:
    """Copies activations to the host: at once on a CPU, on a CUDA stream of their own beside the forward pass."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, source: Tensor, target: Tensor) -> None:
        """Copy; `target` is complete once the next `finished` event has happened."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)  # its memory is not given to the next batch before it was read

    def finished(self) -> torch.cuda.Event | None:
        """What to wait for before the targets of all copies so far are read; None if they are complete."""
        return None if self._stream is None else self._stream.record_event()


@dataclass(frozen=True)
class _Filled:
    buffer: ShardBuffer
    n_contexts: int
    copied: torch.cuda.Event | None


class Harvester:
    """Fills shards of one store. The model comes with the first shard, whose caller hears what fails.

    Threads may call `harvest` together: the forward pass of one shard then overlaps the writing of another.
    """

    def __init__(
        self,
        path: StorePlace,
        resolved: ResolvedModel,
        config: ModelConfig,
        batch_contexts: int,
        n_threads: int | None,
    ) -> None:
        """
        Args:
            batch_contexts: contexts of one forward pass; the store's fingerprint must name the same number.
            n_threads: torch threads of the forward pass; None leaves torch's own choice.
        """
        self._resolved, self._config, self._n_threads = resolved, config, n_threads
        self._writer = ActivationWriter.open(path)
        self._store = ActivationStore.open(path, tail=True)
        self._hooks = [hook.name for hook in self._writer.spec.hooks]
        self._batch = batch_contexts
        # One thread runs the model, so that there is one team of OpenMP threads whoever calls.
        self._forward = ThreadPoolExecutor(1, "harvester-forward", initializer=_use_threads, initargs=(n_threads,))
        self._write = ThreadPoolExecutor(1, "harvester-writer", initializer=_yield_to_others)
        self._buffers: queue.SimpleQueue[ShardBuffer | None] = queue.SimpleQueue()
        for _ in range(SHARDS_IN_FLIGHT):
            self._buffers.put(None)  # allocated when first needed

    @cached_property
    def _lm(self) -> LanguageModel:
        lm = LanguageModel(self._resolved, self._config)
        if self._isolated:
            for hook in self._hooks:
                lm.check_isolation(hook)
        return lm

    @cached_property
    def _copies(self) -> DeviceCopies:
        return DeviceCopies(self._lm.device)

    @property
    def _isolated(self) -> bool:
        return bool(self._writer.spec.provenance["packing"]["isolate_documents"])

    @cached_property
    def _info(self) -> dict[str, Any]:
        """What each commit says of the machine."""
        device = self._lm.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {
            "device": f"{device.type} {name}",
            "forward_dtype": str(self._lm.model.dtype).removeprefix("torch."),
            "machine": machine(),
            "threads": self._n_threads,
            "versions": versions(),
        }

    def harvest(self, shard: int) -> Receipt:
        """Run the model on one shard's contexts and commit them; returns when they are durable.

        Batches are a function of the shard alone and never reach into another.
        """
        filled = self._forward.submit(self._fill, shard).result()
        return self._write.submit(self._commit, shard, filled).result()

    def harvest_all(self, shards: Iterable[int]) -> Iterator[Receipt]:
        """Receipts of shards in their order, forward pass and writing overlapped."""
        with ThreadPoolExecutor(SHARDS_IN_FLIGHT, "harvester-caller") as callers:
            pending: queue.SimpleQueue[Future[Receipt]] = queue.SimpleQueue()
            for n, shard in enumerate(shards):
                pending.put(callers.submit(self.harvest, shard))
                if n + 1 >= SHARDS_IN_FLIGHT:
                    yield pending.get().result()
            while not pending.empty():
                yield pending.get().result()

    def _fill(self, shard: int) -> _Filled:
        """Forward passes of one shard into a buffer; waits for a free one."""
        start, stop = self._writer.spec.shard_range(shard)
        contexts = self._store.contexts(start, stop)
        device = self._lm.device
        tokens, position = torch.from_numpy(contexts.tokens).long(), torch.from_numpy(contexts.position).long()
        if not self._isolated:
            position = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        if device.type == "cuda":  # a copy from pageable memory would wait for the forward passes under way
            tokens, position = (t.pin_memory().to(device, non_blocking=True) for t in (tokens, position))
        buffer = self._buffers.get()
        try:
            if buffer is None:
                buffer = ShardBuffer(self._writer.spec, device)
            for low in range(0, len(tokens), self._batch):
                rows = slice(low, min(low + self._batch, len(tokens)))
                for name, value in self._lm.capture(tokens[rows], position[rows], self._hooks).items():
                    self._copies.start(value, buffer.tensors[name][rows])
            return _Filled(buffer, stop - start, self._copies.finished())
        except BaseException:
            self._buffers.put(buffer)
            raise

    def _commit(self, shard: int, filled: _Filled) -> Receipt:
        """Body of the writer thread."""
        try:
            if filled.copied is not None:
                filled.copied.synchronize()
            info = self._info | {"time": now()}
            return self._writer.write_shard(shard, filled.buffer.arrays(filled.n_contexts), info=info)
        finally:
            self._buffers.put(filled.buffer)


def _use_threads(n_threads: int | None) -> None:
    if n_threads is not None:
        torch.set_num_threads(n_threads)


def _yield_to_others() -> None:
    """Lower the priority of this thread, and of the threads that it will start, where the system has priorities."""
    with suppress(AttributeError, OSError):
        thread = threading.get_native_id()  # Linux: a thread has a priority of its own, and starts with its maker's
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + WRITER_NICENESS)
