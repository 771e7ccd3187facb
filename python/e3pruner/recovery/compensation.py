"""Training-free compensation: what a cut took away, put back into weights that are there anyway.

Let x be the hidden state where layers were cut and y the one that the dense model has behind them. Two corrections
are known in closed form, and both fold into weights, so that the checkpoint stays an ordinary one:

- `scale` (after Prune&Comp): the stream behind the cut becomes α·x, α = Σ‖y‖ / Σ‖x‖. Every later layer reads the
  stream through a norm, which does not see a common factor; so instead of the stream, all that later layers *write*
  to it is divided by α. Embeddings, tied or not, stay as they are.
- `least-squares` (in the spirit of LinearPatch): the last projection before the cut, x = r + W·a + b, learns the best
  linear guess at y: W ← W + M with M = argmin Σ w_t ‖y_t − x_t − M·a_t‖² + λ·‖M‖², w_t = 1/‖y_t‖². The weights make
  it the relative error that counts, again because of the norms; else the few tokens whose hidden states are
  hundreds of times larger than all others would decide alone.

Cuts are treated from the input to the output, each with the hidden states that the corrected layers before it give.

A correction that helps the kind of text it was fitted to may harm others. Hence nothing applies one unasked, and "auto"
judges on text of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3pruner.models import find_layers, last_hidden, output_head
from e3pruner.models.stack import check_unquantised, evaluating
from e3pruner.models.streaming import check_resident
from e3pruner.models.sublayers import KINDS, writer
from e3pruner.precision import autocast_dtype
from e3pruner.recovery.loss import DistillLoss, HeldOut
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher
from e3pruner.surgery import PruningPlan
from e3pruner.text.given import Given, sequences_of
from e3pruner.text.sequences import Sequences

# Flat between 0.05 and 0.5 on SmolLM2 with 8,000 tokens of calibration; at 0.001 it fits noise.
RIDGE = 0.1


@dataclass(frozen=True)
class Cut:
    """Student layers from `layer` on follow the cut; the stream there should be the teacher's before layer `target`.

    Where the last layers were cut, `layer` and `target` are the numbers of layers of student and teacher.
    """

    layer: int
    target: int


@dataclass(frozen=True)
class Compensation:
    """What `compensate` did: the method, and of each that was tried the mean KL (nats per token) on what judges."""

    method: str
    kl: dict[str, float]


def find_cuts(kept: Sequence[int], layers: int) -> list[Cut]:
    """Where layers are missing between or behind the kept ones, of `layers` in all.

    One at the very start is no cut: nothing precedes it that could be corrected.
    """
    ends = [*kept, layers]
    return [Cut(i, ends[i]) for i in range(1, len(ends)) if ends[i] != ends[i - 1] + 1]


def compensate(
    pruned: PreTrainedModel,
    teacher: PreTrainedModel,
    plan: PruningPlan | Sequence[int],
    data: Given,
    *,
    judge: Given | None = None,
    method: str = "auto",
    batch_size: int = 8,
    precision: str = "auto",
) -> Compensation:
    """Correct `pruned`, in place and without training, for the layers that `plan` cut out of `teacher`.

    `plan`: a `PruningPlan`, or the indices of the layers kept. `data`: what a correction is fitted to, as `distill`
    takes it. `judge`: text of another kind than `data`, on which the KL is measured. `method`: "scale",
    "least-squares", "none", or "auto": the one of the three with the least KL on `judge`, which it needs, since text of
    the kind that was fitted cannot see what a correction does to others. A method that these layers do not allow loses
    there with KL ∞. A method asked for by name may go without `judge`; then the last quarter of `data`, N ≥ 2
    sequences, is held back from the fit, and the KL reported is of that kind alone.

    Raises ValueError, before anything is changed, for another method, a plan of other models, "auto" without `judge`,
    a `judge` that shares sequences with `data`, and too little data; with the model as it was for layers that a method
    asked for by name cannot correct.
    """
    methods = [method] if method != "auto" else list(METHODS)
    if methods[0] not in METHODS:
        raise ValueError(f"method={method!r} must be 'auto' or one of {tuple(METHODS)}")
    kept = list(plan.kept if isinstance(plan, PruningPlan) else plan)
    for name, model in (("pruned", pruned), ("teacher", teacher)):
        check_unquantised(name, model, "to correct weights, load it dequantised, in bfloat16 or float32")
    check_resident("pruned", pruned, "to correct its weights, load it with")
    layers = len(find_layers(teacher))
    if len(kept) != len(find_layers(pruned)) or kept[-1] >= layers:
        raise ValueError(f"plan keeps layers {kept}; the models have {len(find_layers(pruned))} and {layers}")
    if judge is None and method == "auto":
        raise ValueError(
            "judge=None: method='auto' is judged on text of another kind than data, which it might make worse; "
            f"give judge, or one of {tuple(METHODS)} as method"
        )
    fitted, judged = _texts(data, judge, pruned, teacher)
    dtype = autocast_dtype(precision, pruned.device)
    calibration = [part.trimmed().to(pruned.device) for part in fitted.split(batch_size)]
    held_out = HeldOut(DistillLoss(pruned, LiveTeacher(teacher), DistillOptions(), dtype), judged, batch_size)
    before = {name: p.detach().clone() for name, p in find_layers(pruned).named_parameters()}
    kl: dict[str, float] = {}
    best, least = before, float("inf")
    with evaluating(pruned), evaluating(teacher):
        for name in methods:
            _restore(pruned, before)
            try:
                for cut in find_cuts(kept, layers):
                    # One context a cut: within one, autocast would go on using its copies of weights changed since.
                    with torch.autocast(pruned.device.type, dtype, enabled=dtype is not None):
                        METHODS[name](pruned, teacher, cut, calibration)
                kl[name] = held_out.evaluate()["kl"]
            except UnsupportedLayerError:
                if method != "auto":
                    _restore(pruned, before)
                    raise
                kl[name] = float("inf")
            if kl[name] < least:
                best, least = {n: p.detach().clone() for n, p in find_layers(pruned).named_parameters()}, kl[name]
    _restore(pruned, best)
    return Compensation(min(kl, key=lambda name: kl[name]), kl)


def _texts(
    data: Given, judge: Given | None, pruned: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[Sequences, Sequences]:
    """The sequences that are fitted to, and those that judge."""
    vocabulary, models = output_head(pruned).weight.shape[0], {"pruned": pruned, "teacher": teacher}
    sequences = sequences_of("data", data, vocabulary, **models)
    if judge is None:
        if len(sequences) < 2:
            raise ValueError("data has one sequence; two or more are needed, as some are held back without judge")
        count = max(1, len(sequences) // 4)
        return sequences[:-count], sequences[-count:]
    judged = sequences_of("judge", judge, vocabulary, **models)
    if _texts_of(sequences) & _texts_of(judged):
        raise ValueError("judge is, or shares sequences with, data; it must be text of another kind")
    return sequences, judged


def _texts_of(sequences: Sequences) -> set[tuple[int, ...]]:
    return {tuple(ids[text].tolist()) for ids, text in zip(sequences.input_ids, sequences.text, strict=True)}


class UnsupportedLayerError(ValueError):
    """A decoder layer whose structure a compensation cannot use."""


@torch.no_grad()
def _restore(model: PreTrainedModel, values: dict[str, Tensor]) -> None:
    for name, p in find_layers(model).named_parameters():
        p.copy_(values[name])


class _ReachedError(Exception):
    """A forward pass has come as far as it was needed."""


@contextmanager
def _recorded(module: nn.Module, *, output: bool) -> Iterator[list[Tensor]]:
    """Collects what goes into `module`, or what comes out of it: then the pass ends there."""
    values: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
        if not output:
            values.append(inputs[0])
            return
        values.append(result[0] if isinstance(result, tuple) else result)
        raise _ReachedError

    hook = module.register_forward_hook(record)
    try:
        yield values
    finally:
        hook.remove()


def _run(batch: Sequences, *models: PreTrainedModel) -> None:
    for model in models:
        with suppress(_ReachedError):
            last_hidden(model, **batch.inputs)


def _projection(layer: nn.Module, kind: str) -> nn.Linear:
    """The linear module by which the "attention" or "mlp" of `layer` writes to the stream.

    Raises UnsupportedLayerError for a layer without one, as in a mixture of experts, or that normalises its writes.
    """
    with suppress(ValueError):
        if isinstance(module := writer(layer, kind), nn.Linear):
            return module
    raise UnsupportedLayerError(
        f"{type(layer).__name__} does not write to its residual stream by one linear projection"
    )


@torch.no_grad()
def _least_squares(student: PreTrainedModel, teacher: PreTrainedModel, cut: Cut, batches: list[Sequences]) -> None:
    """λ = RIDGE · the mean of the diagonal of Σ w·a·aᵀ."""
    last, behind = find_layers(student)[cut.layer - 1], find_layers(teacher)[cut.target - 1]
    projection = _projection(last, "mlp")
    multiplier = getattr(student.config, "residual_multiplier", 1.0)
    gram = cross = torch.zeros((), dtype=torch.float64, device=student.device)
    with (
        _recorded(projection, output=False) as inputs,
        _recorded(last, output=True) as xs,
        _recorded(behind, output=True) as ys,
    ):
        for batch in batches:
            _run(batch, student, teacher)
            x, a, y = (batch.at_text(values.pop().flatten(0, -2)).double() for values in (xs, inputs, ys))
            weighted = a / y.square().sum(-1, keepdim=True)
            gram = gram + weighted.T @ a
            cross = cross + weighted.T @ ((y - x) / multiplier)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    projection.weight += torch.linalg.solve(gram, cross).T.to(projection.weight.dtype)


@torch.no_grad()
def _scale(student: PreTrainedModel, teacher: PreTrainedModel, cut: Cut, batches: list[Sequences]) -> None:
    layers = find_layers(student)
    writes = [_projection(layer, kind) for layer in layers[cut.layer :] for kind in KINDS]
    before, behind = layers[cut.layer - 1], find_layers(teacher)[cut.target - 1]
    norms = torch.zeros(2, dtype=torch.float64, device=student.device)
    with _recorded(before, output=True) as xs, _recorded(behind, output=True) as ys:
        for batch in batches:
            _run(batch, student, teacher)
            norms += torch.stack(
                [batch.at_text(values.pop().flatten(0, -2)).double().norm(dim=-1).sum() for values in (xs, ys)]
            )
    for write in writes:
        for parameter in write.parameters():
            parameter.mul_(norms[0] / norms[1])


def _none(student: PreTrainedModel, teacher: PreTrainedModel, cut: Cut, batches: list[Sequences]) -> None:
    """Leave the cut as it is."""


METHODS: dict[str, Callable[[PreTrainedModel, PreTrainedModel, Cut, list[Sequences]], None]] = {
    "none": _none,
    "scale": _scale,
    "least-squares": _least_squares,
}
