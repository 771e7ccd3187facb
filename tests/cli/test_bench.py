import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import e3pruner
from e3pruner.cli.commands import bench
from e3pruner.report.benchmarks import Row, case_of, read, write

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "kernels.jsonl"
ONLY = "gumbel_topk and e3 and value-30"


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """The suites run in a process of their own, no worker of ours: a worker's own variables would make them workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
            patch.delenv(name)
        yield


@pytest.fixture
def recorded() -> Row:
    """The case of `ONLY` as the repository's results have it."""
    case = {"op": "gumbel_topk", "provider": "e3", "phase": "value", "L": 30}
    (row,) = [row for row in read(RESULTS) if case.items() <= row.items()]
    return row


def with_median(row: Row, factor: float, target: Path) -> Path:
    write(target, [row | {"median": row["median"] * factor}])
    return target


def test_a_run_writes_a_row_a_case_with_its_table(e3, recorded: Row, tmp_path: Path) -> None:
    out, slow = tmp_path / "now.jsonl", with_median(recorded, 1e6, tmp_path / "slow.jsonl")
    result = e3("bench", "--only", ONLY, "--out", out, "--compare", slow, "--fail-if-slower", "5%")
    assert result.exit_code == 0, result.output
    assert "-100" in result.output
    (row,) = read(out)
    assert (row["op"], row["provider"], row["phase"], row["L"]) == ("gumbel_topk", "e3", "value", 30)
    assert case_of(row) == case_of(recorded)
    assert row["median"] > 0
    assert {
        "commit",
        "versions",
        "isa",
        "machine",
        "peak_bytes",
        "rate",
        "quartiles",
        "doubts",
        "conditions",
    } <= row.keys()
    assert "| e3 |" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_a_slower_case_fails_and_rows_of_other_cases_stay(e3, recorded: Row, tmp_path: Path) -> None:
    out, quick = tmp_path / "out.jsonl", with_median(recorded, 1e-3, tmp_path / "quick.jsonl")
    write(out, [recorded | {"L": 7}])
    result = e3("bench", "--only", ONLY, "--out", out, "--compare", quick, "--fail-if-slower", "5%")
    assert result.exit_code == 1, result.output
    assert "1 of 1 cases are more than 5% slower" in result.output
    assert [row["L"] for row in read(out)] == [7, 30]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-if-slower", "5%"], "--fail-if-slower 5% needs --compare"),
        (["--compare", "{old}", "--fail-if-slower", "5"], "--fail-if-slower is '5'; it must be a percentage"),
        (["--compare", "{old}", "--fail-if-slower", "-1%"], "must be a percentage"),
        (["--compare", "{folder}/none.jsonl"], "none.jsonl"),
        (["--compare", "{folder}/bad.jsonl"], "line 1: not a benchmark row"),
        (["--out", "{folder}/bad.jsonl"], "line 1: not a benchmark row"),
    ],
)
def test_bad_usage_is_refused_before_anything_is_measured(
    e3, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    filled = [argument.format(old=RESULTS, folder=tmp_path) for argument in arguments]
    result = e3("bench", "--only", ONLY, "--out", tmp_path / "out.jsonl", *filled)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out.jsonl").exists()


def test_the_suites_are_found_from_a_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package may be installed beside it, as from a wheel."""
    monkeypatch.setattr(e3pruner, "__file__", str(tmp_path / "site-packages" / "e3pruner" / "__init__.py"))
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root / "docs")
    assert bench.suites() == root / "bench" / "ops"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no source tree"):
        bench.suites()


def test_what_is_missing_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("ninja", "trl") else real(name))
    with pytest.raises(ModuleNotFoundError, match=r"ninja, trl; pip install 'e3kernels\[bench\]'"):
        bench.check_needs(None)
    bench.check_needs("gumbel_topk and e3")
