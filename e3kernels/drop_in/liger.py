"""The losses by the signatures of Liger-Kernel 0.8: `LigerFusedLinearJSDLoss` and `LigerKLDIVLoss`."""

from typing import Any

import torch
from torch import Tensor, nn

from e3kernels.drop_in.divergence import generalised
from e3kernels.ops.entropy_kl import entropy_kl
from e3kernels.ops.linear_entropy_kl import linear_entropy_kl


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss · CE + weight_soft_loss · JSD_β(T), the mean over the tokens whose label counts.

    `compiled` and `chunk_size` are taken and not needed: tiles have their own sizes. `weighting` and `gamma` are ours.
    Raises ValueError if the heads have not the same vocabulary, where Liger pads the student's logits with zeros.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        weighting: str = "none",
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        if min(weight_hard_loss, weight_soft_loss) < 0 or weight_hard_loss + weight_soft_loss == 0:
            raise ValueError(
                f"weight_hard_loss is {weight_hard_loss} and weight_soft_loss {weight_soft_loss}; neither may be "
                "negative, nor both 0"
            )
        soft = weight_soft_loss / temperature**2  # our divergence has the factor T²
        self.scale = soft + weight_hard_loss
        self.options: dict[str, Any] = {
            "kd_ratio": soft / self.scale,
            "ignore_index": ignore_index,
            "weighting": weighting,
            "gamma": gamma,
            **generalised(beta, temperature),
        }
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss; with `return_soft_hard_loss` also the divergence and the cross-entropy, which have no gradient."""
        loss, stats = linear_entropy_kl(
            student_input, student_weight, teacher_input, teacher_weight, true_labels,
            student_bias=student_bias, teacher_bias=teacher_bias, return_stats=True, **self.options,
        )  # fmt: skip
        loss = loss * self.scale
        if not self.return_soft_hard_loss:
            return loss
        assert stats.cross_entropy is not None
        weights = stats.weight / stats.weight.sum().clamp(min=torch.finfo(stats.weight.dtype).tiny)
        return loss, (weights * stats.kl).sum(), (weights * stats.cross_entropy).sum()


class LigerKLDIVLoss(nn.Module):
    """KL(target ‖ prediction) of log-probabilities `y_pred` and probabilities `y_true` (N, V), with `log_target` their
    logarithms; the sum, or `batchmean` over the N, or `mean` over the N·V.

    `y_pred` must be normalised, as it comes from a log_softmax, behind which the gradients are Liger's: at `y_pred`
    itself ours is q − p where Liger's is −p. `eps` is not needed, as 0·log 0 is 0. `weighting` and `gamma` are ours.
    Raises ValueError for reduction "none", which is one number for each entry of the vocabulary.
    """

    def __init__(
        self,
        eps: float = 1e-10,
        size_average: None = None,
        reduce: None = None,
        reduction: str = "mean",
        log_target: bool = False,
        *,
        weighting: str = "none",
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            raise ValueError(f"size_average is {size_average} and reduce {reduce}; both must be None: use reduction")
        if reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; must be 'batchmean', 'mean' or 'sum'")
        self.reduction = reduction
        self.log_target = log_target
        self.weighting = weighting
        self.gamma = gamma

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        target = y_true if self.log_target else y_true.log()
        reduction = "sum" if self.reduction == "sum" else "mean"
        loss = entropy_kl(y_pred, target, reduction=reduction, weighting=self.weighting, gamma=self.gamma)
        return loss / y_pred.shape[-1] if self.reduction == "mean" else loss
