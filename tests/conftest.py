"""Without a GPU the Triton kernels run under Triton's interpreter, which must be chosen before triton is imported."""

import importlib.util
import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    _patched: set[str] = set()

    def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    # At every call of a device function the interpreter patches triton.language as its kernel has done already, and
    # triton.language.core as the first call did for good: half of its time.
    interpreter.InterpretedFunction.__call__ = _call
