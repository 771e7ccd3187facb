"""Entropy-weighted distillation against a teacher's stored top-k log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from torch import Tensor

from e3kernels.distributed.losses import sharded_loss
from e3kernels.distributed.placement import on_this_rank
from e3kernels.ops.common.arguments import FLOAT_DTYPES, check_dtype, last_size, rows_of
from e3kernels.ops.common.keywords import TopkKLKeywords
from e3kernels.ops.common.loss_call import LossOptions, LossResult, TokenStats, call_loss, make_tokens
from e3kernels.ops.common.loss_operator import LossSignature, declare_loss
from e3kernels.ops.common.stored_teacher import check_tail, stored_teacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OPERATOR = declare_loss(
    LossSignature("topk_kl", student=("student",), teacher=("teacher_logprobs", "teacher_ids"), codes=("int tail",))
)


@overload
def topk_kl(
    student_logits: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[TopkKLKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def topk_kl(
    student_logits: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[TopkKLKeywords],
) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
def topk_kl(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None = None,
    *,
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
    """`entropy_kl` against a teacher of whom the k most likely tokens are stored, from a cache or a server.

    p are the stored probabilities, q the student's; H is the entropy of p renormalised over the S ids that the row
    holds, and r = H/log S, 0 for S <= 1.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64. A gradient flows to the student only.
        teacher_logprobs: (..., k) log softmax(z^t/T), at the same T as the loss, any float dtype. An entry of −∞ is
            padding: it and its id take no part, wherever in the row it stands.
        teacher_ids: (..., k) integer ids, distinct within a token. An id twice or out of range raises on the CPU, and
            with E3_CHECK_VALUES=1 on any device; else, and under torch.compile, it is taken for padding (of an id twice
            the second).
        tail: "bucket": k + 1 events, the last holding 1 − Σp and 1 − Σq, a proper divergence; "renorm": both sides
            renormalised over the k ids; "truncated": Σ p(log p − log q) over the k ids, with no tail, not a divergence,
            for divergence="forward" only.
        group: as in `entropy_kl`; `teacher_ids` are ids of the whole vocabulary, on every rank all k of them.

    Every other argument, the result and the errors are those of `entropy_kl`.
    """
    options = LossOptions(
        temperature=temperature, weighting=weighting, gamma=gamma, kd_ratio=kd_ratio, divergence=divergence, beta=beta,
        ignore_index=ignore_index, num_items=num_items, student_softcap=student_softcap, student_scale=student_scale,
        reduction=reduction, return_stats=return_stats,
    )  # fmt: skip
    beside = {
        "teacher_logprobs": teacher_logprobs,
        "teacher_ids": teacher_ids,
        "labels": labels,
        "token_mask": token_mask,
    }
    group, plain = on_this_rank({"student_logits": student_logits}, -1, beside, student_logits, group)
    student_logits, teacher_logprobs, teacher_ids, labels, token_mask = plain
    check_dtype("student_logits", student_logits, FLOAT_DTYPES)
    options.check(has_labels=labels is not None)
    tail_code = check_tail(tail, divergence)
    vocabulary = last_size("student_logits", student_logits)
    kernel, vocabulary = sharded_loss(OPERATOR, group, student_logits, vocabulary)
    tokens = make_tokens(student_logits, labels, token_mask, ignore_index, vocabulary)
    teacher = stored_teacher(teacher_logprobs, teacher_ids, tokens, ignore_index, student_logits, vocabulary)
    return call_loss(
        OPERATOR,
        (rows_of(student_logits), *teacher),
        tokens,
        options,
        codes=(tail_code,),
        kernel=kernel,
    )
