"""The exponential moving average of the weights in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """e ← δ·e + (1 − δ)·θ after every step taken, θ the weights of `parameters`, δ `decay`; after the first one e = θ.

    `tensors`: e by the parameters' names; empty before the first step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.tensors: dict[str, Tensor] = {}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Behind a step."""
        if self.tensors:
            self._average(list(self.tensors.values()), [p.detach() for p in self.parameters.values()], None)
        else:
            self.tensors = {name: p.detach().clone() for name, p in self.parameters.items()}

    def exchange(self) -> None:
        """Puts e in the place of θ and θ in that of e, without a copy."""
        for name, average in self.tensors.items():
            self.parameters[name].data, self.tensors[name] = average, self.parameters[name].data

    def packed(self) -> dict[str, Tensor]:
        """What a saved state holds of it."""
        return {f"average/{name}": tensor for name, tensor in self.tensors.items()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a state holds."""
        found = {name: tensors.get(f"average/{name}") for name in self.parameters}
        self.tensors = {name: t.to(self.parameters[name].device) for name, t in found.items() if t is not None}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the parameters are e."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
