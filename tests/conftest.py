"""Without a GPU the Triton kernels run under Triton's interpreter, which must be chosen before triton is imported."""

import importlib.util
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import triton.language as tl
    from triton.runtime import interpreter

    _patched: set[str] = set()
    _cast = interpreter.InterpreterBuilder.cast_impl

    def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    def _cast_to_nearest(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return _cast(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)

    # At every call of a device function the interpreter patches triton.language as its kernel has done already, and
    # triton.language.core as the first call did for good: half of its time.
    interpreter.InterpretedFunction.__call__ = _call
    # It cuts fp32 to bf16; a GPU rounds to nearest.
    interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest


def pytest_sessionstart() -> None:
    """With E3_REQUIRE_BUILD=1 a test of native code must not be skipped for want of it."""
    if os.environ.get("E3_REQUIRE_BUILD") != "1":
        return
    import e3kernels  # not before TRITON_INTERPRET is set

    modules = e3kernels.info()["native_modules"]
    if missing := {name: state for name, state in modules.items() if state != "loaded"}:
        pytest.exit(f"E3_REQUIRE_BUILD=1, and not loaded: {missing}", returncode=1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(topics["objects"] + topics["naming"], encoding="utf-8")
    return path
