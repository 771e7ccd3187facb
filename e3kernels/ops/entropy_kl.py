"""Entropy-weighted distillation against a dense teacher."""

from e3kernels.ops.losses import LossSignature, declare_loss

OPERATOR = declare_loss(
    LossSignature(
        name="entropy_kl",
        tensors=("student", "teacher", "labels?", "token_mask?"),
        differentiable=("student",),
        codes="int weighting, int divergence, int ignore_index",
    )
)
