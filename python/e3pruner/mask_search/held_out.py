"""What masks do to the predictions of text that their search has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from e3pruner.evaluation.figures import Figures
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.models.skipping_forward import Mask

_OVER = "predicted"


def held_out_figures(problem: SearchProblem, masks: Sequence[Mask]) -> list[dict[str, float]]:
    """{"kl", "perplexity", "top1_agreement"} of each mask on the text of `problem`, which is entered: what
    `e3pruner.evaluate` gives for the pruned model."""
    numbers, measured = range(len(problem.batches)), problem.measurements.measured
    for batch in numbers:
        if unknown := [mask for mask in dict.fromkeys(masks) if _key(mask, batch) not in measured]:
            for mask, (hidden,) in problem.forward.last_hiddens([problem.rows(batch).inputs], unknown):
                problem.measure(_key(mask, batch), batch, partial(_means, problem, hidden), over=_OVER)
    found = []
    for mask in masks:
        table = [measured[_key(mask, batch)] for batch in numbers]
        kl, nll, agreement = problem.calibration.mean(table, numbers, _OVER)
        found.append({"kl": kl, "perplexity": math.exp(nll), "top1_agreement": agreement})
    return found


def _key(mask: Mask, batch: int) -> str:
    return f"figures {batch} {''.join('01'[runs] for runs in mask)}"


def _means(problem: SearchProblem, hidden: Tensor, batch: int) -> list[float]:
    rows, figures = problem.rows(batch), Figures()
    teacher = problem.teacher_of(batch).view_as(hidden)
    figures.add(problem.head, rows.at_predicted(hidden), rows.predicted, (problem.head, rows.at_predicted(teacher)))
    return [total / figures.tokens for total in (figures.kl, figures.cross_entropy, figures.agreements)]
