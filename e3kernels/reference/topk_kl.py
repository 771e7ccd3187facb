"""Reference `topk_kl`: the divergence from a teacher of whom k log-probabilities a token are stored.

    bucket      k + 1 events: the stored ids, and all others together with p = 1 − Σp on either side
    renorm      both sides renormalised over the stored ids
    truncated   Σ p(log p − log q) over the stored ids; not a divergence

An id whose log-probability is −∞ is padding. The entropy is that of the stored probabilities renormalised, S = k.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from e3kernels.contract import TAILS, accumulate_dtype
from e3kernels.reference.columns import WHOLE, Columns
from e3kernels.reference.divergence import divergence, entropy
from e3kernels.reference.token_loss import LossOptions, TeacherTerm, TokenLoss, forward, token_loss, valid_tokens


class StoredTeacher(NamedTuple):
    """Stored log-probabilities (N, k), −∞ where not kept; ids (N, k), 0 there; and which entries are kept."""

    log_p: Tensor
    ids: Tensor
    kept: Tensor


def _log_renormalised(values: Tensor, kept: Tensor) -> Tensor:
    """log softmax over the kept entries; −∞ on the others, also where none is kept."""
    return torch.where(kept, torch.log_softmax(torch.where(kept, values, -torch.inf), -1), -torch.inf)


def _renorm(u: Tensor, teacher: StoredTeacher, options: LossOptions, columns: Columns) -> TeacherTerm:
    log_p = _log_renormalised(teacher.log_p, teacher.kept)
    log_q = _log_renormalised(columns.gather(u, teacher.ids), teacher.kept)
    value, g = divergence(log_p, log_q, options.divergence, options.beta)

    def gradient() -> Tensor:
        stored = g - log_q.exp() * g.sum(-1, keepdim=True)
        return columns.scatter_add(torch.zeros_like(u), teacher.ids, stored)

    return TeacherTerm(value, entropy(log_p), log_p.shape[-1], gradient)


def _with_normaliser(
    u: Tensor, teacher: StoredTeacher, tail: str, options: LossOptions, columns: Columns
) -> TeacherTerm:
    """`bucket` and `truncated`: q is normalised over the full vocabulary.

    The tail's q is summed over the ids not stored, since 1 − Σq cancels when little is left. Chain rule: a stored id's
    log q has the gradient δ − q, the tail's has softmax over its ids − q.
    """
    log_z = columns.logsumexp(u)[:, None]
    log_p, log_q = teacher.log_p, torch.where(teacher.kept, columns.gather(u, teacher.ids) - log_z, -torch.inf)
    stored = columns.scatter_add(torch.zeros_like(u), teacher.ids, teacher.kept.to(u.dtype)) > 0
    rest = u.masked_fill(stored, -torch.inf)
    log_rest = columns.logsumexp(rest)[:, None]
    if tail == "bucket":
        mass = (-torch.expm1(log_p.logsumexp(-1, keepdim=True))).clamp(min=0)
        none_left = columns.total(stored.sum(-1, keepdim=True)) == columns.count(u)
        log_p = torch.cat((log_p, torch.where(none_left, 0.0, mass).log()), -1)
        log_q = torch.cat((log_q, log_rest - log_z), -1)
    value, g = divergence(log_p, log_q, options.divergence, options.beta)

    def gradient() -> Tensor:
        width = teacher.ids.shape[-1]
        grad = (u - log_z).exp() * -g.sum(-1, keepdim=True)
        if tail == "bucket":
            grad += torch.where(stored, 0.0, (rest - log_rest).exp() * g[:, width:])
        return columns.scatter_add(grad, teacher.ids, g[:, :width])

    renormalised = _log_renormalised(teacher.log_p, teacher.kept)
    return TeacherTerm(value, entropy(renormalised), renormalised.shape[-1], gradient)


def _tokens(
    columns: Columns,
    student: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None,
    token_mask: Tensor | None,
    scalars: Tensor,
    weighting: int,
    divergence_code: int,
    ignore_index: int,
    tail: int,
) -> TokenLoss:
    options = LossOptions.from_arguments(scalars, weighting, divergence_code, ignore_index)
    valid = valid_tokens(student, labels, token_mask, ignore_index)
    log_p = teacher_logprobs.to(accumulate_dtype(student.dtype))
    kept = (log_p != -torch.inf) & valid[:, None]
    teacher = StoredTeacher(torch.where(kept, log_p, -torch.inf), torch.where(kept, teacher_ids, 0), kept)

    def measure(u: Tensor) -> TeacherTerm:
        if TAILS[tail] == "renorm":
            return _renorm(u, teacher, options, columns)
        return _with_normaliser(u, teacher, TAILS[tail], options, columns)

    return token_loss(student, measure, labels, valid, options, columns)


def topk_kl(*arguments: Any, columns: Columns = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `e3::topk_kl.reference`."""
    *inputs, reduction, num_items, need_student = arguments
    return forward(_tokens(columns, *inputs), reduction, num_items, need_student)


def topk_kl_backward(grad_loss: Tensor, *inputs: Any, columns: Columns = WHOLE) -> Tensor:
    """Kernel of `e3::topk_kl_backward.reference`: one incoming gradient a token."""
    return _tokens(columns, *inputs).gradient(grad_loss)
