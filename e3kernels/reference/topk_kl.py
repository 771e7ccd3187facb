"""Reference `topk_kl`: the divergence from a teacher of whom k log-probabilities a token are stored.

    bucket      k + 1 events: the stored ids, and all others together with p = 1 − Σp on either side
    renorm      both sides renormalised over the stored ids
    truncated   Σ p(log p − log q) over the stored ids; not a divergence

What is stored of a token are the entries whose log-probability is not −∞ and whose id is in the vocabulary and in no
earlier one of them; any other takes no part. The entropy is that of their probabilities renormalised, S their number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e3kernels.contract import TAILS, accumulate_dtype
from e3kernels.reference.columns import WHOLE, Columns
from e3kernels.reference.divergence import divergence, entropy, weighted
from e3kernels.reference.token_loss import Objective, TeacherTerm, TokenLoss, forward, token_loss, valid_tokens


class StoredTeacher(NamedTuple):
    """Stored log-probabilities (N, k), −∞ where not kept; ids (N, k), 0 there; and which entries are kept."""

    log_p: Tensor
    ids: Tensor
    kept: Tensor

    def measured(self, divergence: Tensor, gradient: Callable[[], Tensor]) -> TeacherTerm:
        """The divergence with the entropy of the kept probabilities, renormalised, and their number."""
        return TeacherTerm(divergence, entropy(_log_renormalised(self.log_p, self.kept)), self.kept.sum(-1), gradient)


def first_of_each(ids: Tensor, kept: Tensor) -> Tensor:
    """(N, k) bool: which of the `kept` entries hold an id that none of them before it in its row holds."""
    apart = torch.where(kept, ids, -1 - torch.arange(ids.shape[-1], device=ids.device))  # those not kept equal none
    ordered, order = apart.sort(stable=True, dim=-1)
    again = torch.zeros_like(kept)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return kept & ~torch.empty_like(kept).scatter_(-1, order, again)


def _log_renormalised(values: Tensor, kept: Tensor) -> Tensor:
    """log softmax over the kept entries; −∞ on the others, also where none is kept."""
    return torch.where(kept, torch.log_softmax(torch.where(kept, values, -torch.inf), -1), -torch.inf)


def _renorm(u: Tensor, teacher: StoredTeacher, options: Objective, columns: Columns) -> TeacherTerm:
    log_p = _log_renormalised(teacher.log_p, teacher.kept)
    log_q = _log_renormalised(columns.gather(u, teacher.ids), teacher.kept)
    value, g = divergence(log_p, log_q, options.divergence, options.beta)

    def gradient() -> Tensor:
        stored = g - log_q.exp() * g.sum(-1, keepdim=True)
        return columns.scatter_add(torch.zeros_like(u), teacher.ids, stored)

    return teacher.measured(value, gradient)


def _with_normaliser(u: Tensor, teacher: StoredTeacher, tail: str, options: Objective, columns: Columns) -> TeacherTerm:
    """`bucket` and `truncated`: q is normalised over the full vocabulary.

    The tail's q is summed over the ids not stored, since 1 − Σq cancels when little is left. Chain rule: a stored id's
    log q has the gradient δ − q, the tail's has softmax over its ids − q.
    """
    largest, log_z = columns.normaliser(u)
    at_ids = (columns.gather(u, teacher.ids) - largest) - log_z
    log_p, log_q = teacher.log_p, torch.where(teacher.kept, at_ids, -torch.inf)
    stored = columns.scatter_add(torch.zeros_like(u), teacher.ids, teacher.kept.to(u.dtype)) > 0
    rest = u.masked_fill(stored, -torch.inf)
    largest_rest, log_rest = columns.normaliser(rest)
    if tail == "bucket":
        mass = (-torch.expm1(log_p.logsumexp(-1, keepdim=True))).clamp(min=0)
        none_left = columns.total(stored.sum(-1, keepdim=True)) == columns.count(u)
        log_p = torch.cat((log_p, torch.where(none_left, 0.0, mass).log()), -1)
        log_q = torch.cat((log_q, (largest_rest - largest) + (log_rest - log_z)), -1)
    value, g = divergence(log_p, log_q, options.divergence, options.beta)

    def gradient() -> Tensor:
        width = teacher.ids.shape[-1]
        grad = ((u - largest) - log_z).exp() * -g.sum(-1, keepdim=True)
        if tail == "bucket":
            grad += torch.where(stored, 0.0, weighted(g[:, width:], ((rest - largest_rest) - log_rest).exp()))
        return columns.scatter_add(grad, teacher.ids, g[:, :width])

    return teacher.measured(value, gradient)


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
    options = Objective.from_arguments(scalars, weighting, divergence_code, ignore_index)
    valid = valid_tokens(student, labels, token_mask, ignore_index)
    log_p = teacher_logprobs.to(accumulate_dtype(student.dtype))
    inside = (teacher_ids >= 0) & (teacher_ids < columns.count(student))
    kept = first_of_each(teacher_ids, (log_p != -torch.inf) & inside & valid[:, None])
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
    """Kernel of `e3::topk_kl_backward.reference`: one incoming gradient per token."""
    return _tokens(columns, *inputs).gradient(grad_loss)
