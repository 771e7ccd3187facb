"""One build of the operators' library serves another torch: the stable ABI's promise.

`pip install --target FOLDER torch==2.12.1`, then `E3_OTHER_TORCH=FOLDER pytest tests/kernels/test_another_torch.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e3kernels.backends import native_isa

ROOT = Path(__file__).parents[2]
OTHER = os.environ.get("E3_OTHER_TORCH")
OPERATIONS = ("entropy_kl", "topk_kl", "linear_entropy_kl", "gumbel_topk", "gated_residual")
SUITES = [f"tests/ops/test_{name}.py" for name in OPERATIONS]


@pytest.mark.skipif(OTHER is None, reason="one torch only: E3_OTHER_TORCH names no folder with another")
def test_the_library_of_this_torch_serves_another():
    def run(*arguments):
        path = os.pathsep.join([str(OTHER), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
            text=True,
        )  # fmt: skip

    code = "import e3kernels; print(e3kernels.info()['versions']['torch'], e3kernels.backends.native_isa())"
    version, isa = run("-c", code).stdout.split()
    assert version != torch.__version__.partition("+")[0]
    assert isa == native_isa()
    select = ("-k", "native and not compile and not opcheck", "-m", "not slow", "-p", "no:cacheprovider")
    done = run("-m", "pytest", "-q", "-x", *SUITES, *select)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
