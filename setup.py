"""Installs the two native modules, of which neither is required. What was built or not, and why: `_build.json`.

Environment, beside that of `e3kernels/building.py`: E3_REQUIRE_BUILD=1 turns a failed build into an error; E3_TORCH
names the folder of the torch to build against, in place of the one that can be imported, as for another Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
REPORT = "_build.json"

# By its path: importing the package would import torch.
_spec = importlib.util.spec_from_file_location("building", ROOT / "e3kernels" / "building.py")
building = sys.modules["building"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(building)
MODULES = (building.OPS, building.RUNTIME)


def long_description(repository: str, version: str) -> str:
    """README.md for a page that lies elsewhere: its links point at the files of `version` in `repository`, or become
    the files' names where that is "", and images their captions."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if repository:
        text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{repository}/raw/v{version}/", text)
        return re.sub(r"(\]\()(?!https?:|#)", rf"\1{repository}/blob/v{version}/", text)
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)[^)]+\)", r"(\1)", text)
    text = re.sub(r"\[([^]]+)\]\(\1\)", r"`\1`", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)([^)#]+)[^)]*\)", r"\1 (`\2`)", text)


def urls(repository: str) -> dict[str, str]:
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def torch_to_build_against() -> building.Torch:
    named = os.environ.get("E3_TORCH")
    found = None if named else importlib.util.find_spec("torch")
    if not named and found is None:
        raise building.BuildError("torch is not installed where the build runs")
    return building.Torch(Path(named) if named else Path(found.origin).parent)


class BuildModules(build_ext):
    """setuptools' build_ext with our compile step; a module that cannot be built does not fail the installation."""

    def run(self) -> None:
        package = ROOT / "e3kernels" if self.inplace else Path(self.build_lib) / "e3kernels"
        package.mkdir(parents=True, exist_ok=True)
        if not self.inplace:  # `_runtime` can then be built for another torch
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True, ignore=shutil.ignore_patterns("fuzz*"))
        report = {module.name: self.build(module, package) for module in MODULES}
        partial = package / f"{REPORT}.part"
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, package / REPORT)

    def build(self, module: building.Module, package: Path) -> dict[str, object]:
        for earlier in package.glob(f"{module.name}*.so"):
            earlier.unlink()
        try:
            torch = torch_to_build_against()
            result = building.build_module(module, torch, package, Path(self.build_temp) / module.name)
        except building.BuildError as error:
            if os.environ.get("E3_REQUIRE_BUILD") == "1" and not isinstance(error, building.NoSourceError):
                raise
            self.warn(f"e3kernels.{module.name} is not built: {error}")
            return {"built": False, "reason": f"while installing, {error}"}
        self.announce(f"e3kernels.{module.name} is built: {result}", level=3)
        return result

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "e3kernels"
        return [str(path) for path in (*package.glob("_*.so"), package / REPORT, *package.glob("csrc/**/*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """Tagged by what it holds: `_runtime` is of one Python, `_ops` of all, and without either it runs anywhere."""

    def get_tag(self) -> tuple[str, str, str]:
        report = Path(self.get_finalized_command("build").build_lib) / "e3kernels" / REPORT
        if not report.exists():  # an editable installation asks before it builds
            return super().get_tag()
        built = {name: facts["built"] for name, facts in json.loads(report.read_text(encoding="utf-8")).items()}
        self.root_is_pure = not any(built.values())
        tag = super().get_tag()
        return tag if self.root_is_pure or built["_runtime"] else ("py3", "none", tag[2])


if __name__ == "__main__":
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    repository = facts["tool"]["e3kernels"]["repository"]
    setup(
        long_description=long_description(repository, facts["project"]["version"]),
        long_description_content_type="text/markdown",
        project_urls=urls(repository),
        ext_modules=[Extension(f"e3kernels.{module.name}", module.sources, optional=True) for module in MODULES],
        cmdclass={"build_ext": BuildModules, "bdist_wheel": Wheel},
    )
