"""What a search has spent, in two currencies: forward passes and seconds."""

from __future__ import annotations


class Account:
    """`cost`: dense forward passes times tokens. `seconds`: what the measurements took, whoever made them.

    A measurement is paid for once per search, also if an earlier search made it: methods are compared by what they
    need.
    """

    def __init__(self) -> None:
        self.cost = 0.0
        self.seconds = 0.0
        self._paid: set[str] = set()

    def owes(self, key: str) -> bool:
        """Whether the measurement `key` is still to be paid for."""
        return key not in self._paid

    def pay(self, key: str, cost: float, seconds: float) -> None:
        """Pay for the measurement `key`, unless it is paid for."""
        if self.owes(key):
            self._paid.add(key)
            self.cost += cost
            self.seconds += seconds
