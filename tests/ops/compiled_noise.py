"""Compile the sampler's noise for sm_90 and gfx942 as its kernels are compiled. Prints how many fused multiply-adds PTX
asks for, how many operations LLVM may contract for gfx942, and whether log 2 is exact in both.

Run by test_triton_compiled.py in a process of its own.
"""

import re
import struct

import torch
import triton
import triton.language as tl

from bench.static.capture import compiled
from e3kernels.triton.gumbel_topk import LN2, gumbel_noise


@triton.jit
def draw(out_ptr, seed: tl.int64, step: tl.int64, BLOCK: tl.constexpr):  # noqa: N803
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, gumbel_noise(seed, step, tl.program_id(0), columns))


def main() -> None:
    def call() -> None:
        draw[(1,)](torch.empty(128, dtype=torch.float64), 5, 6, 128, num_warps=1, enable_fp_fusion=False)

    ptx = compiled("sm_90", call)["draw"].asm["ptx"]
    llvm = compiled("gfx942", call)["draw"].asm["llir"]
    bits = struct.pack(">d", LN2.value).hex().upper()
    print(len(re.findall(r"fma\.rn\.f64", ptx)), len(re.findall(r"\bf(?:add|mul|sub) (?:fast|contract)", llvm)))
    print(f"0d{bits}" in ptx, f"0x{bits}" in llvm)


if __name__ == "__main__":
    main()
