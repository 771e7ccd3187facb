"""Entropy-weighted distillation against a teacher's stored top-k log-probabilities."""

from e3kernels.ops.losses import LossSignature, declare_loss

OPERATOR = declare_loss(
    LossSignature(
        name="topk_kl",
        tensors=("student", "teacher_logprobs", "teacher_ids", "labels?", "token_mask?"),
        differentiable=("student",),
        codes="int weighting, int divergence, int ignore_index, int tail",
    )
)
