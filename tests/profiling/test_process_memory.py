"""The process's own memory at its highest, which every peak in the results is."""

import subprocess
import sys

import pytest

MIB = 1 << 20

# 64 MiB in small blocks, most of them freed, then 64 MiB in one: 68 at most. The first time leaves holes in the heap,
# which the blocks of the second time fit in.
PROGRAM = """
import torch
from e3pruner.profiling.process_memory import peak_above_inputs

torch.ones(7 << 20)  # 28 MiB; a block of this size, freed, teaches glibc to keep smaller ones
kept = []

def call():
    blocks = [torch.ones(1 << 18) for _ in range(64)]
    kept.extend(blocks[15::16])
    del blocks
    torch.ones(16 << 20)

call()
print(peak_above_inputs(call))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_malloc_keeps_is_not_held():
    found = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert 60 * MIB < int(found.stdout) < 80 * MIB
