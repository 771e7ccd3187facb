"""`linear_topk_kl` by the shared tile loop: logits from the vendor's matrix product, the rest by topk_kl's kernels."""

from e3kernels.reference.linear import TileKernel, kernels
from e3kernels.reference.linear_topk_kl import problem
from e3kernels.triton.linear_entropy_kl import TILE_LOGITS
from e3kernels.triton.topk_kl import topk_kl, topk_kl_backward

linear_topk_kl, linear_topk_kl_backward = kernels(problem, TileKernel(topk_kl, topk_kl_backward, TILE_LOGITS))
