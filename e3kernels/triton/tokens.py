"""Per-token quantities shared by the dense and the sparse teacher: validity, weights, coefficients, outputs."""

import triton
import triton.language as tl
from torch import Tensor

from e3kernels.reference.columns import WHOLE, Columns
from e3kernels.triton.scalars import GAMMA, KD_RATIO, scalar

ENTROPY: tl.constexpr = tl.constexpr(1)
INVERSE: tl.constexpr = tl.constexpr(2)
MIX: tl.constexpr = tl.constexpr(3)
NEVER = -(1 << 62)  # an `ignore_index` that no label has


def of_columns(
    columns: Columns, labels: Tensor | None, mask: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor | None, int]:
    """(labels counted from the first column held, mask of the tokens that count, `ignore_index`)."""
    if columns is WHOLE or labels is None:
        return labels, mask, ignore_index
    valid = labels != ignore_index
    return labels - columns.start, valid if mask is None else valid & mask, NEVER


@triton.jit
def is_valid(row, inside, labels_ptr, mask_ptr, ignore_index, HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Whether the token counts: its label is not `ignore_index` and its mask is true, whichever are given."""
    valid = inside
    if HAS_LABELS:
        valid = valid & (tl.load(labels_ptr + row, mask=inside, other=0) != ignore_index)
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    return valid


@triton.jit
def _coefficients(entropy, log_support, temperature, gamma, kd_ratio, WEIGHTING: tl.constexpr):
    """(w, kd, ce) with the token's loss kd·divergence + ce·CE and its weight w; method.md defines them."""
    share = tl.where(log_support > 0, entropy / log_support, 0.0)
    share = tl.where(share < 0.0, 0.0, tl.where(share > 1.0, 1.0, share))  # which keeps NaN
    weight = tl.full(entropy.shape, 1.0, tl.float32) if WEIGHTING == 0 else 0.0 * entropy + 1.0
    if WEIGHTING == ENTROPY:
        weight = tl.where(gamma == 0.0, 1.0, 1.0 + gamma * share)
    elif WEIGHTING == INVERSE:
        weight = tl.where(gamma == 0.0, 1.0, 1.0 + gamma * (1.0 - share))
    squared = temperature * temperature
    if WEIGHTING == MIX:
        return weight, share * squared, 1.0 - share
    return weight, weight * kd_ratio * squared, weight * (1.0 - kd_ratio)


@triton.jit
def _token_loss(divergence, cross_entropy, kd, ce, HAS_LABELS: tl.constexpr):
    """kd·divergence + ce·CE; a zero coefficient removes its term, even an infinite one."""
    loss = tl.where(kd == 0, 0.0, kd * divergence)
    if HAS_LABELS:
        loss += tl.where(ce == 0, 0.0, ce * cross_entropy)
    return loss


@triton.jit
def store_tokens(stats_ptr, loss_ptr, row, N, valid, divergence, entropy, cross_entropy, weight, loss):
    """The rows kl, teacher_entropy, cross_entropy, weight of the statistics and the token losses; 0 where invalid."""
    inside = row < N
    stats = stats_ptr + row
    tl.store(stats, tl.where(valid, divergence, 0.0), mask=inside)
    tl.store(stats + N, tl.where(valid, entropy, 0.0), mask=inside)
    tl.store(stats + 2 * N, tl.where(valid, cross_entropy, 0.0), mask=inside)
    tl.store(stats + 3 * N, tl.where(valid, weight, 0.0), mask=inside)
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0), mask=inside)


@triton.jit
def weigh_tokens(
    stats_ptr, loss_ptr, row, N, valid, divergence, entropy, cross_entropy, log_support, temperature, scalars_ptr,
    WEIGHTING: tl.constexpr, HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """Store the tokens' statistics and losses; (kd, ce), the factors of divergence and cross-entropy in them."""
    gamma, kd_ratio = scalar(scalars_ptr, GAMMA), scalar(scalars_ptr, KD_RATIO)
    weight, kd, ce = _coefficients(entropy, log_support, temperature, gamma, kd_ratio, WEIGHTING)
    loss = _token_loss(divergence, cross_entropy, kd, ce, HAS_LABELS)
    store_tokens(stats_ptr, loss_ptr, row, N, valid, divergence, entropy, cross_entropy, weight, loss)
    return kd, ce
