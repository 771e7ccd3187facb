"""Compiles and links the two native modules: setup.py when it installs, `runtime_module` one of them at its first use.

`_ops` uses torch's stable ABI only and no Python symbol, so one file serves every torch >= 2.11 and every Python.
`_runtime` is a pybind11 + ATen extension of one torch and one Python, which its file's name says. Its CUDA half is
built where torch has CUDA and nvcc is found.

Environment: E3_SKIP_BUILD=1 builds nothing; FORCE_CUDA=1 builds the CUDA half or fails, FORCE_CUDA=0 leaves it out;
CXX, CXXFLAGS, LDFLAGS and MAX_JOBS as usual. Only the standard library is imported here, not even torch.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The folder that holds csrc/: this one in a wheel, the one above in a source tree.
ROOT = next(folder for folder in Path(__file__).parents if (folder / "csrc").is_dir() or folder == folder.parent)
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the first whose tensors can own memory of ours
X86_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
X86_AVX512 = [*X86_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_AVX512_BF16 = [*X86_AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": X86_AVX2,
        "avx512": X86_AVX512,
        "avx512_bf16": X86_AVX512_BF16,
        "amx": [*X86_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    },
}
PORTABLE: dict[str, list[str]] = {"baseline": []}
# Machine code of these serves later devices of the same major version too; every other device compiles the PTX.
CUDA_MACHINE_CODE = (80, 90, 100, 120)
OLDEST_CUDA = (12, 4)  # the first with conditional graph nodes


class BuildError(Exception):
    """A module cannot be built here; the message says why."""


class NoSourceError(BuildError):
    """This source tree does not hold the module."""


class Torch:
    """The installation in `folder` (that of its __init__.py) to build against, without importing it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = runpy.run_path(str(folder / "version.py"))
        except OSError as error:
            raise BuildError(f"{folder} holds no torch: {error}") from error
        self.version: str = facts["__version__"]
        self.has_cuda = facts["cuda"] is not None

    @property
    def release(self) -> str:
        """The version without the variant: the CPU's and CUDA's of one release have one ABI."""
        return self.version.partition("+")[0]

    def includes(self) -> list[str]:
        include = self.folder / "include"
        return [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]


@dataclass(frozen=True)
class Module:
    """One shared library; `sources` are compiled once, `kernels` once per instruction set, in its own namespace."""

    name: str
    sources: list[str]
    kernels: list[str]
    libraries: list[str]
    of_one_torch: bool
    cuda: tuple[str, ...] = ()

    def filename(self, torch_version: str) -> str:
        if not self.of_one_torch:
            return f"{self.name}.so"
        return f"{self.name}.torch-{torch_version}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def flags(self, torch: Torch) -> list[str]:
        if not self.of_one_torch:
            return [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", *torch.includes()]
        return [f"-DTORCH_EXTENSION_NAME={self.name}", *torch.includes(), f"-isystem{sysconfig.get_path('include')}"]


OPS = Module(
    "_ops",
    sources=["csrc/torch/ops.cpp"],
    kernels=["csrc/kernels/ops_table.cpp"],
    libraries=["torch_cpu"],
    of_one_torch=False,
)
RUNTIME = Module(
    "_runtime",
    sources=["csrc/torch/runtime.cpp"],
    kernels=["csrc/decode/runtime_table.cpp"],
    libraries=["torch", "torch_cpu", "torch_python", "c10"],
    of_one_torch=True,
    cuda=("csrc/cuda/layer_graph.cu",),
)


def find_compiler() -> list[str]:
    """The C++ compiler as a command, from CXX or the path; it must accept GCC's options and C++20."""
    command = (
        shlex.split(os.environ.get("CXX", "")) or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    )
    if not command or not shutil.which(command[0]):
        raise BuildError(f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}; tried c++, g++, clang++)")
    probe = subprocess.run(
        [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"], input="", capture_output=True, text=True
    )
    if probe.returncode:
        raise BuildError(f"{shlex.join(command)} does not compile C++20: {probe.stderr.strip()}")
    return command


def check_tools(module: Module) -> list[str]:
    """The C++ compiler. Raises BuildError, saying what is missing, where `module` cannot be built."""
    if os.environ.get("E3_SKIP_BUILD") == "1":
        raise BuildError("E3_SKIP_BUILD=1 is set")
    if missing := [source for source in module.sources if not (ROOT / source).exists()]:
        raise NoSourceError(f"{', '.join(missing)} is not in this source tree")
    if os.name != "posix":
        raise BuildError(f"the native build supports Linux and macOS, not {platform.system()}")
    headers = Path(sysconfig.get_path("include"))
    if module.of_one_torch and not (headers / "Python.h").is_file():
        raise BuildError(f"Python.h is not in {headers}: install your system's python3-dev")
    return find_compiler()


def cuda_toolkit(torch: Torch) -> Path | None:
    """The CUDA toolkit to build with, None to leave the CUDA half out (no CUDA in torch, no nvcc of 12.4)."""
    forced = os.environ.get("FORCE_CUDA", "")
    if forced == "0" or (not forced and not torch.has_cuda):
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if forced:
            raise BuildError(f"FORCE_CUDA={forced} and no nvcc on the path")
        return None
    release = re.search(r"release (\d+)\.(\d+)", _said_by(nvcc, "--version"))
    if release is None or (int(release[1]), int(release[2])) < OLDEST_CUDA:
        if forced:
            raise BuildError(f"FORCE_CUDA={forced}, and {nvcc} is {release and release[0]}; it must be 12.4 or later")
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ TOP=")), None)
    if top is None:
        raise BuildError(f"{nvcc} --dryrun does not name its toolkit: {plan.strip()}")
    return Path(top)


def _said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def cuda_targets(known: Collection[int]) -> list[str]:
    """nvcc's options for a toolkit that compiles for `known`, as 90 for sm_90.

    PTX of the oldest lets the driver compile for any device from there on, also for those that come after the toolkit.
    """
    oldest = min(number for number in known if number >= 75)  # what the kernels are written for
    machine_code = [number for number in CUDA_MACHINE_CODE if number in known]
    return [
        f"-gencode=arch=compute_{oldest},code=compute_{oldest}",
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in machine_code),
    ]


def cuda_jobs(module: Module, toolkit: Path, folder: Path) -> list[list[str]]:
    nvcc = str(toolkit / "bin" / "nvcc")
    targets = cuda_targets({int(name) for name in re.findall(r"\bsm_(\d+)\b", _said_by(nvcc, "--list-gpu-code"))})
    common = ["-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    common += targets
    return [
        [nvcc, *common, "-c", source, "-o", str(folder / f"{module.name}.{Path(source).stem}.cuda.o")]
        for source in module.cuda
    ]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}".strip())


def compile_jobs(module: Module, torch: Torch, compiler: list[str], folder: Path) -> list[list[str]]:
    """One compile command for each object of the module, the slow ones (those that read torch's headers) first."""
    # No fused multiply-add unless a kernel asks for it: the sampler's noise has the same bits on every backend.
    common = [
        *["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-uninitialized"],
        *["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG", "-Icsrc"],
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]
    sets = INSTRUCTION_SETS.get(platform.machine(), PORTABLE)
    jobs = []
    for source in module.sources:
        target = folder / f"{module.name}.{Path(source).stem}.o"
        jobs.append([*compiler, *common, *module.flags(torch), "-c", source, "-o", str(target)])
    for source in (name for name in module.kernels if (ROOT / name).exists()):
        for isa, flags in reversed(sets.items()):
            target = folder / f"{module.name}.{Path(source).stem}.{isa}.o"
            jobs.append([*compiler, *common, *flags, f"-DE3_ISA_NAMESPACE={isa}", "-c", source, "-o", str(target)])
    return jobs


def build_module(
    module: Module, torch: Torch, target: Path, folder: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Compiles in `folder`, then links to a file in `target`; returns what `_build.json` keeps of it.

    `progress` is called with the number of objects that are compiled and that of all. Raises BuildError.
    """
    compiler = check_tools(module)
    toolkit = cuda_toolkit(torch) if module.cuda else None
    # With a CUDA half it needs the libraries of its variant of torch, so the name holds that too.
    filename = module.filename(torch.release if toolkit is None else torch.version)
    folder.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    jobs = compile_jobs(module, torch, compiler, folder)
    libraries = [f"-L{torch.folder / 'lib'}", *(f"-l{name}" for name in module.libraries)]
    if toolkit is not None:
        for job in jobs:
            job[-4:-4] = ["-DE3_WITH_CUDA", f"-isystem{toolkit / 'include'}"]
        jobs += cuda_jobs(module, toolkit, folder)
        libraries += ["-ltorch_cuda", "-lc10_cuda", f"-L{toolkit / 'lib64'}", "-lcudart"]
    progress(0, len(jobs))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or cores()) as pool:
        for done, _ in enumerate(pool.map(run, jobs), 1):
            progress(done, len(jobs))
    partial = folder / filename
    linker = shlex.split(os.environ.get("LDFLAGS", "")) + (
        ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-Wl,--gc-sections", "-s"]
    )
    run([*compiler, "-shared", *(job[-1] for job in jobs), *libraries, *linker, "-o", str(partial)])
    os.replace(shutil.copy2(partial, target / (filename + ".part")), target / filename)
    report = {"built": True, "file": filename, "compiler": shlex.join(compiler), "torch": torch.version}
    report["instruction_sets"] = list(INSTRUCTION_SETS.get(platform.machine(), PORTABLE))
    return report | ({"cuda": str(toolkit)} if toolkit is not None else {})


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
