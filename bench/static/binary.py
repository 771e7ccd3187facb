"""What a compiled kernel's binary and intermediate code say: registers, spills, shared memory, occupancy, accesses.

Access widths are those of the global loads and stores inside the innermost loops of the machine code (of the whole
kernel where it has none). Bytes per element are counted in Triton's own dialect, where every loop appears once and
unrolling does not multiply its body: bytes of a loop's tile accesses over its step, summed over the loops that load (or
the one that only stores, where none loads). A kernel of matrix products has no such number: its tiles share operands.
"""

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Per multiprocessor (compute unit): shared memory in bytes. Threads 2048 and registers 65536 are the same on all three.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_NVIDIA_WIDTHS = {"ENL2.256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_AMD_WIDTHS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "short": 16,
    "ubyte": 8,
    "byte": 8,
}


@dataclass(frozen=True)
class Report:
    """One compiled kernel; widths in bits, `accesses` counts instructions of the hot loops by direction and width.

    `spills` counts NVIDIA's instructions on local memory; AMD's registers spilled, scalar ones included.
    """

    registers: int
    spills: int
    shared: int
    warps: int
    occupancy: float
    accesses: dict[str, int]
    bytes_per_element: float | None

    def row(self) -> dict[str, Any]:
        return asdict(self)


def _tool(name: str, *arguments: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([NVIDIA_BIN / name, *arguments, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _hot(lines: list[str], label: re.Pattern[str], branch: re.Pattern[str], access: re.Pattern[str]) -> list[str]:
    """The lines of the innermost loops that hold an access; a loop ends with a branch back to its label."""
    at = {match[1]: number for number, line in enumerate(lines) if (match := label.match(line.strip()))}
    loops = [
        (at[match[1]], number)
        for number, line in enumerate(lines)
        if (match := branch.search(line)) and at.get(match[1], number) < number
    ]
    loops = [(start, stop) for start, stop in loops if access.search("\n".join(lines[start:stop]))]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [line for start, stop in inner for line in lines[start:stop]] or lines


_NVIDIA_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E([.\w]*)")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)\b")


def _nvidia_accesses(sass: str) -> dict[str, int]:
    label, branch = re.compile(r"(\.L_x_\d+):"), re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
    counts: dict[str, int] = {}
    for kind, modifiers in _NVIDIA_ACCESS.findall("\n".join(_hot(sass.splitlines(), label, branch, _NVIDIA_ACCESS))):
        width = next((bits for text, bits in _NVIDIA_WIDTHS.items() if f".{text}" in modifiers), 32)
        key = f"{'store' if kind == 'STG' else 'load'}{width}"
        counts[key] = counts.get(key, 0) + 1
    return counts


def _amd_accesses(assembly: str) -> dict[str, int]:
    label, branch = re.compile(r"(\.LBB\d+_\d+):"), re.compile(r"s_c?branch\w*\s+(\.LBB\d+_\d+)")
    counts: dict[str, int] = {}
    for kind, width in _AMD_ACCESS.findall("\n".join(_hot(assembly.splitlines(), label, branch, _AMD_ACCESS))):
        size = width.removesuffix("_d16_hi").removesuffix("_d16")
        if size in _AMD_WIDTHS:
            key = f"{kind}{_AMD_WIDTHS[size]}"
            counts[key] = counts.get(key, 0) + 1
    return counts


_ACCESS = re.compile(r"tt\.(load|store)\b.*:\s*tensor<([\dx]+)x!tt\.ptr<(\w+)>")
_LOOP = re.compile(r"scf\.for .*? step %c(\d+)")


def _bits(dtype: str) -> int:
    return int(re.sub(r"\D", "", dtype))


def bytes_per_element(ttir: str) -> float | None:
    """Global bytes that the tile accesses move for one element of a row; None for a kernel without such accesses."""
    if "tt.dot" in ttir:
        return None
    loading: list[float] = []
    storing: list[float] = []
    stack: list[list[int]] = []  # depth, step, loads, bytes
    outside, depth, found = 0.0, 0, False
    for line in ttir.splitlines():
        loop = _LOOP.search(line)
        access = _ACCESS.search(line)
        if loop:
            stack.append([depth, int(loop[1]), 0, 0])
        if access:
            count = 1
            for size in access[2].split("x"):
                count *= int(size)
            if count >= 64:
                found = True
                if stack:
                    stack[-1][2] += access[1] == "load"
                    stack[-1][3] += count * _bits(access[3]) // 8
                else:
                    outside += _bits(access[3]) / 8
        depth += line.count("{") - line.count("}")
        while stack and depth <= stack[-1][0]:
            _, step, loads, size = stack.pop()
            (loading if loads else storing).append(size / step)
    return (sum(loading) or max(storing, default=0) or outside) if found else None


def report(kernel: CompiledKernel) -> Report:
    """Read the binary of `kernel`."""
    metadata = kernel.metadata
    warps, shared = metadata.num_warps, metadata.shared
    moved = bytes_per_element(kernel.asm["ttir"])
    if metadata.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
        registers = numbers["vgpr_count"]
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        if shared:
            waves = min(waves, max(1, (64 << 10) // shared * warps // 4))
        spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
        return Report(registers, spills, shared, warps, waves / 8, _amd_accesses(text), moved)
    sass = _tool("nvdisasm", "-c", binary=kernel.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", binary=kernel.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    blocks = min(32, 65536 // (-(-registers // 8) * 8 * 32 * warps), 2048 // (32 * warps))
    if shared:
        blocks = min(blocks, SHARED[metadata.target.arch] // (shared + 1024))
    return Report(registers, spills, shared, warps, blocks * warps * 32 / 2048, _nvidia_accesses(sass), moved)
