"""Checks of a teacher of whom k log-probabilities and ids per token are stored."""

import torch
from torch import Tensor

from e3kernels.contract import TAILS, accumulate_dtype
from e3kernels.ops.common.arguments import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_device,
    check_dtype,
    check_range,
    check_shape,
    checks_values,
    code,
)
from e3kernels.ops.common.loss_call import Tokens
from e3kernels.reference.topk_kl import first_of_each


def check_tail(tail: str, divergence: str) -> int:
    """The code of `tail`; ValueError for an unknown one, or a divergence that it does not have."""
    if tail == "truncated" and divergence != "forward":
        raise ValueError(f"divergence is {divergence!r}; tail='truncated' has 'forward' only")
    return code("tail", tail, TAILS)


def _check_distinct(ids: Tensor, kept: Tensor) -> None:
    """ValueError if a row of `ids` (N, k) holds one twice among those `kept`, where values are checked."""
    if not checks_values(ids.device):
        return
    repeated = (kept & ~first_of_each(ids, kept)).nonzero()
    if len(repeated):
        row, column = repeated[0].tolist()
        raise ValueError(
            f"teacher_ids holds {ids[row, column].item()} twice in row {row}; the ids of a token must be distinct, or "
            "padding, with a log-probability of −inf"
        )


def stored_teacher(
    logprobs: Tensor, ids: Tensor, tokens: Tokens, ignore_index: int, student: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Check (..., k) log-probabilities and ids; return them as (N, k), in the accumulation dtype and in int64."""
    check_dtype("teacher_logprobs", logprobs, FLOAT_DTYPES)
    check_dtype("teacher_ids", ids, INTEGER_DTYPES)
    width = logprobs.shape[-1] if logprobs.dim() else 0
    if not 1 <= width <= vocabulary:
        raise ValueError(f"teacher_logprobs has k = {width}; k must be at least 1 and at most V = {vocabulary}")
    check_shape("teacher_logprobs", logprobs, (*tokens.shape, width), "k entries per token")
    check_shape("teacher_ids", ids, logprobs.shape, "the shape of teacher_logprobs")
    check_device(student.device, teacher_logprobs=logprobs, teacher_ids=ids)
    rows = logprobs.detach().reshape(-1, width).to(accumulate_dtype(student.dtype))
    id_rows = ids.reshape(-1, width).to(torch.int64)
    kept = (rows != -torch.inf) & tokens.valid(ignore_index, student.device)[:, None]
    check_range("teacher_ids", id_rows, kept, vocabulary)
    _check_distinct(id_rows, kept)
    return rows.contiguous(), id_rows.contiguous()
