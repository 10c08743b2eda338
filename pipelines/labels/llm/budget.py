"""A limit that concurrent calls cannot overrun: each reserves the most that it may cost before it leaves."""

import threading

from pipelines.labels.llm.ledger import NOTHING, Cost
from pipelines.labels.llm.settings import BudgetConfig


class BudgetSpent(Exception):
    """The next call might cost more than is left."""


class Budget:
    """What is left of the limits; may be used from several threads."""

    def __init__(self, limits: BudgetConfig, spent: Cost = NOTHING) -> None:
        """Args: spent: by earlier attempts."""
        self._limits, self._spent, self._reserved = limits, spent, NOTHING
        self._n_reserved = 0
        self._changed = threading.Condition()

    def reserve(self, bound: Cost) -> None:
        """Set `bound` aside. Where only calls under way stand against it, waits for what they really cost.

        Raises:
            BudgetSpent: it is more than is left.
        """
        with self._changed:
            while not self._fits(self._spent.plus(self._reserved).plus(bound)):
                if not self._n_reserved or not self._fits(self._spent.plus(bound)):
                    raise BudgetSpent
                self._changed.wait()
            self._reserved = self._reserved.plus(bound)
            self._n_reserved += 1

    def settle(self, bound: Cost, cost: Cost) -> None:
        """Put in place of a reservation what the call cost."""
        with self._changed:
            self._n_reserved -= 1
            self._reserved = self._reserved.plus(bound, -1) if self._n_reserved else NOTHING
            self._spent = self._spent.plus(cost)
            self._changed.notify_all()

    def left(self) -> BudgetConfig:
        """The limits that remain, reservations taken off."""
        with self._changed:
            gone = self._spent.plus(self._reserved)
            return BudgetConfig(
                calls=None if self._limits.calls is None else max(0, self._limits.calls - gone.calls),
                tokens=None if self._limits.tokens is None else max(0, self._limits.tokens - gone.tokens),
                money=None if self._limits.money is None else max(0.0, self._limits.money - gone.money),
            )

    def _fits(self, cost: Cost) -> bool:
        limits = self._limits
        return (
            (limits.calls is None or cost.calls <= limits.calls)
            and (limits.tokens is None or cost.tokens <= limits.tokens)
            and (limits.money is None or cost.money <= limits.money * (1 + 1e-12))
        )
