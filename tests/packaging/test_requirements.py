"""The kernels need torch alone; the rest names the one command that installs what it needs."""

import os
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from e3pruner.pipelines.settings import check_recover
from e3pruner.requirements import EXTRAS, PACKAGES, require

ROOT = Path(__file__).parents[2]
LOSSES = """
import sys, torch, e3kernels
student, teacher = torch.randn(5, 32, requires_grad=True), torch.randn(5, 32)
e3kernels.entropy_kl(student, teacher).backward()
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(32, 8)
e3kernels.linear_entropy_kl(hidden, weight, hidden.detach(), weight).backward()
logprobs, ids = teacher.log_softmax(-1).topk(4)
e3kernels.topk_kl(student, logprobs, ids).backward()
e3kernels.linear_topk_kl(hidden, weight, logprobs, ids).backward()
mask, probs = e3kernels.gumbel_topk(torch.randn(6, requires_grad=True), 3)
e3kernels.gated_residual(hidden, hidden, mask.sum()).sum().backward()
print(sorted(e3kernels.info()["operations"]))
"""


def needed_by(name: str) -> set[str]:
    """The distributions that installing `name` alone brings."""
    found, left = set(), [name]
    while left:
        name = canonicalize_name(left.pop())
        if name not in found:
            found.add(name)
            needed = [Requirement(text) for text in distribution(name).requires or ()]
            left += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def metadata_of(name: str) -> list[Any]:
    return [file for file in distribution(name).files or () if file.name == "METADATA"]


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Runs Python where nothing but the distributions `names`, what they need, and these sources can be imported."""

    @cache
    def site(*names):
        folder, present = tmp_path_factory.mktemp("site"), set().union(*map(needed_by, names))
        facts = {Path(distribution(name).locate_file(file)).parent for name in present for file in metadata_of(name)}
        found = [names for names in packages_distributions().items() if present & set(map(canonicalize_name, names[1]))]
        for module, (name, *_) in found:
            facts |= {Path(distribution(name).locate_file(entry)) for entry in (module, f"{module}.py")}
        for path in filter(Path.exists, facts):
            (folder / path.name).symlink_to(path)
        return folder

    def run(names, *arguments):
        paths = os.pathsep.join(map(str, (site(*names), ROOT, ROOT / "python")))
        environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"}  # its interpreter wants numpy
        return subprocess.run([sys.executable, "-S", *arguments], env=environment, capture_output=True, text=True)

    return run


def test_the_losses_need_torch_alone(beside):
    done = beside(["torch"], "-c", LOSSES)
    assert done.returncode == 0, done.stderr
    assert "linear_topk_kl" in done.stdout


def test_e3pruner_says_what_installs_it(beside):
    done = beside(["torch"], "-c", "import e3pruner")
    assert "ImportError: e3pruner needs accelerate, " in done.stderr
    assert done.stderr.rstrip().endswith("pip install 'e3kernels[hf]'")


def test_the_command_says_it_without_a_traceback(beside, tmp_path):
    script = tmp_path / "e3"
    script.write_text("from e3pruner.cli import app\napp()\n")
    done = beside(["torch"], str(script), "--help")
    assert done.returncode == 1
    assert done.stderr.startswith("e3pruner needs ")
    assert done.stderr.count("\n") == 1


def test_the_command_needs_the_packages_of_the_extra_and_no_other(beside, tmp_path):
    script = tmp_path / "e3"
    script.write_text("from e3pruner.cli import app\napp()\n")
    done = beside(["torch", *PACKAGES], str(script), "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("e3kernels ")


@pytest.mark.parametrize("module", EXTRAS)
def test_a_package_of_another_extra_is_asked_for_by_its_command(module, monkeypatch):
    monkeypatch.setattr("e3pruner.requirements.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module} is not installed: pip install 'e3kernels\[\w+\]'"):
        require(module)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][EXTRAS[module]]
    names = {name for text in extra for name in needed_by(Requirement(text).name)}
    assert module.replace("_", "-") in names


def test_adapters_without_peft_are_refused_before_the_search(monkeypatch):
    monkeypatch.setattr("e3pruner.requirements.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"peft is not installed: pip install 'e3kernels\[lora\]'"):
        check_recover({"trainable": "lora"})


def test_the_extra_names_what_is_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [Requirement(text).name for text in project["dependencies"]] == ["torch"]
    extra = {Requirement(text).name for text in project["optional-dependencies"]["hf"]}
    assert extra == PACKAGES.keys()
    modules = packages_distributions()
    for name, module in PACKAGES.items():
        assert canonicalize_name(name) in {canonicalize_name(found) for found in modules[module]}
