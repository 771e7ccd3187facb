"""Finds, compiles and loads `e3kernels._runtime`, which belongs to one release of torch and one Python.

It walks through ATen's tensors, operators, random generators and autograd, which torch's stable ABI does not offer, and
pybind11 binds it to one Python. A wheel holds it for the torch that it was built beside; beside any other it is
compiled once, from the sources in the wheel, into the cache folder. A file for another torch is never loaded: its
name says what it is for.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import platform
import sys
import tempfile
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import torch

from e3kernels.building import ROOT, RUNTIME, BuildError, Torch, build_module, check_tools

NAME = "e3kernels._runtime"
FOLDER = Path(__file__).parent


def cache_folder() -> Path:
    """Where what is compiled from these sources lies: in E3_CACHE, else e3kernels in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("E3_CACHE") or Path(home) / "e3kernels")
    sources = hashlib.sha256()
    for source in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        sources.update(source.read_bytes())
    return cache / f"runtime-{sources.hexdigest()[:16]}"


def built_file() -> Path | None:
    """The module for the torch and the Python that run here; None if there is none."""
    versions = (torch.__version__, torch.__version__.partition("+")[0])  # with a CUDA half, and without
    names = [RUNTIME.filename(version) for version in versions]
    files = [folder / name for folder in (FOLDER, cache_folder()) for name in names]
    return next((file for file in files if file.is_file()), None)


def load() -> ModuleType:
    """The compiled module, newly loaded: `e3kernels/_runtime.py` becomes it.

    Raises ModuleNotFoundError, saying what to do, where there is none for this torch and Python.
    """
    file = built_file()
    if file is None:
        raise ModuleNotFoundError(f"{_missing()}; {_remedy()}", name=NAME)
    loader = ExtensionFileLoader(NAME, str(file))
    module = module_from_spec(ModuleSpec(NAME, loader, origin=str(file)))
    loader.exec_module(module)
    return module


def load_or_build() -> ModuleType:
    """`e3kernels._runtime`, compiled first where it must be. Raises ImportError saying why it cannot be."""
    if NAME not in sys.modules and built_file() is None:
        try:
            build()
        except (BuildError, OSError) as error:
            raise ImportError(f"{_missing()} and cannot be built: {error}", name=NAME) from error
    return importlib.import_module(NAME)


def build() -> None:
    """Compile the module for the torch and the Python that run here into `cache_folder()`, once for all processes."""
    target = cache_folder()
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built_file() is None:
            with tempfile.TemporaryDirectory(prefix="e3kernels-") as folder:
                build_module(RUNTIME, Torch(Path(torch.__file__).parent), target, Path(folder), _say_progress)


def _say_progress(done: int, total: int) -> None:
    end = "\n" if done == total else "\r"
    text = f"e3kernels: compiling the runtime for torch {torch.__version__}, this once: {done} of {total} files"
    print(text, end=end, file=sys.stderr, flush=True)


def _missing() -> str:
    others = sorted(file.name for file in FOLDER.glob(f"{RUNTIME.name}.torch-*"))
    there = f" (there is {', '.join(others)})" if others else ""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{NAME} is not built for torch {torch.__version__} and {python}{there}"


def _remedy() -> str:
    try:
        check_tools(RUNTIME)
    except BuildError as error:
        return f"it cannot be built: {error}"
    return "LayerSkipRuntime compiles it when it first runs, `python -m e3kernels.runtime_module` does now: a minute"


if __name__ == "__main__":
    build()
    print(built_file())
