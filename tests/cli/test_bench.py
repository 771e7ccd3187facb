import json
from pathlib import Path

import pytest

from e3pruner.report.benchmarks import read

ONLY = "gumbel_topk and e3 and value-30"


@pytest.fixture(scope="module")
def measured(e3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case measured for real."""
    out = tmp_path_factory.mktemp("bench") / "now.jsonl"
    result = e3("bench", "--only", ONLY, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def changed(path: Path, target: Path, factor: float) -> Path:
    rows = [row | {"median": row["median"] * factor} for row in read(path)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def test_a_run_writes_a_row_a_case_with_its_table(measured: Path) -> None:
    (row,) = read(measured)
    assert (row["op"], row["provider"], row["phase"], row["L"]) == ("gumbel_topk", "e3", "value", 30)
    assert row["median"] > 0
    assert {"commit", "versions", "isa", "machine", "peak_bytes", "rate", "p20", "p80"} <= row.keys()
    assert "| e3 |" in measured.with_suffix(".md").read_text(encoding="utf-8")


def test_a_slower_case_fails_and_rows_of_other_cases_stay(e3, measured: Path, tmp_path: Path) -> None:
    other = read(measured)[0] | {"L": 7}
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(other) + "\n", encoding="utf-8")
    quick = changed(measured, tmp_path / "quick.jsonl", 1e-3)
    result = e3("bench", "--only", ONLY, "--out", out, "--compare", quick, "--fail-if-slower", "5%")
    assert result.exit_code == 1, result.output
    assert "1 of 1 cases are more than 5% slower" in result.output
    assert [row["L"] for row in read(out)] == [7, 30]


def test_a_quicker_case_passes(e3, measured: Path, tmp_path: Path) -> None:
    slow = changed(measured, tmp_path / "slow.jsonl", 1e3)
    result = e3("bench", "--only", ONLY, "--out", tmp_path / "out.jsonl", "--compare", slow, "--fail-if-slower", "5%")
    assert result.exit_code == 0, result.output
    assert "-99" in result.output


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
    e3, measured: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    filled = [argument.format(old=measured, folder=tmp_path) for argument in arguments]
    result = e3("bench", "--only", ONLY, "--out", tmp_path / "out.jsonl", *filled)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out.jsonl").exists()
