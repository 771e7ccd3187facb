"""The healed objective: of several masks the one whose model is best after a short recovery.

What a mask costs before recovery is a poor guide to what remains of it after: runs of neighbouring layers heal far
better than they look. A recovery of 4,096 tokens ranks masks almost as a long one does, so masks race through
recoveries that grow (successive halving, arXiv 1502.07943), and what each shows steers which masks join:

    value(x, t) = a_t + b·KL(x) + Σ_l c_l·x_l

with KL(x) the quadratic model's, x_l = 1 for a removed unit and t the tokens of a recovery; c is fitted by ridge
regression, a and b freely.

It stands in this room, though it trains: it chooses a mask, on the calibration text, and is charged and resumed as any
search is. `recovery` knows nothing of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.protocol import contiguous_masks, removal_mask, removed_units
from e3pruner.mask_search.study import Study
from e3pruner.models import find_layers, output_head
from e3pruner.models.stack import check_unquantised
from e3pruner.precision import autocast_dtype
from e3pruner.recovery import DistillOptions, distill
from e3pruner.recovery.teacher import RememberingTeacher
from e3pruner.storage import fingerprint
from e3pruner.surgery import PruningPlan, prune
from e3pruner.text.given import Given, sequences_of
from e3pruner.text.sequences import Sequences, joined
from e3pruner.vocabulary import check_integer, check_options

RUNGS = "16x4096,8x8192,4x16384"
_NEW = 0.25  # of a rung's masks: what the values of the rungs before promise most of
_RUNS = 0.25  # of the first rung's masks: runs of neighbours at least
_RIDGES = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Healing:
    """How masks are compared after recovery: `rungs`, "MASKSxTOKENS,...", each on more tokens and with fewer masks than
    the one before; `training`, the text that all of them learn from; `recover`, options of `e3pruner.distill`.

    Raises ValueError or TypeError naming what does not fit, a rung that has too little text among it.
    """

    training: Sequences
    rungs: list[tuple[int, int]]
    recover: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        training: Given | None,
        rungs: str,
        recover: Mapping[str, Any] | None,
        precision: str,
    ) -> Healing:
        check_unquantised("model", model, "the healed objective trains it; load it dequantised")
        if training is None:
            raise ValueError("objective='healed' needs training: the text that every mask's model learns from")
        options: dict[str, Any] = {"batch_size": 1, "precision": precision} | dict(recover or {})
        check_options("recover", options, DistillOptions)
        if taken := sorted({"steps", "eval_every", "ema"} & options.keys()):
            raise ValueError(f"recover={options}: {', '.join(taken)} follow from the tokens of a rung; leave them out")
        size, parsed = DistillOptions(**options), parse_rungs(rungs)
        text = sequences_of("training", training, output_head(model).weight.shape[0], model=model)
        length = text.shape[1]
        for _, tokens in parsed:
            if tokens > text.input_ids.numel():
                raise ValueError(
                    f"rungs={rungs!r}: training has {text.input_ids.numel():,} tokens, fewer than {tokens:,}"
                )
            if tokens < (least := size.batch_size * size.accumulation * length):
                raise ValueError(f"rungs={rungs!r}: {tokens} tokens are no step of {least} tokens")
        return cls(text, parsed, options)

    def said(self, problem: SearchProblem) -> str:
        """The budget in words, before anything of it is spent."""
        rungs = ", then ".join(f"{masks} masks on {tokens:,} tokens" for masks, tokens in self.rungs)
        trained = sum(masks * tokens for masks, tokens in self.rungs)
        return f"recoveries: {rungs}; {trained:,} tokens of training, {self.budget(problem):,.0f} token-passes"

    def budget(self, problem: SearchProblem) -> float:
        """Dense forward passes times tokens that all rungs cost at most: of masks that keep the largest units."""
        kept = sorted(problem.costs.units, reverse=True)[: problem.units.count - problem.drop]
        share = problem.costs.head + sum(kept)
        each = sum(masks * self.cost(problem, tokens, share) for masks, tokens in self.rungs)
        return each + self.of_teacher(problem)

    def cost(self, problem: SearchProblem, tokens: int, share: float) -> float:
        """Of one recovery, whose model is the `share` of the dense one: forward and back to the weights, and judged
        before and after."""
        return share * (3 * tokens + 2 * sum(problem.calibration.sizes["text"]))

    def of_teacher(self, problem: SearchProblem) -> float:
        """The teacher runs once over what is learnt from and over what is judged on."""
        return max(tokens for _, tokens in self.rungs) + sum(problem.calibration.sizes["text"])


def parse_rungs(rungs: str) -> list[tuple[int, int]]:
    """[(masks, tokens), ...] of "16x4096,8x8192". Raises ValueError unless masks fall and tokens rise."""
    found = [re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part) for part in rungs.split(",")]
    if not all(found):
        raise ValueError(f"rungs={rungs!r} must be MASKSxTOKENS, such as {RUNGS}")
    parsed = [(int(each[1]), int(each[2])) for each in found if each]
    for masks, tokens in parsed:
        check_integer(f"rungs={rungs!r}: masks", masks, 1)
        check_integer(f"rungs={rungs!r}: tokens", tokens, 1)
    pairs = list(pairwise(parsed))
    if any(b[0] > a[0] or b[1] <= a[1] for a, b in pairs):
        raise ValueError(f"rungs={rungs!r} must have fewer masks and more tokens from rung to rung")
    return parsed


@dataclass
class _Value:
    """What recoveries have shown: `masks` (N, F), the `rung` and the `value` of each."""

    study: Study
    masks: list[Tensor] = field(default_factory=list)
    rung: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)

    def add(self, masks: Sequence[Tensor], rung: int, values: Sequence[float]) -> None:
        self.masks += masks
        self.rung += [rung] * len(masks)
        self.value += values

    def predict(self, masks: Tensor, rung: int) -> Tensor:
        """The value (N,) of masks (N, F) on a rung: see the module."""
        seen, wanted = torch.stack(self.masks), torch.tensor(self.value, dtype=torch.float64)
        fixed = self._fixed(seen, torch.tensor(self.rung))
        ridge = min(_RIDGES, key=lambda each: _error_left_out(fixed, seen, wanted, each))
        level, units = _ridge(fixed, seen, wanted, ridge)
        return self._fixed(masks, torch.full((len(masks),), rung)) @ level + masks @ units

    def _fixed(self, masks: Tensor, rung: Tensor) -> Tensor:
        """KL(x), 1, and 1 on each rung but the first that has been measured."""
        later = sorted(set(self.rung))[1:]
        offsets = [(rung >= each).to(torch.float64) for each in later]
        return torch.stack([self.study.model.predict(masks), torch.ones(len(masks), dtype=torch.float64), *offsets], 1)


def _ridge(fixed: Tensor, units: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights of `fixed`, barely shrunk, and of `units`, shrunk by `ridge`."""
    both = torch.cat([fixed, units], 1)
    shrink = torch.cat([torch.full((fixed.shape[1],), 1e-6), torch.full((units.shape[1],), ridge)]).to(both)
    weights = torch.linalg.solve(both.T @ both + shrink.diag(), both.T @ wanted)
    return weights[: fixed.shape[1]], weights[fixed.shape[1] :]


def _error_left_out(fixed: Tensor, units: Tensor, wanted: Tensor, ridge: float) -> float:
    """The sum of squared errors of each value predicted from the others (PRESS)."""
    both = torch.cat([fixed, units], 1)
    shrink = torch.cat([torch.full((fixed.shape[1],), 1e-6), torch.full((units.shape[1],), ridge)]).to(both)
    hat = both @ torch.linalg.solve(both.T @ both + shrink.diag(), both.T)
    left = (wanted - hat @ wanted) / (1 - hat.diagonal()).clamp(min=1e-6)
    return float(left.square().sum())


def candidates(study: Study, first: Sequence[list[int]], count: int) -> list[Tensor]:
    """At most `count` different masks: `first`, then runs of neighbours, then the best measured ones, each two
    exchanges or more away from those before it, as long as there are such ones.
    """
    problem = study.problem
    runs = study.ascending(contiguous_masks(problem))
    leading = [removal_mask(problem, units) for units in first[: max(1, count // 2)]]
    pool = [*leading, *runs[: max(1, round(_RUNS * count))], *study.best_known(8 * count), *runs]
    chosen: list[Tensor] = []
    for least in (4, 1):  # entries that differ: two exchanges, then any
        for mask in pool:
            if len(chosen) < count and all(float((mask - other).abs().sum()) >= least for other in chosen):
                chosen.append(mask)
    return chosen


def heal(study: Study, found: Sequence[list[int]], healing: Healing) -> Iterator[dict[str, Any]]:
    """Yields one record per rung; "removed" of the last is the choice. `study`: of all that its problem has measured,
    which has been left, so that its model is whole; `found`: masks, as units, that the search ended with, the best
    first.
    """
    problem = study.problem
    race = _Race(problem, healing)
    value = _Value(study)
    masks = candidates(study, found, healing.rungs[0][0])
    for rung, (_, tokens) in enumerate(healing.rungs):
        results = race.run(masks, tokens)
        values = [after for _, after in results]
        value.add(masks, rung, values)
        order = sorted(range(len(masks)), key=values.__getitem__)
        yield {
            "removed": removed_units(problem, masks[order[0]]),
            "tokens": tokens,
            "masks": [removed_units(problem, mask) for mask in masks],
            "cut": [before for before, _ in results],
            "healed": values,
        }
        if rung + 1 < len(healing.rungs):
            masks = _following(value, [masks[number] for number in order], rung + 1, healing.rungs[rung + 1][0])


def _following(value: _Value, ranked: Sequence[Tensor], rung: int, count: int) -> list[Tensor]:
    """The masks of the next rung: the best of the last one, and new ones whose predicted value is below the worst of
    what would otherwise go on."""
    study = value.study
    pool = torch.cat(
        [study.best_known(256), contiguous_masks(study.problem), *(study.near(mask) for mask in ranked[:2])]
    ).unique(dim=0)
    known = torch.stack(value.masks)
    pool = pool[~(pool[:, None] == known).all(-1).any(-1)]
    kept = list(ranked[: count - round(_NEW * count)])
    others = list(ranked[len(kept) : count])
    if not len(pool) or not others:
        return list(ranked[:count])
    both = torch.cat([torch.stack(others), pool])
    order = value.predict(both, rung).argsort(stable=True)[: len(others)]
    return kept + [both[number] for number in order.tolist()]


class _Race:
    """Recoveries of masks, each once; one mask per rank at a time."""

    def __init__(self, problem: SearchProblem, healing: Healing) -> None:
        self.problem, self.healing, self.model = problem, healing, problem.model
        self.ranks = problem.calibration.ranks
        # All ranks judge by the text of all of them, or one would be easier to please than another.
        self.judge = [batch for share in self.ranks.gather_any(problem.batches) for batch in share]
        self.dtype = autocast_dtype(DistillOptions(**healing.recover).precision, self.model.device)
        self.teacher = RememberingTeacher(self.model, self.dtype)
        judged = [batch.identity for batch in self.judge]
        settings = [healing.recover, str(self.dtype), healing.training.identity, judged]
        self.key = fingerprint(settings)[:16]
        self.ranks.check_equal("training, recover or rungs", [self.key, healing.rungs])

    def run(self, masks: Sequence[Tensor], tokens: int) -> list[list[float]]:
        """KL on the calibration text, before and after a recovery on `tokens` tokens, of each of `masks`."""
        measured = self.problem.measurements
        keys = {self._name(mask, tokens): mask for mask in masks}
        missing = [key for key in keys if key not in measured.measured]
        for start in range(0, len(missing), self.ranks.count):
            group = missing[start : start + self.ranks.count]
            own = [0.0] * 3 * len(group)
            if self.ranks.number < len(group):
                began = time.perf_counter()
                values = self._recovered(keys[group[self.ranks.number]], tokens)
                own[3 * self.ranks.number : 3 * self.ranks.number + 3] = [*values, time.perf_counter() - began]
            found = self.ranks.sum(own)
            rows = {key: found[3 * number : 3 * number + 3] for number, key in enumerate(group)}
            measured.add({k: row[:2] for k, row in rows.items()}, {k: row[2] for k, row in rows.items()})
        problem, account = self.problem, self.problem.account
        account.pay("the teacher of recoveries", self.healing.of_teacher(problem), 0.0)
        for key, mask in keys.items():
            share = problem.costs.of_mask(problem.mask(removed_units(problem, mask)), 0)
            account.pay(key, self.healing.cost(problem, tokens, share), measured.seconds.get(key, 0.0))
        return [measured.measured[key] for key in keys]

    def _name(self, mask: Tensor, tokens: int) -> str:
        bits = "".join("01"[runs] for runs in self.problem.mask(removed_units(self.problem, mask)))
        return f"healed {tokens} {self.key} {bits}"

    def _recovered(self, mask: Tensor, tokens: int) -> list[float]:
        layers, sublayers = self.problem.units.removed(removed_units(self.problem, mask))
        plan = PruningPlan.of_removed(layers, len(find_layers(self.model)), sublayers=sublayers)
        text, options = self.healing.training, DistillOptions(**self.healing.recover)
        steps = tokens // (options.batch_size * options.accumulation * text.shape[1])
        student = prune(self.model, plan)
        result = distill(
            student,
            teacher=self.teacher,
            data=text[: tokens // text.shape[1]],
            held_out=joined(self.judge),
            plan=plan,
            steps=steps,
            eval_every=steps,
            progress=False,
            **self.healing.recover,
        )
        return [result.held_out[place]["kl"] for place in (0, -1)]
