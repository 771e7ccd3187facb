"""The README's table is the results file's, word for word."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from e3pruner.report import load_results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_table", ROOT / "bench" / "demo_table.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_names_its_source(demo_table: ModuleType, results: dict[str, Any]) -> None:
    results["environment"]["commit"] = "0123456789abcdef"
    markdown = demo_table.demo_markdown(results)
    assert markdown.splitlines()[0].startswith("| model | layers | parameters | held-out KL |")
    assert "`e3 demo --drop 8` at commit 0123456789ab: 3.5 minutes" in markdown


def test_writing_the_table_twice_changes_nothing(demo_table: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    once = demo_table.with_table(readme, "the table\n")
    assert "the table" in once
    assert demo_table.with_table(once, "the table\n") == once


def test_readme_holds_the_committed_figures(demo_table: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if (ROOT / "bench" / "results" / "demo.json").exists():
        results = load_results(ROOT / "bench" / "results", "demo.json")
        assert demo_table.with_table(readme, demo_table.demo_markdown(results)) == readme
    else:
        assert "No results file is committed yet" in readme
