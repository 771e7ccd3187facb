"""The kernels need torch alone; the rest names the one command that installs what it needs."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from e3pruner.requirements import PACKAGES

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


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    """Runs Python where nothing but torch, what it needs, and these sources can be imported."""
    folder, present = tmp_path_factory.mktemp("site"), needed_by("torch")
    for module, names in packages_distributions().items():
        if present & {canonicalize_name(name) for name in names}:
            files = [distribution(names[0]).locate_file(entry) for entry in (module, f"{module}.py")]
            for path in filter(os.path.exists, files):
                (folder / Path(path).name).symlink_to(path)

    def run(*arguments):
        paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "python")))
        environment = os.environ | {"PYTHONPATH": paths}
        return subprocess.run([sys.executable, "-S", *arguments], env=environment, capture_output=True, text=True)

    return run


def test_the_losses_need_torch_alone(torch_alone):
    done = torch_alone("-c", LOSSES)
    assert done.returncode == 0, done.stderr
    assert "linear_topk_kl" in done.stdout


def test_e3pruner_says_what_installs_it(torch_alone):
    done = torch_alone("-c", "import e3pruner")
    assert "ImportError: e3pruner needs accelerate, " in done.stderr
    assert done.stderr.rstrip().endswith("pip install 'e3kernels[hf]'")


def test_the_command_says_it_without_a_traceback(torch_alone, tmp_path):
    script = tmp_path / "e3"
    script.write_text("from e3pruner.cli import app\napp()\n")
    done = torch_alone(str(script), "--help")
    assert done.returncode == 1
    assert done.stderr.startswith("e3pruner needs ")
    assert done.stderr.count("\n") == 1


def test_the_extra_names_what_is_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [Requirement(text).name for text in project["dependencies"]] == ["torch"]
    extra = {Requirement(text).name for text in project["optional-dependencies"]["hf"]}
    assert extra == PACKAGES.keys()
    modules = packages_distributions()
    for name, module in PACKAGES.items():
        assert canonicalize_name(name) in {canonicalize_name(found) for found in modules[module]}
