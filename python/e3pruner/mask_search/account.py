"""What a search has spent, in two currencies: forward passes and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from e3pruner.models.sublayers import attention_of


@dataclass(frozen=True)
class PassCosts:
    """The share of each unit and of the output head in the parameters that a dense forward pass multiplies by."""

    units: list[float]
    head: float
    units_per_layer: int

    @classmethod
    def of(cls, layers: nn.ModuleList, head_size: int, units_per_layer: int) -> PassCosts:
        stack_size = sum(p.numel() for p in layers.parameters())
        sizes = [stack_size / len(layers)]
        if units_per_layer == 2:
            attention = sum(p.numel() for layer in layers for p in attention_of(layer).parameters())
            sizes = [attention / len(layers), (stack_size - attention) / len(layers)]
        whole = stack_size + head_size
        return cls([size / whole for size in sizes] * len(layers), head_size / whole, units_per_layer)

    @property
    def stack(self) -> float:
        """All layers, without the head."""
        return sum(self.units)

    def of_mask(self, mask: Sequence[bool], shared: int) -> float:
        """What `mask` runs from unit `shared` on, and the head. A layer is begun as a whole."""
        first = shared - shared % self.units_per_layer
        return self.head + sum(cost for cost, runs in zip(self.units[first:], mask[first:], strict=True) if runs)


class Account:
    """`cost`: dense forward passes times tokens. `seconds`: what the measurements took, whoever made them.

    A measurement is paid for once per search, also if an earlier search made it: methods are compared by what they
    need.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is spent, nothing paid for."""
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
