"""`topk_kl` from hidden states and an output head: logits exist one tile at a time."""

from e3kernels.ops.losses import LossSignature, declare_loss

OPERATOR = declare_loss(
    LossSignature(
        name="linear_topk_kl",
        tensors=(
            "student_hidden",
            "student_weight",
            "student_bias?",
            "teacher_logprobs",
            "teacher_ids",
            "labels?",
            "token_mask?",
        ),
        differentiable=("student_hidden", "student_weight", "student_bias"),
        codes="int weighting, int divergence, int ignore_index, int tail, ScalarType? compute_dtype",
    )
)
