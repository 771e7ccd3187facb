"""Evolution: exchange a few removed layers for kept ones, keep what is better on ever more text."""

from __future__ import annotations

import torch
from torch import Tensor

import e3kernels as e3k
from e3pruner.mask_search.method import Search, search_method
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import fitting, removed_share, removed_units, scores_of
from e3pruner.vocabulary import check_integer

_MOST_SWITCHES = 3
_LAST_BATCHES = 4  # that the survivors and their parent are compared on


@search_method("evolution", sublayers=True)
def evolution(problem: SearchProblem, *, generations: int = 20, offspring: int = 8, survivors: int = 2) -> Search:
    """Level switches at a fixed number of removed layers, KL as fitness (EvoPress, arXiv 2410.14649).

    A generation has `offspring` children of the best mask, each with 1 to 3 layers exchanged (fewer are likelier). They
    are compared on one batch, the `survivors` best and their parent on four. The first parent is drawn uniformly.
    """
    check_integer("generations", generations, 1)
    check_integer("offspring", offspring, 1)
    check_integer("survivors", survivors, 1)
    count = len(problem.batches)
    problem.expect(generations * (offspring + (survivors + 1) * min(count, _LAST_BATCHES)))
    uniform = torch.zeros(len(problem.free), dtype=torch.float64)
    parent = fitting(problem, e3k.gumbel_topk(uniform, problem.drop, seed=problem.seed).mask[None])[0]
    for generation in range(generations):
        children = _switched(problem, parent.expand(offspring, -1), generation + 1)
        first = scores_of(problem, children, [generation % count])
        ranked = sorted(range(len(children)), key=first.__getitem__)[:survivors]
        rivals = torch.cat([parent[None], children[ranked]])
        batches = sorted({(generation + shift) % count for shift in range(_LAST_BATCHES)})
        last = scores_of(problem, rivals, batches)
        parent = rivals[last.index(min(last))]
        yield {
            "score": min(last),
            "removed": removed_units(problem, parent),
            "removed_share": removed_share(problem, children),
        }
    return removed_units(problem, parent)


def _switched(problem: SearchProblem, parents: Tensor, step: int) -> Tensor:
    """Distinct children of `parents` (N, F): each with a random number of layers of either kind exchanged."""
    most = min(_MOST_SWITCHES, problem.drop, len(problem.free) - problem.drop)
    if most == 0:
        return parents[:1]
    sizes = torch.zeros(2 * len(parents), most, dtype=torch.float64)
    drawn = e3k.gumbel_topk(sizes, 1, seed=problem.seed, step=3 * step).mask.argmax(-1).view(2, -1)
    children = parents.clone()
    for row, switches in enumerate((1 + drawn.amin(0)).tolist()):
        # Random scores within each kind; the kind that may not be drawn lies far below.
        for kind, offset in ((1.0, 1), (0.0, 2)):
            logits = torch.where(parents == kind, 0.0, -1e6)
            chosen = e3k.gumbel_topk(logits, switches, seed=problem.seed, step=3 * step + offset).mask[row]
            children[row] = torch.where(chosen == 1, 1 - kind, children[row])
    distinct: Tensor = fitting(problem, children).unique(dim=0)
    return distinct
