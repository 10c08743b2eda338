"""`HarvesterPool`: harvesters as Ray actors, on as many nodes as the cluster has.

The driver hands out shard numbers and gets receipts; activations never pass through Ray. An actor that dies, alone or
with its node, is restarted wherever there is room, and its unfinished shards go to whoever is next: writing a shard
twice has the effect of writing it once.
"""

import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from pipelines.cluster.local import require_cpus, start_ray
from pipelines.config import RunConfig
from pipelines.errors import RunError
from pipelines.harvester import SHARDS_IN_FLIGHT, Harvester
from pipelines.models import ResolvedModel
from pipelines.stores import StorePlace, absolute
from storage import Receipt
from storage.leases import POLL_S, ShardQueue

MAX_DEATHS = 8
"""Deaths of actors in a row, without one finished shard between them, after which the stage fails."""


class HarvesterPool:
    """Harvesters at work on one store; inside a `ray_scope`, and used as a context manager.

    Only an actor that has started gets shards: where the CPUs suffice for some of the actors, those do all the work.
    """

    def __init__(self, config: RunConfig, path: StorePlace, resolved: ResolvedModel, n_shards: int) -> None:
        """Starts the actors.

        Args:
            n_shards: shards to be done; there are never more actors.
        Raises: UsageError if an actor asks for more CPUs than a local Ray has; RunError if Ray cannot be reached.
        """
        settings = config.collect
        require_cpus(config.ray, settings.cpus_per_worker, "collect.cpus_per_worker")
        start_ray(config.ray)
        import ray

        self._ray = ray
        # Ray repeats nothing by itself: a shard whose actor died is given to the next that is free, not kept for the
        # actor's return, which a full cluster may put off for ever.
        actor_class = ray.remote(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=SHARDS_IN_FLIGHT,
        )(Harvester)
        n_workers = min(n_workers_that_fit(config), n_shards)
        threads = threads_per_worker(config)
        self._actors = [
            actor_class.remote(absolute(path), resolved, config.model, settings.batch_contexts, threads)
            for _ in range(n_workers)
        ]
        self._starting = {self._ready(actor): actor for actor in self._actors}
        self._alive: list[Any] = []

    def receipts(self, queue: ShardQueue) -> Iterator[Receipt]:
        """Have the shards done; yields the receipt of each when it is durable, in no particular order.

        Ends when all are committed: shards that another driver is at are waited for, or taken over if it dies.

        Raises: what a harvester raised; RunError if actors die again and again, or cannot be started.
        """
        busy: dict[Any, tuple[Any, int]] = {}
        for actor in self._alive:
            self._hand_out(actor, queue, busy)
        deaths = 0
        while queue.open():
            under_way = [*busy, *self._starting]
            # With nothing to hand out, look now and then whether another driver has finished or died.
            ready = self._ray.wait(under_way, timeout=POLL_S if queue.waiting else None)[0] if under_way else []
            if not ready:
                if not under_way:
                    time.sleep(POLL_S)
                for actor in self._alive:
                    self._hand_out(actor, queue, busy)
                continue
            done = ready[0]
            if (started := self._starting.pop(done, None)) is not None:
                self._await_start(done)
                self._alive.append(started)
                self._hand_out(started, queue, busy)
                continue
            actor, shard = busy.pop(done)
            try:
                receipt: Receipt = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except self._ray.exceptions.RayActorError as error:
                queue.give_back(shard)
                if actor in self._alive:  # else its other shard has told already
                    deaths += 1
                    self._alive.remove(actor)
                    self._starting[self._ready(actor)] = actor
                if deaths >= MAX_DEATHS:
                    raise RunError(
                        f"collect workers died {deaths} times without finishing a shard between (last: "
                        f"{_first_line(error)}); most often memory is short: lower collect.batch_contexts or "
                        "collect.n_workers, and rerun to continue"
                    ) from error
                for other in self._alive:
                    self._hand_out(other, queue, busy)
                continue
            deaths = 0
            queue.done(shard)
            self._hand_out(actor, queue, busy)
            yield receipt

    def _hand_out(self, actor: Any, queue: ShardQueue, busy: dict[Any, tuple[Any, int]]) -> None:
        """Give a living actor shards until it has as many as overlap."""
        held = sum(holder is actor for holder, _ in busy.values())
        while held < SHARDS_IN_FLIGHT and actor in self._alive and (shard := queue.take()) is not None:
            busy[actor.harvest.remote(shard)] = (actor, shard)
            held += 1

    def _ready(self, actor: Any) -> Any:
        """Answered when the actor has started, however often it must be restarted before."""
        return actor.__ray_ready__.options(max_task_retries=-1).remote()

    def _await_start(self, done: Any) -> None:
        try:
            self._ray.get(done)
        except self._ray.exceptions.RayActorError as error:
            raise RunError(
                f"a collect worker could not be started or kept alive: {error}; rerun to continue"
            ) from error

    def __enter__(self) -> "HarvesterPool":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


def threads_per_worker(config: RunConfig) -> int:
    """Torch threads of one actor: its CPUs, at least one."""
    return max(1, int(config.collect.cpus_per_worker))


def n_workers_that_fit(config: RunConfig) -> int:
    """Actors to start: on this machine no more than leave each of their threads a core of its own.

    Ray itself counts CPUs, but shares of one (`cpus_per_worker: 0.25`) would let it start four one-thread forward
    passes on a core. With a GPU the forward pass is not on the cores, and a cluster may grow: there the config decides.
    """
    settings = config.collect
    if config.ray.address is not None or settings.gpus_per_worker:
        return settings.n_workers
    cpus = config.ray.num_cpus or os.cpu_count() or 1
    return max(1, min(settings.n_workers, cpus // threads_per_worker(config)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
