"""What predictions come to on text, from last hidden states: the one place where held-out figures are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import e3kernels as e3k
from e3pruner.models import OutputHead

Divergences = Callable[[OutputHead, Tensor, Sequence[Tensor]], list[float]]
"""The mean KL(teacher ‖ student) in nats of each student, from a head that all share and hidden states (N, H)."""


@dataclass
class Figures:
    """Cross-entropy in nats, and beside a teacher KL(teacher ‖ model) over the full vocabulary in nats and the
    positions where both rank the same token first: sums over the `tokens` that were predicted.
    """

    tokens: int = 0
    cross_entropy: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    compared: bool = False

    def add(
        self, head: OutputHead, hidden: Tensor, labels: Tensor, teacher: tuple[OutputHead, Tensor] | None = None
    ) -> None:
        """Add N tokens `labels` (N,) predicted from `hidden` (N, H); `teacher`: its head and its hidden states."""
        self.tokens += len(labels)
        self.compared = teacher is not None
        for tile in head.tiles(len(labels)):
            logits = head.logits(hidden[tile])
            if teacher is None:
                wanted = labels[tile].to(logits.device)
                self.cross_entropy += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
            else:
                self._compare(logits, teacher[0].logits(teacher[1][tile]), labels[tile])

    def _compare(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
        target, wanted = teacher.to(logits.device), labels.to(logits.device)
        _, stats = e3k.entropy_kl(logits, target, wanted, weighting="none", reduction="none", return_stats=True)
        assert stats.cross_entropy is not None  # there are labels
        self.cross_entropy += stats.cross_entropy.double().sum().item()
        self.kl += stats.kl.double().sum().item()
        self.agreements += int((logits.argmax(-1) == target.argmax(-1)).sum())

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.tokens + other.tokens,
            self.cross_entropy + other.cross_entropy,
            self.kl + other.kl,
            self.agreements + other.agreements,
            self.compared or other.compared,
        )

    def means(self) -> dict[str, float]:
        """{"perplexity"}, the exp of the mean cross-entropy; beside a teacher {"kl", "top1_agreement"} too."""
        result = {"perplexity": torch.tensor(self.cross_entropy / self.tokens, dtype=torch.float64).exp().item()}
        if self.compared:
            result |= {"kl": self.kl / self.tokens, "top1_agreement": self.agreements / self.tokens}
        return result


def divergences(head: OutputHead, teacher: Tensor, students: Sequence[Tensor]) -> list[float]:
    """`Divergences` one tile at a time; the teacher's logits are made once for all students."""
    sums = [0.0] * len(students)
    for tile in head.tiles(len(teacher)):
        target = head.logits(teacher[tile])
        for number, student in enumerate(students):
            loss = e3k.entropy_kl(head.logits(student[tile]), target, weighting="none", reduction="sum")
            sums[number] += float(loss)
    return [total / len(teacher) for total in sums]


def cross_entropies(head: OutputHead, labels: Tensor, students: Sequence[Tensor]) -> list[float]:
    """The mean −log p of `labels` (N,), in nats, under each of `students`, hidden states (N, H)."""
    sums = [0.0] * len(students)
    for tile in head.tiles(len(labels)):
        for number, student in enumerate(students):
            logits = head.logits(student[tile]).float()
            sums[number] += F.cross_entropy(logits, labels[tile], reduction="sum").item()
    return [total / len(labels) for total in sums]
