"""One `_runtime` for each torch and Python: which file is loaded, and what is said and done where there is none."""

import importlib
import os
import stat
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from e3kernels import building, info, runtime_module

RELEASE = torch.__version__.partition("+")[0]
SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Neither the package nor the cache holds a module, and none is loaded."""
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(runtime_module, "FOLDER", package)
    monkeypatch.setenv("E3_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "e3kernels._runtime", raising=False)
    monkeypatch.delenv("E3_SKIP_BUILD", raising=False)
    return package


def compiled(monkeypatch, calls):
    """In place of a minute's compilation: an empty file of the right name."""

    def build(module, of, target, folder, progress):
        calls.append(of.version)
        progress(0, 6), progress(6, 6)
        (target / module.filename(of.release)).touch()

    monkeypatch.setattr(runtime_module, "build_module", build)


@pytest.mark.parametrize("other", [f"_runtime.torch-1.0.0{SUFFIX}", f"_runtime{SUFFIX}", "_runtime.torch-1.0.0.so"])
def test_a_module_for_another_torch_is_not_loaded(nowhere, other):
    (nowhere / other).touch()  # loading it would raise OSError or worse
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module("e3kernels._runtime")
    assert f"not built for torch {torch.__version__} and CPython" in str(caught.value)
    assert "python -m e3kernels.runtime_module" in str(caught.value)
    if "torch-" in other:
        assert f"(there is {other})" in str(caught.value)


def test_info_says_how_to_get_the_module(nowhere, monkeypatch):
    said = info()["native_modules"]["_runtime"]
    assert "LayerSkipRuntime compiles it when it first runs" in said
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "cannot be built: no C++ compiler found (CXX='no-such-compiler'" in info()["native_modules"]["_runtime"]
    monkeypatch.setenv("E3_SKIP_BUILD", "1")
    assert "cannot be built: E3_SKIP_BUILD=1 is set" in info()["native_modules"]["_runtime"]


def test_it_is_compiled_once_at_the_first_use(nowhere, monkeypatch, tmp_path, capsys):
    calls = []
    compiled(monkeypatch, calls)
    with pytest.raises(ImportError, match=r"file too short|invalid|not a mach-o"):  # what was "compiled" is loaded
        runtime_module.load_or_build()
    assert calls == [torch.__version__]
    file = runtime_module.built_file()
    assert file.name == f"_runtime.torch-{RELEASE}{SUFFIX}"
    assert file.is_relative_to(tmp_path / "cache")
    assert "compiling the runtime for torch" in capsys.readouterr().err
    runtime_module.build()
    assert calls == [torch.__version__]


def test_other_sources_have_another_cache(monkeypatch, tmp_path):
    here = runtime_module.cache_folder()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "runtime.cpp").write_text("int main() {}")
    monkeypatch.setattr(runtime_module, "ROOT", tmp_path)
    assert runtime_module.cache_folder() != here


def test_what_cannot_be_built_says_why(nowhere, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ImportError, match=r"not built for torch .* and cannot be built: no C\+\+ compiler found"):
        runtime_module.load_or_build()


def test_sampling_never_compiles(nowhere, monkeypatch):
    from e3kernels.ops.gumbel_topk import _direct

    calls = []
    compiled(monkeypatch, calls)
    _direct.cache_clear()
    _direct("native", "cpu")
    _direct.cache_clear()
    assert calls == []


def test_the_build_reads_torchs_version_without_importing_it():
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('building', sys.argv[1]);"
        "sys.modules['building'] = m = u.module_from_spec(s); s.loader.exec_module(m); from pathlib import Path;"
        "t = m.Torch(Path(sys.argv[2])); print(t.version, t.has_cuda, 'torch' in sys.modules)"
    )
    arguments = (building.__file__, Path(torch.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.stdout.split() == [torch.__version__, str(torch.version.cuda is not None), "False"], done.stderr


def test_a_folder_without_torch_is_named(tmp_path):
    with pytest.raises(building.BuildError, match=f"{tmp_path} holds no torch"):
        building.Torch(tmp_path)


def test_a_compiler_that_lacks_the_standard_is_named(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no C++20 here >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("E3_SKIP_BUILD", raising=False)
    with pytest.raises(building.BuildError, match="does not compile C\\+\\+20: no C\\+\\+20 here"):
        building.check_tools(building.RUNTIME)


def test_python_headers_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(building.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("E3_SKIP_BUILD", raising=False)
    with pytest.raises(building.BuildError, match=r"Python\.h is not in"):
        building.check_tools(building.RUNTIME)
    assert os.path.basename(building.check_tools(building.OPS)[0])  # which has no Python in it
