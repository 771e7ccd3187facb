"""Build of the two compiled modules; neither is required. What was built or not, and why: `e3kernels/_build.json`.

`e3kernels/_ops` uses torch's stable ABI only and no Python symbol, so one file serves every torch >= 2.11 and Python.
`e3kernels/_runtime` is a pybind11 + ATen extension of this torch and this Python.

The CUDA half of `_runtime` is built where torch has CUDA and nvcc is found.

Environment: E3_SKIP_BUILD=1 builds nothing; E3_REQUIRE_BUILD=1 turns a failed build into an error; FORCE_CUDA=1 builds
the CUDA half or fails, FORCE_CUDA=0 leaves it out; CXX, CXXFLAGS, LDFLAGS and MAX_JOBS as usual.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
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
CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildError(Exception):
    """A module cannot be built here; the message says why."""


class NoSourceError(BuildError):
    """This source tree does not hold the module."""


@dataclass(frozen=True)
class Module:
    """One shared library; `sources` are compiled once, `kernels` once an instruction set, in its own namespace."""

    name: str
    filename: str
    sources: list[str]
    kernels: list[str]
    libraries: list[str]
    python: bool
    cuda: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        torch_include = torch_folder() / "include"
        if not self.python:
            return [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f"-isystem{torch_include}"]
        include = [torch_include, torch_include / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include")]
        return [f"-DTORCH_EXTENSION_NAME={self.name}", *(f"-isystem{folder}" for folder in include)]


MODULES = [
    Module(
        "_ops",
        "_ops.so",
        sources=["csrc/torch/ops.cpp"],
        kernels=["csrc/kernels/ops_table.cpp"],
        libraries=["torch_cpu"],
        python=False,
    ),
    Module(
        "_runtime",
        "_runtime" + sysconfig.get_config_var("EXT_SUFFIX"),
        sources=["csrc/torch/runtime.cpp"],
        kernels=["csrc/decode/runtime_table.cpp"],
        libraries=["torch", "torch_cpu", "torch_python", "c10"],
        python=True,
        cuda=("csrc/cuda/layer_graph.cu",),
    ),
]


def torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"torch cannot be imported while building: {error}") from error
    return Path(torch.__file__).parent


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


def cuda_toolkit() -> Path | None:
    """The CUDA toolkit to build with, None to leave the CUDA half out."""
    import torch

    forced = os.environ.get("FORCE_CUDA", "")
    if forced == "0" or (not forced and torch.version.cuda is None):
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if forced:
            raise BuildError(f"FORCE_CUDA={forced} and no nvcc on the path")
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ TOP=")), None)
    if top is None:
        raise BuildError(f"{nvcc} --dryrun does not name its toolkit: {plan.strip()}")
    return Path(top)


def cuda_jobs(module: Module, toolkit: Path, folder: Path) -> list[list[str]]:
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in CUDA_ARCHITECTURES]
    common = ["-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets]
    nvcc = str(toolkit / "bin" / "nvcc")
    return [
        [nvcc, *common, "-c", source, "-o", str(folder / f"{module.name}.{Path(source).stem}.cuda.o")]
        for source in module.cuda
    ]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}".strip())


def compile_jobs(module: Module, compiler: list[str], folder: Path) -> list[list[str]]:
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
        jobs.append([*compiler, *common, *module.flags(), "-c", source, "-o", str(target)])
    for source in (name for name in module.kernels if (ROOT / name).exists()):
        for isa, flags in reversed(sets.items()):
            target = folder / f"{module.name}.{Path(source).stem}.{isa}.o"
            jobs.append([*compiler, *common, *flags, f"-DE3_ISA_NAMESPACE={isa}", "-c", source, "-o", str(target)])
    return jobs


def build_module(module: Module, target: Path, folder: Path) -> dict[str, object]:
    """Compiles and links `module` to `target`; returns what `_build.json` keeps of it."""
    missing = [source for source in module.sources if not (ROOT / source).exists()]
    if missing:
        raise NoSourceError(f"{', '.join(missing)} is not in this source tree")
    if os.name != "posix":
        raise BuildError(f"the native build supports Linux and macOS, not {platform.system()}")
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    toolkit = cuda_toolkit() if module.cuda else None
    jobs = compile_jobs(module, compiler, folder)
    libraries = [f"-L{torch_folder() / 'lib'}", *(f"-l{name}" for name in module.libraries)]
    if toolkit is not None:
        for job in jobs:
            job[-4:-4] = ["-DE3_WITH_CUDA", f"-isystem{toolkit / 'include'}"]
        jobs += cuda_jobs(module, toolkit, folder)
        libraries += ["-ltorch_cuda", "-lc10_cuda", f"-L{toolkit / 'lib64'}", "-lcudart"]
    workers = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, jobs))
    partial = folder / module.filename
    linker = shlex.split(os.environ.get("LDFLAGS", "")) + (
        ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-Wl,--gc-sections", "-s"]
    )
    run([*compiler, "-shared", *(job[-1] for job in jobs), *libraries, *linker, "-o", str(partial)])
    os.replace(shutil.copy2(partial, target.with_name(target.name + ".part")), target)
    report = {"built": True, "compiler": shlex.join(compiler), "instruction_sets": instruction_sets(module)}
    return report | ({"cuda": str(toolkit)} if toolkit is not None else {})


def instruction_sets(module: Module) -> list[str]:
    present = any((ROOT / name).exists() for name in module.kernels)
    return list(INSTRUCTION_SETS.get(platform.machine(), PORTABLE)) if present else []


class BuildModules(build_ext):
    """setuptools' build_ext with our compile step; a module that cannot be built does not fail the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        package, name = fullname.rsplit(".", 1)
        return str(Path(*package.split("."), next(m.filename for m in MODULES if m.name == name)))

    def run(self) -> None:
        package = ROOT / "e3kernels" if self.inplace else Path(self.build_lib) / "e3kernels"
        report = {module.name: self.build(module, package / module.filename) for module in MODULES}
        package.mkdir(parents=True, exist_ok=True)
        partial = package / "_build.json.part"
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, package / "_build.json")

    def build(self, module: Module, target: Path) -> dict[str, object]:
        target.unlink(missing_ok=True)
        try:
            if os.environ.get("E3_SKIP_BUILD") == "1":
                raise BuildError("E3_SKIP_BUILD=1 was set while installing")
            result = build_module(module, target, Path(self.build_temp) / module.name)
        except BuildError as error:
            if os.environ.get("E3_REQUIRE_BUILD") == "1" and not isinstance(error, NoSourceError):
                raise
            self.warn(f"e3kernels.{module.name} is not built: {error}")
            return {"built": False, "reason": str(error)}
        self.announce(f"e3kernels.{module.name} is built: {result}", level=3)
        return result

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "e3kernels"
        return [str(path) for path in (package / m.filename for m in MODULES) if path.exists()] + [
            str(package / "_build.json")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"e3kernels.{module.name}", module.sources, optional=True) for module in MODULES],
        cmdclass={"build_ext": BuildModules},
    )
