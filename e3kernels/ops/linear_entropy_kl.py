"""`entropy_kl` from hidden states and output heads: logits exist one tile at a time."""

from e3kernels.ops.losses import LossSignature, declare_loss

OPERATOR = declare_loss(
    LossSignature(
        name="linear_entropy_kl",
        tensors=(
            "student_hidden",
            "student_weight",
            "student_bias?",
            "teacher_hidden",
            "teacher_weight",
            "teacher_bias?",
            "labels?",
            "token_mask?",
        ),
        differentiable=("student_hidden", "student_weight", "student_bias"),
        codes="int weighting, int divergence, int ignore_index, ScalarType? compute_dtype",
    )
)
