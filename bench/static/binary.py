"""What a compiled kernel's binary and intermediate code say: registers, spills, shared memory, occupancy, accesses.

Access widths are those of the global loads and stores inside the innermost loops of the machine code (of the whole
kernel where it has none). Bytes per element are counted in Triton's own dialect, where every loop appears once and
unrolling does not multiply its body: bytes of a loop's tile accesses over its step, summed over the loops that load (or
the one that only stores, where none loads). A kernel of matrix products has no such number: its tiles share operands.

Instructions per element are those that a thread executes in the loops of the machine code whose loads are not
predicated, the sweeps but for a row's ends, over the elements that they load: of NVIDIA's binaries only.
"""

import math
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    instructions_per_element: float | None

    def row(self) -> dict[str, Any]:
        return asdict(self)


def _tool(name: str, *arguments: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([NVIDIA_BIN / name, *arguments, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _loops(
    lines: list[str], label: re.Pattern[str], branch: re.Pattern[str], access: re.Pattern[str]
) -> list[list[str]]:
    """The innermost loops that hold an access, as lines; a loop ends with a branch back to its label."""
    at = {match[1]: number for number, line in enumerate(lines) if (match := label.match(line.strip()))}
    loops = [
        (at[match[1]], number)
        for number, line in enumerate(lines)
        if (match := branch.search(line)) and at.get(match[1], number) < number
    ]
    loops = [(start, stop) for start, stop in loops if access.search("\n".join(lines[start:stop]))]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [lines[start : stop + 1] for start, stop in inner]


def _hot(lines: list[str], label: re.Pattern[str], branch: re.Pattern[str], access: re.Pattern[str]) -> str:
    """The text of those loops; all of it where there are none."""
    loops = _loops(lines, label, branch, access) or [lines]
    return "\n".join(line for loop in loops for line in loop)


_NVIDIA_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E([.\w]*)")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)\b")


_NVIDIA_JUMPS = re.compile(r"(\.L_x_\d+):"), re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_NVIDIA_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@\S+)?\s*([A-Z]\w+)([.\w]*)")


def _nvidia_bits(modifiers: str) -> int:
    return next((bits for text, bits in _NVIDIA_WIDTHS.items() if f".{text}" in modifiers), 32)


def _nvidia_instructions(sass: str, loaded: float) -> float | None:
    """Instructions per element, of which a sweep loads `loaded` bytes."""
    found: list[float] = []
    for loop in _loops(sass.splitlines(), *_NVIDIA_JUMPS, re.compile(r"\bLDG\.E")):
        instructions = [match.groups() for line in loop if (match := _NVIDIA_INSTRUCTION.search(line))]
        loads = [(guard, _nvidia_bits(modifiers)) for guard, name, modifiers in instructions if name == "LDG"]
        if not any(guard for guard, _ in loads):
            found.append(len(instructions) / (sum(bits for _, bits in loads) / 8 / loaded))
    return sum(found) or None


def _nvidia_accesses(sass: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind, modifiers in _NVIDIA_ACCESS.findall(_hot(sass.splitlines(), *_NVIDIA_JUMPS, _NVIDIA_ACCESS)):
        width = _nvidia_bits(modifiers)
        key = f"{'store' if kind == 'STG' else 'load'}{width}"
        counts[key] = counts.get(key, 0) + 1
    return counts


def _amd_accesses(assembly: str) -> dict[str, int]:
    label, branch = re.compile(r"(\.LBB\d+_\d+):"), re.compile(r"s_c?branch\w*\s+(\.LBB\d+_\d+)")
    counts: dict[str, int] = {}
    for kind, width in _AMD_ACCESS.findall(_hot(assembly.splitlines(), label, branch, _AMD_ACCESS)):
        size = width.removesuffix("_d16_hi").removesuffix("_d16")
        if size in _AMD_WIDTHS:
            key = f"{kind}{_AMD_WIDTHS[size]}"
            counts[key] = counts.get(key, 0) + 1
    return counts


_ACCESS = re.compile(r"tt\.(load|store)\b([^:]*):\s*tensor<([\dx]+)x!tt\.ptr<(\w+)>")
_LOOP = re.compile(r"scf\.for .*? step (?:%c(\d+))?")


def _bits(dtype: str) -> int:
    return int(re.sub(r"\D", "", dtype))


class _Loop(NamedTuple):
    """A loop of Triton's dialect: its step (0 where it is not known), and the bytes that its tiles' accesses move."""

    step: int
    loaded: int
    stored: int
    masked: bool


def _tile_loops(ttir: str) -> tuple[list[_Loop], float]:
    """The loops with tile accesses, a loop's own only, and the bytes per element of those outside of all loops."""
    found: list[_Loop] = []
    stack: list[tuple[int, _Loop]] = []
    outside, depth = 0.0, 0
    for line in ttir.splitlines():
        if loop := _LOOP.search(line):
            stack.append((depth, _Loop(int(loop[1] or 0), 0, 0, False)))
        if access := _ACCESS.search(line):
            count = math.prod(map(int, access[3].split("x")))
            size = count * _bits(access[4]) // 8
            if count >= 64 and stack:
                at, own = stack[-1]
                masked = own.masked or access[2].count(",") >= (1 if access[1] == "load" else 2)
                moved = (size, 0) if access[1] == "load" else (0, size)
                stack[-1] = at, _Loop(own.step, own.loaded + moved[0], own.stored + moved[1], masked)
            elif count >= 64:
                outside += _bits(access[4]) / 8
        depth += line.count("{") - line.count("}")
        while stack and depth <= stack[-1][0]:
            _, own = stack.pop()
            if own.loaded or own.stored:
                found.append(own)
    return found, outside


def bytes_per_element(ttir: str) -> tuple[float, float] | None:
    """Global bytes (moved in all sweeps, loaded in one) for one element of a row; None for a kernel without tiles.

    Where a sweep has steps without a mask, those with one are a row's ends, or what it does where a logit is infinite.
    """
    loops, outside = _tile_loops(ttir)
    if "tt.dot" in ttir or not (loops or outside):
        return None
    loops = [loop for loop in loops if not loop.masked] or [loop for loop in loops if loop.step]
    loading = [(loop.loaded + loop.stored) / loop.step for loop in loops if loop.loaded]
    storing = [loop.stored / loop.step for loop in loops if not loop.loaded]
    moved = sum(loading) or max(storing, default=0) or outside
    return moved, max((loop.loaded / loop.step for loop in loops), default=0.0)


def report(kernel: CompiledKernel) -> Report:
    """Read the binary of `kernel`."""
    metadata = kernel.metadata
    warps, shared = metadata.num_warps, metadata.shared
    moved, loaded = bytes_per_element(kernel.asm["ttir"]) or (None, 0.0)
    if metadata.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
        registers = numbers["vgpr_count"]
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        if shared:
            waves = min(waves, max(1, (64 << 10) // shared * warps // 4))
        spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
        return Report(registers, spills, shared, warps, waves / 8, _amd_accesses(text), moved, None)
    sass = _tool("nvdisasm", "-c", binary=kernel.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", binary=kernel.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    blocks = min(32, 65536 // (-(-registers // 8) * 8 * 32 * warps), 2048 // (32 * warps))
    if shared:
        blocks = min(blocks, SHARED[metadata.target.arch] // (shared + 1024))
    occupancy, instructions = blocks * warps * 32 / 2048, _nvidia_instructions(sass, loaded)
    return Report(registers, spills, shared, warps, occupancy, _nvidia_accesses(sass), moved, instructions)
