"""What masks do to the predictions of text that their search has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from e3pruner.evaluation.figures import Figures
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.models.skipping_forward import Mask

_OVER = "predicted"


def held_out_figures(problem: SearchProblem, masks: Sequence[Mask]) -> list[dict[str, Any]]:
    """{"kl", "perplexity", "top1_agreement"} of each mask on the text of `problem`, which is entered: what
    `e3pruner.evaluate` gives for the pruned model; and "sequences", its KL on each sequence."""
    numbers, measured = range(len(problem.batches)), problem.measurements.measured
    for batch in numbers:
        if unknown := [mask for mask in dict.fromkeys(masks) if _key(mask, batch) not in measured]:
            for mask, (hidden,) in problem.forward.last_hiddens([problem.rows(batch).inputs], unknown):
                problem.measure(_key(mask, batch), batch, partial(_means, problem, hidden), over=_OVER)
    found = []
    for mask in masks:
        table = [measured[_key(mask, batch)] for batch in numbers]
        kl, nll, agreement = problem.calibration.mean([row[:3] for row in table], numbers, _OVER)
        of_each = {"kl": [value for row in table for value in row[3:]]}
        found.append({"kl": kl, "perplexity": math.exp(nll), "top1_agreement": agreement, "sequences": of_each})
    return found


def _key(mask: Mask, batch: int) -> str:
    return f"figures and sequences {batch} {''.join('01'[runs] for runs in mask)}"


def _means(problem: SearchProblem, hidden: Tensor, batch: int) -> list[float]:
    """KL, cross-entropy and agreement of the batch, then the KL of each sequence."""
    rows, whole, each = problem.rows(batch), Figures(), []
    teacher = problem.teacher_of(batch).view_as(hidden)
    for row, *states in zip(rows.split(1), hidden.split(1), teacher.split(1), strict=True):
        student, target = map(row.at_predicted, states)
        figures = Figures()
        figures.add(problem.head, student, row.predicted, (problem.head, target))
        whole += figures
        each.append(figures.kl / figures.tokens)
    return [total / whole.tokens for total in (whole.kl, whole.cross_entropy, whole.agreements)] + each
