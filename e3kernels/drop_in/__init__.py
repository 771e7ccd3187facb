"""Losses with the signatures that other libraries call them by, served by ours; none of those libraries is imported.

With `weighting="none"`, the default, each gives the value and the gradient of the loss whose place it takes. Any other
weighting, and its γ, are those of `e3kernels.entropy_kl`.
"""
