"""`LabellerPool`: Ray actors among which latents are shared out, each with a model server of its own or a shared one.

The driver hands out blocks of texts, with a share of the budget, and gets labels and answers. An actor that dies is
restarted, and its block goes to whoever is next; the ledger knows what was answered, so nothing is asked twice.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.cluster.local import start_ray
from pipelines.config import RayConfig
from pipelines.errors import RunError
from pipelines.labels.llm.blocks import Block, BlockWorker, as_cost, share_of
from pipelines.labels.llm.budget import Budget
from pipelines.labels.llm.client import EndpointDown
from pipelines.labels.llm.ledger import Cost
from pipelines.labels.llm.settings import LLMConfig
from pipelines.labels.llm.worker import Outcome, Task

MAX_DEATHS = 8
"""Deaths of actors in a row, without one finished block between them, after which the work stops."""
BLOCK = 8
"""Latents handed out at once: few, so that a death repeats little and the last actor is not waited for long."""


class LabellerPool:
    """Labellers at work; inside a `ray_scope`, and used as a context manager."""

    def __init__(self, config: LLMConfig, ray_config: RayConfig, folder: Path) -> None:
        """Starts the actors.

        Args: folder: of the ledger, on storage that all nodes share.
        Raises: RunError if Ray cannot be reached.
        """
        start_ray(ray_config)
        import ray

        self._ray = ray
        actor_class = ray.remote(num_cpus=0, num_gpus=config.gpus_per_worker, max_restarts=-1, max_task_retries=0)(
            BlockWorker
        )
        self._actors = [actor_class.remote(config, folder.resolve(), i) for i in range(config.n_workers)]
        self._starting = {self._ready(actor): actor for actor in self._actors}
        self._idle: list[Any] = []

    def run(self, tasks: Iterable[Task], budget: Budget) -> Iterator[Outcome]:
        """Outcomes of all tasks, block by block; those that the budget does not reach are `waiting`.

        Raises:
            EndpointDown: an endpoint is down or takes no questions; outcomes until then were yielded.
            RunError: actors die again and again, or cannot be started.
        """
        unfinished: list[Task] = []
        for block, outcomes in self._hand_out(_blocks(tasks), budget, len(self._actors)):
            by_latent = {task.latent: task for task in block}
            for outcome in outcomes:
                if outcome.status == "waiting":
                    unfinished.append(by_latent[outcome.latent])
                else:
                    yield outcome
        # Shares of a budget leave a rest that is too small for each of several; one actor gets all of it.
        for _, outcomes in self._hand_out(_blocks(unfinished), budget, 1):
            yield from outcomes

    def _hand_out(
        self, blocks: Iterator[list[Task]], budget: Budget, n_at_once: int
    ) -> Iterator[tuple[list[Task], tuple[Outcome, ...]]]:
        """Have blocks done by at most `n_at_once` actors; yields each with its outcomes."""
        again, busy = deque[list[Task]](), dict[Any, tuple[Any, list[Task], Cost]]()
        deaths, trouble, exhausted = 0, None, False
        while True:
            while self._idle and len(busy) < n_at_once and trouble is None and not exhausted:
                block = again.popleft() if again else next(blocks, None)
                if block is None:
                    exhausted = True
                    break
                allowance = share_of(budget.left(), n_at_once - len(busy))
                reserved = as_cost(allowance)
                budget.reserve(reserved)
                actor = self._idle.pop()
                busy[actor.work.remote(block, allowance)] = actor, block, reserved
            if not busy and (exhausted or trouble is not None):
                break
            done = self._ray.wait([*busy, *self._starting])[0][0]
            if (started := self._starting.pop(done, None)) is not None:
                self._await_start(done)
                self._idle.append(started)
                continue
            actor, block, reserved = busy.pop(done)
            try:
                found: Block = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except self._ray.exceptions.RayActorError as error:
                # What the dead actor spent stands in its ledger, among what others are spending: count all its share.
                budget.settle(reserved, reserved)
                again.append(block)
                exhausted = False
                self._starting[self._ready(actor)] = actor
                deaths += 1
                if deaths >= MAX_DEATHS:
                    raise RunError(
                        f"label workers died {deaths} times without finishing a block between (last: {error}); their "
                        "answers are kept, rerun to continue"
                    ) from error
                continue
            self._idle.append(actor)
            deaths = 0
            budget.settle(reserved, found.spent)
            trouble = trouble or found.trouble
            yield block, found.outcomes
        if trouble is not None:
            raise EndpointDown(trouble)

    def _ready(self, actor: Any) -> Any:
        """Answered when the actor and its server have started, however often it must be restarted before."""
        return actor.ready.options(max_task_retries=-1).remote()

    def _await_start(self, done: Any) -> None:
        try:
            self._ray.get(done)
        except self._ray.exceptions.RayActorError as error:
            raise RunError(f"a label worker could not be started: {error}") from error

    def __enter__(self) -> "LabellerPool":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        closing = [actor.close.remote() for actor in self._actors]
        self._ray.wait(closing, num_returns=len(closing), timeout=30.0)
        for actor in self._actors:
            self._ray.kill(actor)


def _blocks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    left = iter(tasks)
    while block := list(islice(left, BLOCK)):
        yield block
