"""The names, codes and dtypes that every room shares. A name's index in its tuple is its code in a schema."""

import torch

BACKENDS = ("reference", "native", "triton")
RELAXATIONS = ("threshold", "softmax", "successive")
WEIGHTINGS = ("none", "entropy", "inverse", "mix")
DIVERGENCES = ("forward", "reverse", "jsd", "adaptive")
TAILS = ("bucket", "renorm", "truncated")
REDUCTIONS = ("none", "mean", "sum")
STORED_RESOLUTION = 2.0**-24  # what a sum of stored, rounded probabilities tells from 1


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, losses and statistics over inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
