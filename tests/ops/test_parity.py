"""Every operation on every backend, dtype, layout of its tensors and edge of its definition, against the reference in
fp64 on the same values: value, gradients and statistics.

The bound is `assert_no_worse`'s: what the textbook formula errs by in the same dtype, and one rounding; the linear
losses may round twice, as their logits are. Where the textbook has no number, what the reference errs by in that dtype.
Where the exact result is infinite or NaN, so is ours.
"""

import math
import os
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import operations
import pytest
import torch
import torch.nn.functional as F
from operations import LOSSES, OPERATIONS
from torch import Tensor

import e3kernels as e3k
from e3kernels import backends, textbook

INF, NAN = math.inf, math.nan
DEVICE = os.environ.get("E3_TEST_DEVICE", "cpu")  # `make gpu-offline` names another


def _junk(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, NAN if tensor.is_floating_point() else 10**6)


# The same values in other strides (the first row's, if expanded); what lies between would show if it were read.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "sliced": lambda tensor: torch.stack((tensor, _junk(tensor)), -1)[..., 0],
    "last-token": lambda tensor: torch.stack((_junk(tensor), tensor), 1)[:, -1] if tensor.dim() else tensor,
    "transposed": lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor,
    "expanded": lambda tensor: tensor[:1].expand_as(tensor) if tensor.dim() else tensor,
}


def _set(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(call: dict[str, Any]) -> None:
        if name in call:
            call[name][index] = value

    return change


def _excluded_by_both(call: dict[str, Any]) -> None:
    for name in ("student_logits", "teacher_logits", "student_bias", "teacher_bias"):
        if name in call:
            call[name][..., 1] = -INF


def _excluded_by_the_student(call: dict[str, Any]) -> None:
    _set("student_logits", (0, 1), -INF)(call)
    _set("student_bias", 1, -INF)(call)


def _excluded_by_the_teacher(call: dict[str, Any]) -> None:
    _set("teacher_logits", (slice(None), 1), -INF)(call)
    _set("teacher_bias", 1, -INF)(call)


def _nan(call: dict[str, Any]) -> None:
    _set("student_logits", (0, 1), NAN)(call)
    _set("student_hidden", (0, 1), NAN)(call)


# By name: options, and what to do to the tensors before they are laid out.
LOSS_EDGES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None] | None]] = {
    "plain": ({}, None),
    "mean": ({"reduction": "mean", "num_items": 5}, None),
    "masked": ({"token_mask": torch.tensor([True, True, False])}, None),
    "unlabelled": ({"labels": None, "kd_ratio": 1.0, "reduction": "sum", "weighting": "inverse"}, None),
    "mixed": ({"weighting": "mix", "kd_ratio": 1.0, "temperature": 2.0}, None),
    "capped": ({"student_softcap": 4.0, "student_scale": 0.7, "temperature": 0.5, "divergence": "forward"}, None),
    "no valid token": ({"labels": torch.full((operations.TOKENS,), -100), "reduction": "mean"}, _nan),
    "excluded by both": ({}, _excluded_by_both),
    "excluded by the student": ({"labels": None, "kd_ratio": 1.0}, _excluded_by_the_student),
    "padded": ({"divergence": "forward"}, _set("teacher_logprobs", (slice(None), -1), -INF)),
    "excluded by the teacher": ({}, _excluded_by_the_teacher),
    "NaN": ({}, _nan),
}
GUMBEL_EDGES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None] | None]] = {
    **{name: ({"relaxation": name}, None) for name in ("threshold", "softmax", "successive")},
    "none kept": ({"k": 0}, None),
    "all kept": ({"k": operations.VOCABULARY}, None),
    "ties": ({"noise_scale": 0.0}, _set("logits", (0, slice(1, 5)), 2.0)),
    "infinite": ({}, _set("logits", (slice(None), 0), INF)),
    "excluded": ({}, _set("logits", (slice(None), 1), -INF)),
    "NaN": ({}, _set("logits", (0, 1), NAN)),
}
GATE_EDGES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None] | None]] = {
    "per row": ({}, None),
    "closed": ({"gate": torch.zeros(())}, None),
    "open": ({"gate": torch.ones(1)}, None),
    "closed on infinity": ({"gate": torch.zeros(operations.TOKENS, 1)}, _set("branch_out", (0, 1), INF)),
    "per column": ({"gate": torch.linspace(0, 1, operations.VOCABULARY)}, None),
    "per element": ({"gate": torch.linspace(-1, 2, 21).view(operations.TOKENS, operations.VOCABULARY)}, None),
    "NaN": ({}, _set("branch_out", (0, 1), NAN)),
}
EDGES = {**dict.fromkeys(LOSSES, LOSS_EDGES), "gumbel_topk": GUMBEL_EDGES, "gated_residual": GATE_EDGES}


def _quick(backend: str, dtype: torch.dtype, edge: str) -> bool:
    """Under Triton's interpreter a call takes as long as a hundred of others."""
    return (
        backend != "triton" or DEVICE != "cpu" or (dtype == torch.float32 and edge in ("plain", "threshold", "per row"))
    )


CASES = [
    pytest.param(
        operation, backend, dtype, layout, edge,
        id=f"{operation}-{backend}-{str(dtype).removeprefix('torch.')}-{layout}-{edge}",
        marks=() if _quick(backend, dtype, edge) else pytest.mark.slow,
    )
    for (backend, operation), service in sorted(backends.services.items())
    if service.devices is None or DEVICE in service.devices
    for dtype in service.dtypes
    for layout in LAYOUTS
    for edge in EDGES[operation]
]  # fmt: skip


def _cast(call: dict[str, Any], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def cast(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)
        # With equal rows of a head all logits are equal, and the exact gradients 0: nothing to measure an error by.
        return value.clone() if layout is LAYOUTS["expanded"] and name.endswith("weight") else layout(value)

    return {name: cast(name, value) for name, value in call.items()}


def _arguments(operation: str, dtype: torch.dtype, layout: str, edge: str) -> dict[str, Any]:
    options, change = EDGES[operation][edge]
    call = operations.arguments(operation, dtype) | options
    if operation in LOSSES:
        call.setdefault("reduction", "none")
    if change is not None:
        change(call)
    return _cast(call, dtype, LAYOUTS[layout])


def _results(function: Callable[..., Any], operation: str, call: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Value, gradients of the differentiable inputs, and statistics if there are any."""
    leaves = {name: call[name].detach().requires_grad_() for name in operations.differentiable(operation)}
    value, *statistics = function(**(call | leaves))
    incoming = torch.linspace(0.5, 1.5, value.numel(), dtype=dtype).view(value.shape)
    gradients = torch.autograd.grad(value, list(leaves.values()), incoming.to(DEVICE, value.dtype))
    return [value.detach(), *gradients, *statistics]


def _ours(operation: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        if operation == "gumbel_topk":
            sample = e3k.gumbel_topk(**arguments)
            return sample.probs, sample.mask.detach()
        if operation == "gated_residual":
            return (e3k.gated_residual(**arguments),)
        loss, statistics = getattr(e3k, operation)(**arguments, return_stats=True)
        return loss, *(statistic for statistic in statistics if statistic is not None)

    return call


def _textbook(operation: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        if operation == "gated_residual":
            hidden, branch_out, gate = (arguments[name] for name in ("hidden", "branch_out", "gate"))
            return (hidden + gate.to(hidden.dtype) * (branch_out - hidden),)
        for model in ("student", "teacher"):
            parts = [arguments.pop(f"{model}_{part}", None) for part in ("hidden", "weight", "bias")]
            if parts[0] is not None:
                arguments[f"{model}_logits"] = F.linear(*parts)
        arguments = {name.removesuffix("_logits"): value for name, value in arguments.items()}
        return (getattr(textbook, operation.removeprefix("linear_"))(**arguments),)

    return call


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


@pytest.mark.parametrize(("operation", "backend", "dtype", "layout", "edge"), CASES, indirect=["backend"])
def test_equals_the_reference_in_fp64(operation, backend, dtype, layout, edge):
    call = _arguments(operation, dtype, layout, edge)
    ours = _results(_ours(operation), operation, call, dtype)
    plain = _cast(call, dtype, torch.Tensor.contiguous)
    with e3k.use_backend("reference"):
        exact = _results(_ours(operation), operation, _cast(call, torch.float64, torch.clone), dtype)
        same_dtype = _results(_ours(operation), operation, plain, dtype)
    # Of gumbel_topk and of the statistics there is no textbook.
    formula = [] if operation == "gumbel_topk" else _results(_textbook(operation), operation, plain, dtype)
    roundings = 2 if operation.startswith("linear") else 1  # of the logits and of what follows
    for mine, truth, peer, other in zip_longest(ours, exact, same_dtype, formula):
        assert mine.shape == truth.shape
        assert torch.equal(mine.isnan(), truth.isnan())
        infinite = truth.isinf()
        assert torch.equal(mine[infinite].double(), truth[infinite])
        finite = truth.isfinite()
        peer = peer if other is None or not other[finite].isfinite().all() else other
        allowed = _largest((peer.double() - truth)[finite]) + roundings * textbook.TOLERANCE[dtype] * (
            _largest(truth) + 1e-3
        )
        assert _largest((mine.double() - truth)[finite]) <= allowed
        assert mine[finite].isfinite().all()


def test_every_operation_is_in_the_matrix():
    assert set(EDGES) == set(OPERATIONS) == {operation for _, operation in backends.services}


@pytest.mark.parametrize("operation", ["entropy_kl", "topk_kl", "gumbel_topk", "gated_residual"])
def test_strides_change_no_bit(any_backend, operation):
    """A kernel reads the same values in the same order, wherever they lie; a matrix product need not."""
    contiguous = operations.arguments(operation) | ({"reduction": "none"} if operation in LOSSES else {})
    contiguous = _cast(contiguous, torch.float32, torch.Tensor.contiguous)
    expected = _results(_ours(operation), operation, contiguous, torch.float32)
    for layout in ("sliced", "last-token", "transposed"):
        strided = _cast(contiguous, torch.float32, LAYOUTS[layout])
        results = _results(_ours(operation), operation, strided, torch.float32)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, expected, strict=True)), layout


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_distillation_of_the_last_token(backend):
    if ("native", "entropy_kl") not in backends.services:
        pytest.skip("the compiled kernels are not built")
    student, teacher = torch.randn(2, 4, 3, 8)
    labels = torch.randint(8, (4, 3))
    with e3k.use_backend(backend):
        loss = e3k.entropy_kl(student[:, -1], teacher[:, -1], labels[:, -1], kd_ratio=0.5)
        same = e3k.entropy_kl(*(t[:, -1].contiguous() for t in (student, teacher, labels)), kd_ratio=0.5)
        one_label = e3k.entropy_kl(student[:, -1], teacher[:, -1], labels[0, 0].expand(4), kd_ratio=0.5)
    assert torch.equal(loss, same)
    assert one_label.isfinite()


@pytest.mark.parametrize("operation", ["linear_entropy_kl", "linear_topk_kl"])
@pytest.mark.parametrize("backend", sorted({name for name, _ in backends.services}), indirect=True)
def test_strided_biases_without_a_gradient(backend, operation):
    """Where no gradient is asked for, Triton takes another way: heads of 16 columns and more are multiplied on chip."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 4, 16, generator=generator)
    student_weight, teacher_weight = torch.randn(2, 20, 16, generator=generator)
    call: dict[str, Any] = {"student_hidden": student, "student_weight": student_weight, "reduction": "none"}
    if operation == "linear_topk_kl":
        stored = torch.randn(4, 20, generator=generator).log_softmax(-1).topk(3)
        call |= dict(zip(("teacher_logprobs", "teacher_ids"), stored, strict=True))
    else:
        call |= {"teacher_hidden": teacher, "teacher_weight": teacher_weight}
    wide = torch.randn(20, 2, generator=generator)
    wide[:, 1] = NAN
    for bias in (wide[:, 0], wide[:1, 0].expand(20)):
        biases = {f"{model}_bias": bias for model in ("student", "teacher")[: 1 if "topk" in operation else 2]}
        strided, contiguous = (
            getattr(e3k, operation)(**call, **{name: change(value) for name, value in biases.items()})
            for change in (lambda value: value, torch.Tensor.contiguous)
        )
        torch.testing.assert_close(strided, contiguous)
        assert strided.isfinite().all()


def test_strided_gradients_and_samples(any_backend):
    operator = getattr(torch.ops.e3.gumbel_topk_backward, any_backend)
    logits, incoming = torch.randn(2, 3, 7)
    probs = e3k.gumbel_topk(logits, 3).probs
    scalars = torch.tensor([1.0, 1.0], dtype=torch.float64)
    strided = (LAYOUTS["sliced"](tensor) for tensor in (incoming, logits, probs))
    assert torch.equal(operator(*strided, scalars, 3, 0, 0, 0), operator(incoming, logits, probs, scalars, 3, 0, 0, 0))
