"""Without a GPU the Triton kernels run under Triton's interpreter, which must be chosen before triton is imported.

The choice ends with that import: processes that tests start are as a user's are.
"""

import os

import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import e3kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
