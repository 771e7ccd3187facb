"""Entropy-weighted distillation against a dense teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from torch import Tensor

from e3kernels.distributed.losses import sharded_loss
from e3kernels.distributed.placement import on_this_rank
from e3kernels.ops.common.arguments import FLOAT_DTYPES, check_device, check_dtype, check_shape, last_size, rows_of
from e3kernels.ops.common.keywords import EntropyKLKeywords
from e3kernels.ops.common.loss_call import LossOptions, LossResult, TokenStats, call_loss, check_model, make_tokens
from e3kernels.ops.common.loss_operator import LossSignature, declare_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OPERATOR = declare_loss(LossSignature("entropy_kl", student=("student",), teacher=("teacher",)))


@overload
def entropy_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[EntropyKLKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def entropy_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[EntropyKLKeywords],
) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
def entropy_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    reduction: str = "mean",
    return_stats: bool = False,
    group: ProcessGroup | None = None,
) -> LossResult:
    """Distillation loss whose tokens are weighted by the teacher's entropy (E³-Pruner, arXiv 2511.17205).

    With z = cap·tanh(scale·logits/cap) (scale·logits without a cap), p = softmax(z^t/T), q = softmax(z^s/T),
    D the divergence, H = −Σp log p, r = H/log V and CE = −log softmax(z^s)[label]:

        loss = Σ w·[λT²·D + (1 − λ)·CE] / Σw        over the valid tokens

    Args:
        student_logits, teacher_logits: (..., V), one dtype: float32, bfloat16, float16 or float64. A gradient flows to
            the student only. Sums are fp32 (fp64 for float64).
        labels: (...) integer ids; tokens labelled `ignore_index` do not count. Out of range raises on the CPU, and
            with E3_CHECK_VALUES=1 on any device; else, and under torch.compile, it is undefined.
        token_mask: (...) bool or integer; tokens that are False or 0 do not count. With labels, both must hold.
        temperature: T > 0.
        weighting: "entropy" w = 1 + γ·r (our definition), "inverse" w = 1 + γ·(1 − r), "none" w = 1, or "mix":
            w = 1 and the token's loss is r·T²·D + (1 − r)·CE.
        gamma: γ ≥ 0.
        kd_ratio: λ in [0, 1]; below 1 needs labels.
        divergence: "forward" KL(p‖q), "reverse" KL(q‖p), or "jsd" β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q.
        beta: β of "jsd", strictly between 0 and 1.
        num_items: replaces Σw in the mean, for gradient accumulation: greater than 0, an int or a 0-dim tensor.
        student_softcap, teacher_softcap, student_scale, teacher_scale: what the models do to their logits.
        reduction: "mean", "sum" (Σ instead of Σ/Σw) or "none" (the loss of each token, w included).
        return_stats: also return `TokenStats`.
        group: the logits are this rank's columns of a vocabulary that the ranks of `group` share out in their order
            (vocabulary parallelism). Labels are ids of the whole, and the loss is that of the whole, on every rank.
            DTensors that one dimension of their mesh shards along the last dimension imply it; any other DTensor is
            gathered. Served by Triton where it serves the whole, else by the reference.

    Returns:
        The loss, 0-dim or (...) for "none", fp32 (fp64 for float64). No valid token gives 0, attached to the graph.
        A student logit of −∞ where p > 0 gives +∞, where p = 0 nothing; NaN gives NaN.

    Raises:
        ValueError, TypeError: an argument's value, shape, device or dtype is wrong; the message names it.
        RuntimeError: the backend asked for cannot serve.
    """
    options = LossOptions(
        temperature=temperature, weighting=weighting, gamma=gamma, kd_ratio=kd_ratio, divergence=divergence, beta=beta,
        ignore_index=ignore_index, num_items=num_items, student_softcap=student_softcap, student_scale=student_scale,
        reduction=reduction, return_stats=return_stats,
    )  # fmt: skip
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    beside = {"labels": labels, "token_mask": token_mask}
    group, plain = on_this_rank(logits, -1, beside, student_logits, group)
    student_logits, teacher_logits, labels, token_mask = plain
    check_dtype("student_logits", student_logits, FLOAT_DTYPES)
    check_dtype("teacher_logits", teacher_logits, (student_logits.dtype,))
    check_shape("teacher_logits", teacher_logits, student_logits.shape, "the shape of student_logits")
    check_device(student_logits.device, teacher_logits=teacher_logits)
    check_model("teacher", teacher_softcap, teacher_scale)
    options.check(has_labels=labels is not None)
    vocabulary = last_size("student_logits", student_logits)
    kernel, vocabulary = sharded_loss(OPERATOR, group, student_logits, vocabulary)
    tokens = make_tokens(student_logits, labels, token_mask, ignore_index, vocabulary)
    return call_loss(
        OPERATOR,
        (rows_of(student_logits), rows_of(teacher_logits.detach())),
        tokens,
        options,
        teacher_scalars=(0.0 if teacher_softcap is None else teacher_softcap, teacher_scale),
        kernel=kernel,
    )
