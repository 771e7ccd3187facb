"""Gumbel-TopK: sample exact-K masks around the best one known, and learn from their divergences which layer to keep.

The logits θ of E³-Pruner (arXiv 2511.17205) are here, in units of the median layer, what a `QuadraticModel` of all
measurements so far says it costs to remove each layer. A straight-through gradient is not used: it needs the backward
pass and every removed layer, and leads away from good masks under Adam (docs/method.md). Magnitudes survive: a layer
that is fatal to remove keeps a logit far above the noise.
"""

from __future__ import annotations

import torch

from e3kernels.profiling import named_range
from e3pruner.search.bi import cosine_distance
from e3pruner.search.checks import check_choice, check_integer, check_positive
from e3pruner.search.problem import SearchProblem
from e3pruner.search.protocol import Search, layers_of, leave_one_out_scores, lowest, removed_share, sampled
from e3pruner.search.quadratic import QuadraticModel

_START_TOKENS = 1024  # calibration tokens of the importance start, which is corrected by all that follows
_LAST_NOISE = 0.4  # of the first


STARTS = ("kl", "bi", "uniform", "random")


def gumbel_topk(
    problem: SearchProblem,
    *,
    steps: int | None = None,
    samples: int = 8,
    noise: float = 0.7,
    finalists: int = 6,
    start: str = "kl",
) -> Search:
    """Importance start, `steps` rounds of `samples` masks on one batch each, final choice on all calibration tokens.

    Unless told, two steps for every unit that goes: the more go, the more pairs there are to learn about.

    1. I_l, the mean KL without layer l alone, is the prior of the model. Two masks start: the lowest I_l, and, of
       whole layers, the lowest block influence, which costs a dense pass and often knows better which layers may go
       together. With `start` "bi", "uniform" or "random" (in 0 … 1) such values alone take their place, scaled to add
       up to the KL of their mask.
    2. Each step draws samples − 1 masks, the K largest of θ + κ·g, beside the model's own best mask, measures them on
       the step's batch and fits the model again. κ falls geometrically from `noise` to 0.4 of it.
    3. Of the masks measured so far the model's `finalists` best are measured on all batches, and so are both starts:
       the best of them is final, and on the calibration tokens never worse than where it began.
    """
    steps = 2 * problem.drop if steps is None else steps
    check_integer("steps", steps, 1)
    check_integer("samples", samples, 2)
    check_integer("finalists", finalists, 1)
    check_positive("noise", noise)
    check_choice("start", start, STARTS)
    batches_of_start = _start_batches(problem) if start == "kl" else range(0)
    problem.expect(
        problem.units.count * len(batches_of_start) + steps * samples + (finalists + 3) * len(problem.batches)
    )
    starts = _starts(problem, start, batches_of_start)
    free = problem.free
    chosen = [set(lowest(problem, values)) for values in starts]
    first = torch.tensor([[float(unit in each) for unit in free] for each in chosen], dtype=torch.float64)
    importance = starts[0] if start == "kl" else _in_nats(problem, starts[0])
    model = QuadraticModel(torch.tensor([importance[unit] for unit in free], dtype=torch.float64), _kinds(problem))
    best = first[0]
    yield {"importance": importance, "removed": layers_of(problem, best)}

    masks, batches, scores = best.new_empty(0, len(free)), torch.empty(0, dtype=torch.int64), best.new_empty(0)
    for step in range(steps):
        batch = step % len(problem.batches)
        kappa = noise * _LAST_NOISE ** (step / max(1, steps - 1))
        logits = model.marginal(best) / model.scale
        around = sampled(problem, logits.expand(samples - 1, -1), kappa, step)
        drawn = torch.cat([best[None] if step else first, around]).unique(dim=0)
        found = problem.score([problem.mask(layers_of(problem, mask)) for mask in drawn], [batch])
        masks = torch.cat([masks, drawn])
        batches = torch.cat([batches, torch.full((len(drawn),), batch)])
        scores = torch.cat([scores, scores.new_tensor(found)])
        with named_range("optimizer"):
            model.fit(masks, batches, scores)
            best = model.descend(best)
        yield {
            "score": sum(found) / len(found),
            "removed": layers_of(problem, best),
            "removed_share": removed_share(problem, drawn),
            "logits": logits.tolist(),
            "noise_scale": kappa,
            "drop": problem.drop,
        }

    known = torch.cat([best[None], masks.unique(dim=0)])
    order = model.predict(known).argsort(stable=True)[:finalists]
    last = [layers_of(problem, mask) for mask in torch.cat([first, known[order]]).unique(dim=0)]
    found = problem.score([problem.mask(layers) for layers in last])
    removed = last[found.index(min(found))]
    yield {"score": min(found), "removed": removed, "finalists": last, "scores": found}
    return removed


def _starts(problem: SearchProblem, start: str, batches: range) -> list[list[float]]:
    """One value a unit for each mask to start from; those of the prior come first."""
    if start == "kl":
        influence = [problem.state_distance(1, cosine_distance)] if problem.units.a_layer == 1 else []
        return [leave_one_out_scores(problem, batches), *influence]
    if start == "bi":
        return [problem.state_distance(1, cosine_distance)]
    if start == "uniform":
        return [[1.0] * problem.units.count]
    generator = torch.Generator().manual_seed(problem.seed)
    return [torch.rand(problem.units.count, dtype=torch.float64, generator=generator).tolist()]


def _in_nats(problem: SearchProblem, values: list[float]) -> list[float]:
    """`values` in the unit of KL: scaled so that those of their lowest mask add up to its KL on the first batch."""
    removed = lowest(problem, values)
    (kl,) = problem.score([problem.mask(removed)], [0])
    total = sum(values[unit] for unit in removed)
    return [value * kl / total for value in values]


def _kinds(problem: SearchProblem) -> torch.Tensor:
    """The number of the group of each free unit (F,): only units of one group may change places."""
    number = {unit: index for index, (members, _) in enumerate(problem.units.groups) for unit in members}
    return torch.tensor([number[unit] for unit in problem.free])


def _start_batches(problem: SearchProblem) -> range:
    """The first batches, until they hold enough tokens."""
    tokens = 0
    for number, batch in enumerate(problem.batches, start=1):
        tokens += batch.numel()
        if tokens >= _START_TOKENS:
            return range(number)
    return range(len(problem.batches))
