"""verl's loss against a teacher's top k, by the signature of `verl.trainer.distillation.fsdp.losses`."""

from typing import Any

from torch import Tensor

from e3kernels.ops.topk_kl import topk_kl


def compute_forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
    *,
    tail: str = "truncated",
    weighting: str = "none",
    gamma: float = 1.0,
) -> dict[str, Tensor]:
    """Per token Σ p(log p − log q) over the teacher's k ids, and the mass that either model has on them.

    Args:
        student_logits: (1, tokens, V), packed, as verl's FSDP workers give them.
        teacher_topk_log_probs, teacher_topk_ids: nested, (sequences, tokens of each, k).
        config: verl's distillation configuration; its `distillation_loss.log_prob_min_clamp` must be None.
        data_format: taken as verl gives it.
        tail, weighting, gamma: as in `e3kernels.topk_kl`; "truncated" is verl's own loss, "renorm" that of its
            `compute_forward_kl_topk_renorm`, "bucket" a divergence that knows the rest.

    Returns:
        "distillation_losses" (1, tokens), and without gradient "student_mass" and "teacher_mass" (1, tokens).

    Raises:
        ValueError: log-probabilities are to be clamped, which stops the gradient of the ids that the student has still
            to learn; or the ranks of a sequence-parallel group were given the tokens of all.
    """
    clamp = config.distillation_loss.log_prob_min_clamp
    if clamp is not None:
        raise ValueError(f"distillation_loss.log_prob_min_clamp is {clamp}; must be None: sums are finite without it")
    log_p, ids = (nested.values().unsqueeze(0) for nested in (teacher_topk_log_probs, teacher_topk_ids))
    if log_p.shape[:2] != student_logits.shape[:2]:
        raise ValueError(
            f"teacher_topk_log_probs has {log_p.shape[1]} tokens and student_logits {student_logits.shape[1]}; under "
            "sequence parallelism give this rank's part of the teacher's"
        )
    losses, stats = topk_kl(
        student_logits, log_p, ids, ids[..., 0], tail=tail, weighting=weighting, gamma=gamma, reduction="none",
        return_stats=True,
    )  # fmt: skip
    assert stats.cross_entropy is not None  # of the first id, which tells the normaliser
    stored = student_logits.detach().gather(-1, ids).to(losses.dtype)
    log_q = stored - stored[..., :1] - stats.cross_entropy[..., None]
    return {"distillation_losses": losses, "student_mass": log_q.exp().sum(-1), "teacher_mass": log_p.exp().sum(-1)}
