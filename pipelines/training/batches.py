"""The batches of a training job: one shuffled reader for each hook, shared by all SAEs that read it."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.training.job import MemberJob, TrainJob
from sae.parallel import Group
from storage import ActivationStore, Consumer, Ring, ShuffledReader

Batch = dict[tuple[str, str], Float[Tensor, "batch _"]]
"""Activations of one step in float32, by hook and by the hook whose norms say which tokens are sinks."""


class Batches:
    """Iterates over the batches of some members of a job from a step on, this rank's rows of each.

    Readers that differ in nothing but their hook give the same tokens, so an SAE of several hooks gets the rows that
    belong together. SAEs of different hooks may have different sinks, and then read other tokens.
    """

    def __init__(
        self,
        job: TrainJob,
        members: Sequence[MemberJob],
        store: ActivationStore,
        start: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        train = job.config
        self._consumer = _consumer(job)
        self._device = device
        wanted = dict.fromkeys((hook, member.hooks[0]) for member in members for hook in member.hooks)
        self._readers = {
            (hook, sink_hook): ShuffledReader(
                store,
                hook,
                split="train",
                batch_size=train.batch_size,
                seed=job.seed,
                window_contexts=train.shuffle_contexts,
                n_streams=train.streams,
                max_same_context=train.max_same_context,
                rank=rank,
                world_size=world_size,
                exclude_sinks=not job.sinks.train_on_them,
                sink_multiple=job.sinks.multiple,
                sink_hook=sink_hook,
                select=job.selection or None,
                epochs=None if self._consumer is None else 1,
                start_batch=start,
                ring=self._consumer,
            )
            for hook, sink_hook in wanted
        }

    def __iter__(self) -> Iterator[Batch]:
        if not self._readers:  # nothing to train here, but steps to keep up with
            yield from repeat({})
        # Not strict: in a ring, readers with different sinks have their last batch at different steps.
        for tensors in zip(*self._readers.values(), strict=False):
            yield {
                key: tensor.to(self._device, torch.float32) for key, tensor in zip(self._readers, tensors, strict=True)
            }

    def expected_same_context(self, member: MemberJob) -> float:
        """`ShuffledReader.expected_same_context` of what a member reads."""
        return self._readers[member.hooks[0], member.hooks[0]].expected_same_context

    def saved(self, step: int, group: Group) -> None:
        """The rank's state after `step` is durable; once all are, what only earlier steps needed may be deleted."""
        if self._consumer is None:
            return
        first = min((reader.first_needed(step) for reader in self._readers.values()), default=2**31)
        first = int(torch.stack(group.gather(torch.tensor(first))).min())  # waits for the checkpoints of all ranks
        if group.rank == 0:
            self._consumer.advance(first)


def of_member(batch: Batch, member: MemberJob) -> tuple[Float[Tensor, "batch _"], ...]:
    """The tensors that a member trains on."""
    return tuple(batch[hook, member.hooks[0]] for hook in member.hooks)


def _consumer(job: TrainJob) -> Consumer | None:
    if job.consumer is None:
        return None
    failure = None if job.failure is None else Path(job.failure)

    def failed() -> str | None:
        return failure.read_text(encoding="utf-8") if failure is not None and failure.exists() else None

    return Consumer(Ring.open(job.store), job.consumer, capacity=job.capacity, failure=failed)
