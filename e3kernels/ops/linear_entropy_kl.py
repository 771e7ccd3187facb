"""`entropy_kl` from hidden states and output heads: logits exist one tile at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from torch import Tensor

from e3kernels.distributed.losses import sharded_loss
from e3kernels.distributed.placement import on_this_rank
from e3kernels.ops.common.arguments import check_device, check_shape, rows_of
from e3kernels.ops.common.head import autocast_dtype, check_head, head_dtypes
from e3kernels.ops.common.keywords import LinearEntropyKLKeywords
from e3kernels.ops.common.loss_call import LossOptions, LossResult, TokenStats, call_loss, check_model, make_tokens
from e3kernels.ops.common.loss_operator import LossSignature, declare_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OPERATOR = declare_loss(
    LossSignature(
        "linear_entropy_kl",
        student=("student_hidden", "student_weight", "student_bias?"),
        teacher=("teacher_hidden", "teacher_weight", "teacher_bias?"),
        codes=("ScalarType? compute_dtype",),
    )
)


@overload
def linear_entropy_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearEntropyKLKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def linear_entropy_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LinearEntropyKLKeywords],
) -> tuple[Tensor, TokenStats]: ...  # fmt: skip
def linear_entropy_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    """`entropy_kl(student_hidden @ student_weight.T + student_bias, teacher_hidden @ teacher_weight.T + teacher_bias)`.

    Logits exist for one tile of tokens at a time, so that memory does not grow with N·V. A head that both models share
    (one weight, one bias) is multiplied once per tile. Gradients of a weight and a bias are summed in fp32.

    Args:
        student_hidden, teacher_hidden: (..., H), the widths of the models may differ.
        student_weight, teacher_weight: (V, H), as in torch.nn.Linear.
        student_bias, teacher_bias: (V,).
        group: weights and biases are this rank's rows of heads that the ranks of `group` share out in their order, as
            in `entropy_kl`; hidden states are whole on every rank, and so is their gradient.

    DTensors: hidden states that are plain tensors are this rank's own, and a weight or bias that is a DTensor, as FSDP
    and tensor parallelism leave it, is gathered for them. Its gradient returns to where it lies and is the mean over
    the ranks of its mesh, as FSDP takes it: that of one process where the ranks have the same tokens, or as many each.
    Hidden states that are DTensors count as those of all ranks; heads on their mesh that one of its dimensions shards
    along the vocabulary then imply its `group`. With `group` given, DTensors are cut to its parts.

    All six have one dtype; under autocast they may differ, and are multiplied in the autocast dtype. A gradient flows
    to the student's tensors that require one; a weight shared with the teacher gets the student's part. Every other
    argument, the result and the errors are those of `entropy_kl`.
    """
    options = LossOptions(
        temperature=temperature, weighting=weighting, gamma=gamma, kd_ratio=kd_ratio, divergence=divergence, beta=beta,
        ignore_index=ignore_index, num_items=num_items, student_softcap=student_softcap, student_scale=student_scale,
        reduction=reduction, return_stats=return_stats,
    )  # fmt: skip
    heads = {
        "student_weight": student_weight,
        "teacher_weight": teacher_weight,
        "student_bias": student_bias,
        "teacher_bias": teacher_bias,
    }
    beside = {
        "student_hidden": student_hidden,
        "teacher_hidden": teacher_hidden,
        "labels": labels,
        "token_mask": token_mask,
    }
    group, plain = on_this_rank(heads, 0, beside, student_hidden, group)
    student_weight, teacher_weight, student_bias, teacher_bias = plain[:4]
    student_hidden, teacher_hidden, labels, token_mask = plain[4:]
    compute_dtype = autocast_dtype(student_hidden)
    dtypes = head_dtypes(student_hidden, compute_dtype)
    check_head("student", student_hidden, student_weight, student_bias, dtypes)
    check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, dtypes)
    vocabulary = student_weight.shape[0]
    check_shape(
        "teacher_weight", teacher_weight, (vocabulary, teacher_hidden.shape[-1]), "as many rows as student_weight"
    )
    check_shape(
        "teacher_hidden", teacher_hidden, (*student_hidden.shape[:-1], teacher_hidden.shape[-1]), "one row per token"
    )
    check_device(
        student_hidden.device,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
    )
    check_model("teacher", teacher_softcap, teacher_scale)
    options.check(has_labels=labels is not None)
    kernel, vocabulary = sharded_loss(OPERATOR, group, student_hidden, vocabulary)
    tokens = make_tokens(student_hidden, labels, token_mask, ignore_index, vocabulary)
    student = (rows_of(student_hidden), student_weight, student_bias)
    teacher = (rows_of(teacher_hidden.detach()), teacher_weight.detach(), teacher_bias)
    return call_loss(
        OPERATOR,
        (*student, *teacher),
        tokens,
        options,
        gradients=3,
        teacher_scalars=(0.0 if teacher_softcap is None else teacher_softcap, teacher_scale),
        codes=(compute_dtype,),
        kernel=kernel,
    )
