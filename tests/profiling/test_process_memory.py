"""The process's own memory at its highest, which every peak in the results is."""

import subprocess
import sys

import pytest

MIB = 1 << 20

# In a process of its own, whose heap has no holes: 64 MiB in small blocks, freed, then 64 MiB in one.
PROGRAM = """
import torch
from e3pruner.profiling.process_memory import peak_above_inputs

torch.ones(7 << 20)  # 28 MiB; a block of this size, freed, teaches glibc to keep smaller ones
pins = []

def call():
    blocks = [torch.ones(1 << 18) for _ in range(64)]
    pins.append(torch.ones(256))  # above them on the heap, which cannot shrink then
    del blocks
    torch.ones(16 << 20)

print(peak_above_inputs(call))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_malloc_keeps_is_not_held():
    found = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert 60 * MIB < int(found.stdout) < 80 * MIB
