"""Methods declare themselves, in files of ours or in another package."""

import os
import subprocess
import sys

import pytest
from cli.conftest import byte_tokenizer
from tiny_models import tiny_model

from e3pruner.mask_search import METHODS

MINE = """
from e3pruner.mask_search import search_method

@search_method("every-other")
def every_other(problem, *, first=1):
    removed = problem.free[first::2][:problem.drop]
    yield {"removed": removed}
    return removed
"""


def test_all_of_ours_are_found():
    assert set(METHODS) >= {"gumbel-topk", "greedy", "bi", "taylor", "random", "first-n", "last-n", "symmetric"}
    assert METHODS["greedy"].quotas
    assert not METHODS["clp"].quotas
    assert METHODS["clp"].options == {"steps": 40, "lr": 0.5}


def install(folder, points):
    """What pip leaves of a package with these entry points."""
    (folder / "mine.py").write_text(MINE)
    information = folder / "mine-0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(f"[e3pruner.methods]\n{points}\n")


def run(folder, *arguments):
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", "from e3pruner.cli import app; app()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("every-other = mine:every_other", ""),
        ("every-other = mine:MINE", "no attribute"),
        ("every-other = mine:search_method", "is not declared by search_method"),
        ("greedy = mine:every_other", "there is a search method 'greedy' already"),
    ],
)
def test_another_package_adds_a_method(tmp_path, points, message):
    install(tmp_path, points)
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Layers may go. " * 600, encoding="utf-8")
    options = ["--drop", 2, "--length", 16, "--sequences", 2, "--method", "every-other", "--option", "first=2"]
    paths = ["--model", tmp_path / "model", "--text", tmp_path / "text.txt", "--out", tmp_path / "out"]
    done = run(tmp_path, "search", *options, *paths)
    assert (done.returncode == 0) == (not message), done.stderr
    assert message in done.stderr
    assert ("remove [2, 4]" in done.stdout) == (not message)
