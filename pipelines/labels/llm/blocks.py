"""A block of latents at a time: what an actor does, and how a budget is shared out. Plain classes that know no Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import RunError
from pipelines.labels.llm.budget import Budget
from pipelines.labels.llm.ledger import Cost
from pipelines.labels.llm.settings import BudgetConfig, LLMConfig
from pipelines.labels.llm.worker import Outcome, Task, Worker


class Block(NamedTuple):
    """What came of a block."""

    outcomes: tuple[Outcome, ...]
    """Some may be missing where there is trouble."""
    spent: Cost
    """Now, by this block."""
    trouble: str | None
    """Why it was not finished: the endpoint is down, or takes no questions."""


class BlockWorker:
    """A worker that is handed blocks, each with a share of the budget. Its server and ledger stay between them."""

    def __init__(self, config: LLMConfig, folder: Path, number: int) -> None:
        """Args: number: among the workers."""
        self._worker = Worker(config, folder, number)

    def ready(self) -> None:
        """Returns when the server is up: the constructor has waited for it."""

    def work(self, tasks: Sequence[Task], allowance: BudgetConfig) -> Block:
        """Label and judge a block, within the allowance."""
        before = self._worker.ledger.account().spent
        outcomes: list[Outcome] = []
        trouble = None
        try:
            outcomes.extend(self._worker.run(tasks, Budget(allowance)))
        except RunError as error:
            trouble = str(error)
        return Block(tuple(outcomes), self._worker.ledger.account().spent.plus(before, -1), trouble)

    def close(self) -> None:
        """End the server."""
        self._worker.close()


def share_of(left: BudgetConfig, n: int) -> BudgetConfig:
    """An n-th of what is left."""
    return BudgetConfig(
        calls=None if left.calls is None else left.calls // n,
        tokens=None if left.tokens is None else left.tokens // n,
        money=None if left.money is None else left.money / n,
    )


def as_cost(allowance: BudgetConfig) -> Cost:
    """A reservation of a whole allowance."""
    return Cost(allowance.calls or 0, allowance.tokens or 0, 0, allowance.money or 0.0)
