"""axolotl's loss against a stored teacher, by the signatures of `axolotl.integrations.kd.topk_logprob.forward_kl`."""

import math

from torch import Tensor, nn

from e3kernels.ops.topk_kl import topk_kl


def loss(
    student_logits: Tensor,
    target_token_ids: Tensor,
    target_logprobs: Tensor,
    target_mask: Tensor,
    num_items_in_batch: int = -1,
    kd_temperature: float = 1.0,
    *,
    tail: str = "truncated",
    weighting: str = "none",
    gamma: float = 1.0,
) -> Tensor:
    """Σ p(log p − log q) over the stored ids of all tokens, divided by `num_items_in_batch`, or else, where that is not
    positive, by the number of stored ids that count.

    Args:
        student_logits: (B, T, V), of which the teacher's first tokens are taken.
        target_token_ids, target_logprobs, target_mask: (B, teacher's T, k); where the mask is 0 an entry does not
            count.
        kd_temperature: T of the student; the stored log-probabilities are taken as they are.
        tail, weighting, gamma: as in `e3kernels.topk_kl`; "truncated" is axolotl's own loss.
    """
    counts = target_mask != 0
    tokens = counts.any(-1)
    kept = target_logprobs.float().masked_fill(~counts, -math.inf)
    total = topk_kl(
        student_logits[:, : target_token_ids.shape[1]], kept, target_token_ids, token_mask=tokens, tail=tail,
        temperature=kd_temperature, weighting=weighting, gamma=gamma, reduction="sum",
    )  # fmt: skip
    items = num_items_in_batch if num_items_in_batch > 0 else counts.sum().clamp(min=1)
    return total / (kd_temperature**2 * items)


class ChunkedTopKKDLoss(nn.Module):
    """`loss` as a module. `num_output_chunks` is taken and not needed: no copy of the logits is made."""

    def __init__(
        self,
        num_output_chunks: int = 8,
        kd_temperature: float = 1.0,
        *,
        tail: str = "truncated",
        weighting: str = "none",
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self.kd_temperature = kd_temperature
        self.tail, self.weighting, self.gamma = tail, weighting, gamma

    def forward(
        self,
        student_logits: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        num_items_in_batch: int = -1,
    ) -> Tensor:
        return loss(
            student_logits, target_token_ids, target_logprobs, target_mask, num_items_in_batch, self.kd_temperature,
            tail=self.tail, weighting=self.weighting, gamma=self.gamma,
        )  # fmt: skip
