"""Kernels for layer pruning of large language models: mask sampling, entropy-weighted distillation, gated residuals.

Every operation runs on the reference backend (plain PyTorch); faster backends serve where they are installed and the
device suits them. `info()` says which and why.
"""

from importlib.metadata import PackageNotFoundError, version

from e3kernels import backends, nn
from e3kernels.backends import use_backend
from e3kernels.drop_in.trl import patch_trl
from e3kernels.info import info
from e3kernels.ops.common.loss_call import TokenStats
from e3kernels.ops.entropy_kl import entropy_kl
from e3kernels.ops.gated_residual import gated_residual
from e3kernels.ops.gumbel_topk import GumbelTopK, gumbel_topk
from e3kernels.ops.linear_entropy_kl import linear_entropy_kl
from e3kernels.ops.linear_topk_kl import linear_topk_kl
from e3kernels.ops.topk_kl import topk_kl
from e3kernels.profiling import profile

backends.load()

try:
    __version__ = version("e3kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "GumbelTopK",
    "TokenStats",
    "__version__",
    "entropy_kl",
    "gated_residual",
    "gumbel_topk",
    "info",
    "linear_entropy_kl",
    "linear_topk_kl",
    "nn",
    "patch_trl",
    "profile",
    "topk_kl",
    "use_backend",
]
