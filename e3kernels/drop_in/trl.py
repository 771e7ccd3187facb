"""`patch_trl()`: TRL's distillation trainers with our losses, by one line in a user's script. Tested with TRL 1.16.

Its losses have no T²: ours are divided by it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from e3kernels.drop_in.divergence import generalised
from e3kernels.ops.entropy_kl import entropy_kl
from e3kernels.ops.linear_entropy_kl import linear_entropy_kl

# Where TRL keeps the losses that are replaced: module, the class in it or None, name.
_CHUNKED = ("trl.trainer.distillation_trainer", None, "_chunked_divergence_loss")
_DENSE = ("trl.experimental.gkd.gkd_trainer", "GKDTrainer", "generalized_jsd_loss")


def patch_trl(*, weighting: str = "none", gamma: float = 1.0, student_entropy: bool = True) -> Callable[[], None]:
    """Let `trl.DistillationTrainer` and `trl.experimental.gkd.GKDTrainer` compute their losses by e3kernels.

    Args:
        weighting, gamma: how tokens are weighted, as in `e3kernels.entropy_kl`; "none" is TRL's own loss. "mix" needs
            labels, which TRL does not give: ValueError.
        student_entropy: whether DistillationTrainer's metric of that name is computed, by a second pass through the
            student's head; NaN without.

    Returns:
        What puts TRL's own losses back.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this TRL does not have the losses that are replaced, or has them with other arguments.
    """
    if weighting == "mix":
        raise ValueError("weighting is 'mix'; its cross-entropy needs labels, which TRL's losses are not given")
    options: dict[str, Any] = {"weighting": weighting, "gamma": gamma}
    places = [
        _place(_CHUNKED, lambda _: _chunked(options, student_entropy)),
        _place(_DENSE, lambda own: staticmethod(_dense(options, own))),
    ]
    for owner, name, _, ours in places:
        setattr(owner, name, ours)

    def restore() -> None:
        for owner, name, own, _ in places:
            setattr(owner, name, own)

    return restore


def _place(place: tuple[str, str | None, str], make: Callable[[Any], Any]) -> tuple[Any, str, Any, Any]:
    """(where the loss is, its name, TRL's own, `make` of it)."""
    module, kind, name = place
    owner = import_module(module) if kind is None else getattr(import_module(module), kind)
    own = inspect.getattr_static(owner, name, None)
    function = getattr(own, "__func__", own)
    if function is None:
        raise RuntimeError(f"{module} has no {name}; patch_trl knows that of TRL 1.16")
    ours = make(function)
    expected, found = (set(inspect.signature(getattr(f, "__func__", f)).parameters) for f in (ours, function))
    if expected != found:
        raise RuntimeError(f"{module}.{name} takes {sorted(found)}; that of TRL 1.16 takes {sorted(expected)}")
    return owner, name, own, ours


def _chunked(options: dict[str, Any], student_entropy: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def _chunked_divergence_loss(
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid = completion_mask.reshape(-1) != 0
        h_s, h_t = (h.reshape(-1, h.shape[-1])[valid] for h in (student_hidden_states, teacher_hidden_states))
        student = _head(h_s, student_lm_head_weight, student_lm_head_bias)
        teacher = _head(h_t, teacher_lm_head_weight, teacher_lm_head_bias)
        models: dict[str, Any] = {
            "student_softcap": student_final_logit_softcapping,
            "student_scale": student_logit_scale,
            "teacher_softcap": teacher_final_logit_softcapping,
            "teacher_scale": teacher_logit_scale,
        }
        loss: Tensor = linear_entropy_kl(
            h_s, student[0], h_t, teacher[0], student_bias=student[1], teacher_bias=teacher[1],
            num_items=num_items_in_batch, **models, **options, **generalised(beta, temperature),
        )  # fmt: skip
        entropy = loss.new_full((), torch.nan)
        if student_entropy:
            entropy = _entropy(h_s, *student, student_logit_scale, student_final_logit_softcapping, temperature)
        return loss / temperature**2, entropy, valid.sum()

    return _chunked_divergence_loss


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head in the dtype of its hidden states, as TRL multiplies them where autocast does not."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


@torch.no_grad()
def _entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """Σ over the tokens of the entropy at `temperature` of the model, which is its own teacher here."""
    _, stats = linear_entropy_kl(
        hidden, weight, hidden, weight, student_bias=bias, teacher_bias=bias, temperature=temperature,
        student_scale=scale, teacher_scale=scale, student_softcap=softcap, teacher_softcap=softcap, return_stats=True,
    )  # fmt: skip
    return stats.teacher_entropy.sum()


def _dense(options: dict[str, Any], own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if reduction not in ("batchmean", "mean", "sum"):  # one number for each entry of the vocabulary
            return own(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)
        mask = None if labels is None else labels != -100
        settings: dict[str, Any] = {"token_mask": mask, **options, **generalised(beta, temperature)}
        scale = 1 / temperature**2
        if num_items_in_batch is not None:
            settings["num_items"] = num_items_in_batch
        elif mask is None or reduction == "sum":  # over the sequences of a batch, over all tokens, or over none
            settings["reduction"] = "sum"
            counts = {"batchmean": len(student_logits), "mean": student_logits[..., 0].numel(), "sum": 1}
            scale /= max(counts[reduction], 1)
        if num_items_in_batch is None and reduction == "mean":
            scale /= student_logits.shape[-1]
        loss: Tensor = entropy_kl(student_logits, teacher_logits, **settings)
        return loss * scale

    return generalized_jsd_loss
