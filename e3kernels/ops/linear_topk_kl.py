"""`topk_kl` from hidden states and an output head: logits exist one tile at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from torch import Tensor

from e3kernels.distributed.losses import sharded_loss
from e3kernels.distributed.placement import on_this_rank
from e3kernels.ops.common.arguments import check_device, rows_of
from e3kernels.ops.common.head import autocast_dtype, check_head, head_dtypes
from e3kernels.ops.common.keywords import LinearTopkKLKeywords
from e3kernels.ops.common.loss_call import LossOptions, LossResult, TokenStats, call_loss, make_tokens
from e3kernels.ops.common.loss_operator import LossSignature, declare_loss
from e3kernels.ops.common.stored_teacher import check_tail, stored_teacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OPERATOR = declare_loss(
    LossSignature(
        "linear_topk_kl",
        student=("student_hidden", "student_weight", "student_bias?"),
        teacher=("teacher_logprobs", "teacher_ids"),
        codes=("int tail", "ScalarType? compute_dtype"),
    )
)


@overload
def linear_topk_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor,
    labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearTopkKLKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def linear_topk_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor,
    labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LinearTopkKLKeywords],
) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
def linear_topk_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    tail: str = "bucket",
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    weighting: str = "entropy",
    gamma: float = 1.0,
    kd_ratio: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    reduction: str = "mean",
    return_stats: bool = False,
    group: ProcessGroup | None = None,
) -> LossResult:
    """`topk_kl(student_hidden @ student_weight.T + student_bias, teacher_logprobs, teacher_ids)`, tile by tile.

    Hidden states, weight, bias, autocast, gradients and `group` are as in `linear_entropy_kl`, the teacher and `tail`
    as in `topk_kl`, every other argument, the result and the errors as in `entropy_kl`.
    """
    options = LossOptions(
        temperature=temperature, weighting=weighting, gamma=gamma, kd_ratio=kd_ratio, divergence=divergence, beta=beta,
        ignore_index=ignore_index, num_items=num_items, student_softcap=student_softcap, student_scale=student_scale,
        reduction=reduction, return_stats=return_stats,
    )  # fmt: skip
    head = {"student_weight": student_weight, "student_bias": student_bias}
    beside = {
        "student_hidden": student_hidden,
        "teacher_logprobs": teacher_logprobs,
        "teacher_ids": teacher_ids,
        "labels": labels,
        "token_mask": token_mask,
    }
    group, plain = on_this_rank(head, 0, beside, student_hidden, group)
    student_weight, student_bias, student_hidden, teacher_logprobs, teacher_ids, labels, token_mask = plain
    compute_dtype = autocast_dtype(student_hidden)
    check_head("student", student_hidden, student_weight, student_bias, head_dtypes(student_hidden, compute_dtype))
    check_device(student_hidden.device, student_weight=student_weight, student_bias=student_bias)
    options.check(has_labels=labels is not None)
    tail_code = check_tail(tail, divergence)
    kernel, vocabulary = sharded_loss(OPERATOR, group, student_hidden, student_weight.shape[0])
    tokens = make_tokens(student_hidden, labels, token_mask, ignore_index, vocabulary)
    student = (rows_of(student_hidden), student_weight, student_bias)
    teacher = stored_teacher(teacher_logprobs, teacher_ids, tokens, ignore_index, student_hidden, vocabulary)
    return call_loss(
        OPERATOR,
        (*student, *teacher),
        tokens,
        options,
        gradients=3,
        codes=(tail_code, compute_dtype),
        kernel=kernel,
    )
