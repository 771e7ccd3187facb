"""From a public loss function's arguments to its operator, and back to loss and statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e3kernels.backends import resolve
from e3kernels.contract import DIVERGENCES, REDUCTIONS, WEIGHTINGS
from e3kernels.ops.common.arguments import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_device,
    check_dtype,
    check_number,
    check_range,
    check_shape,
    checks_values,
    code,
    scalar_tensor,
)
from e3kernels.registration import Operator


class TokenStats(NamedTuple):
    """Per-token statistics of the shape of the tokens, fp32 (fp64 for fp64 inputs), detached; 0 on invalid tokens.

    `kl` is the chosen divergence without T²; `cross_entropy` is None without labels; `weight` is w.
    """

    kl: Tensor
    teacher_entropy: Tensor
    cross_entropy: Tensor | None
    weight: Tensor


LossResult = Tensor | tuple[Tensor, TokenStats]


class LossOptions(NamedTuple):
    """The options that all four losses have in common."""

    temperature: float
    weighting: str
    gamma: float
    kd_ratio: float
    divergence: str
    beta: float
    ignore_index: int
    num_items: int | Tensor | None
    student_softcap: float | None
    student_scale: float
    reduction: str
    return_stats: bool

    def check(self, has_labels: bool) -> None:
        """Raise ValueError for a value out of its range, or for options that exclude one another."""
        check_number("temperature", self.temperature, 0)
        check_number("gamma", self.gamma, 0, open_low=False)
        check_number("kd_ratio", self.kd_ratio, 0, 1, open_low=False)
        check_model("student", self.student_softcap, self.student_scale)
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise ValueError(f"beta is {self.beta}; jsd needs it strictly between 0 and 1")
        if self.weighting == "mix" and self.kd_ratio != 1:
            raise ValueError(
                f"kd_ratio is {self.kd_ratio}; with weighting='mix' the teacher's entropy sets it: leave 1"
            )
        if not has_labels and (self.weighting == "mix" or self.kd_ratio < 1):
            raise ValueError(
                f"labels is None; weighting={self.weighting!r} with kd_ratio={self.kd_ratio} needs them for its "
                "cross entropy"
            )
        if self.num_items is not None and self.reduction != "mean":
            raise ValueError(f"num_items is given with reduction={self.reduction!r}; it belongs to reduction='mean'")

    @property
    def scalars(self) -> tuple[float, ...]:
        """The six scalars that all loss operators begin with."""
        cap = 0.0 if self.student_softcap is None else self.student_softcap
        return self.temperature, self.gamma, self.kd_ratio, self.beta, cap, self.student_scale

    @property
    def codes(self) -> tuple[int, int, int]:
        return (
            code("weighting", self.weighting, WEIGHTINGS),
            code("divergence", self.divergence, DIVERGENCES),
            self.ignore_index,
        )

    def item_count(self, device: torch.device) -> Tensor | None:
        """`num_items` as a 0-dim tensor, for a loss on `device`. Its value is checked where reading it waits for
        nothing: a number, or a tensor on the CPU."""
        items = self.num_items
        if items is None:
            return None
        if not isinstance(items, Tensor):
            check_number("num_items", items, 0)
            return scalar_tensor((items,), device)[0]
        if items.dim():
            raise ValueError(f"num_items has shape {tuple(items.shape)}; it must be an int or 0-dim tensor")
        check_dtype("num_items", items, (*INTEGER_DTYPES, *FLOAT_DTYPES))
        if items.device.type != "cpu":
            check_device(device, num_items=items)
        if checks_values(items.device):
            check_number("num_items", items, 0)
        return items.detach()


def check_model(model: str, softcap: float | None, scale: float) -> None:
    """ValueError unless a model's soft cap (None: none) and logit scale are finite and positive."""
    check_number(f"{model}_scale", scale, 0)
    if softcap is not None:
        check_number(f"{model}_softcap", softcap, 0)


class Tokens(NamedTuple):
    """Labels (N,) int64 and token mask (N,) bool, or None; `shape` is the shape the caller's tokens have."""

    shape: tuple[int, ...]
    labels: Tensor | None
    mask: Tensor | None

    def valid(self, ignore_index: int, device: torch.device) -> Tensor:
        """(N,) bool: the tokens that count."""
        valid = torch.ones(self.shape, dtype=torch.bool, device=device).flatten()
        if self.labels is not None:
            valid = self.labels != ignore_index
        return valid if self.mask is None else valid & self.mask


def make_tokens(
    like: Tensor, labels: Tensor | None, token_mask: Tensor | None, ignore_index: int, vocabulary: int
) -> Tokens:
    """Check and flatten the tokens of `like` (..., D), whose logits have `vocabulary` entries."""
    if vocabulary < 1:
        raise ValueError("the vocabulary is empty; logits and weights need at least one entry of it")
    shape = tuple(like.shape[:-1])
    check_device(like.device, labels=labels, token_mask=token_mask)
    if token_mask is not None:
        check_shape("token_mask", token_mask, shape, "one value per token")
        check_dtype("token_mask", token_mask, (torch.bool, *INTEGER_DTYPES))
        token_mask = token_mask.reshape(-1) != 0
    if labels is not None:
        check_shape("labels", labels, shape, "one id per token")
        check_dtype("labels", labels, INTEGER_DTYPES)
        labels = labels.reshape(-1).to(torch.int64)
    tokens = Tokens(shape, labels, token_mask)
    if labels is not None:
        check_range("labels", labels, tokens.valid(ignore_index, like.device), vocabulary)
    return tokens


def call_loss(
    operator: Operator,
    inputs: tuple[Tensor | None, ...],
    tokens: Tokens,
    options: LossOptions,
    gradients: int = 1,
    teacher_scalars: tuple[float, ...] = (),
    codes: tuple[Any, ...] = (),
    kernel: Callable[..., tuple[Tensor, ...]] | None = None,
) -> LossResult:
    """Call the operator, which has `gradients` differentiable inputs, on flattened `inputs`.

    `kernel` serves in the place of the operator's backends.
    """
    first = inputs[0]
    assert first is not None
    kernel = kernel or getattr(operator.packet, resolve(operator.name, first.device.type, first.dtype))
    loss, stats, *_ = kernel(
        *inputs,
        tokens.labels,
        tokens.mask,
        scalar_tensor((*options.scalars, *teacher_scalars), first.device),
        *options.codes,
        *codes,
        code("reduction", options.reduction, REDUCTIONS),
        options.item_count(first.device),
        *(False,) * gradients,  # autograd asks for those that it wants
    )
    if options.reduction == "none":
        loss = loss.reshape(tokens.shape)
    if not options.return_stats:
        return loss
    kl, entropy, cross_entropy, weight = (row.reshape(tokens.shape) for row in stats.detach().unbind())
    return loss, TokenStats(kl, entropy, None if tokens.labels is None else cross_entropy, weight)
