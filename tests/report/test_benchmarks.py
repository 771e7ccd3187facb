import json

import pytest

from e3pruner.report.benchmarks import compare, complete, read, slower, table, write


def row(provider, median, *, op="entropy_kl", rows=512, work=1e9):
    return {
        "op": op, "provider": provider, "phase": "value+grad", "dtype": "float32", "N": rows, "V": 49_152, "work": work,
        "unit": "B", "median": median, "p20": 0.9 * median, "p80": 1.1 * median, "rounds": 5, "peak_bytes": 3 << 20,
        "loss_error": None, "grad_error": 2e-7,
    }  # fmt: skip


@pytest.fixture
def rows():
    return complete([row("floor", 0.1), row("e3", 0.2), row("eager", 2.0)], {"commit": "abc"})


def test_rate_and_share_of_the_measured_ceiling(rows):
    assert [r["rate"] for r in rows] == [10.0, 5.0, 0.5]
    assert [r["share"] for r in rows] == [1.0, 0.5, 0.05]
    assert all(r["commit"] == "abc" for r in rows)
    assert complete([row("e3", 0.2)], {})[0]["share"] is None


def test_written_rows_are_read_back_with_their_table(rows, tmp_path):
    write(tmp_path / "run.jsonl", rows)
    assert read(tmp_path / "run.jsonl") == rows
    assert (tmp_path / "run.md").read_text(encoding="utf-8") == table(rows) + "\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.jsonl", "run.md"]


def test_table_gives_times_relative_to_floor_and_to_ours(rows):
    lines = table(rows).splitlines()
    assert "| floor | 100 |" in lines[2]
    assert "| 2.00 | 1.00 |" in lines[3]
    assert "| eager | 2000 | 1800–2200 | 20.00 | 10.00 | 0.5 GB/s | 3 | – | 2.0e-07 |" in lines[4]


@pytest.mark.parametrize("line", ["{", "[1]", json.dumps({"op": "entropy_kl", "provider": "e3"})])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row("e3", 1.0)) + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read(path)


def test_compare_is_relative_to_each_runs_own_floor():
    old = [row("floor", 0.1), row("e3", 0.2), row("e3", 0.3, op="other"), row("e3", 0.1, rows=64)]
    new = [row("floor", 0.2), row("e3", 0.4), row("e3", 0.33, op="other")]
    changes = compare(old, new)
    assert [round(change.factor, 6) for change in changes] == [1.1, 1.0]
    assert [change.case[0] for change in slower(changes, 0.05)] == ["other"]
    assert slower(changes, 0.2) == []


def turned(provider, median, scatter, doubts=()):
    """A row as the turns of a case leave it."""
    quartiles = [median * (1 - scatter), median * (1 + scatter)]
    return row(provider, median) | {"quartiles": quartiles, "rounds": 25, "doubts": list(doubts)}


def test_a_change_within_the_scatter_of_both_runs_is_none():
    """It used to fail --fail-if-slower whatever the machine did meanwhile."""
    old = [turned("floor", 0.1, 0.0), turned("e3", 0.2, 0.01)]
    calm, wild = ([turned("floor", 0.1, 0.0), turned("e3", 0.24, scatter)] for scatter in (0.01, 0.5))
    assert [change.case[0] for change in slower(compare(old, calm), 0.05)] == ["entropy_kl"]
    assert slower(compare(old, wild), 0.05) == []
    assert compare(old, wild)[0].margin == pytest.approx(2 * 1.57 * (0.5 + 0.01) / 5)


def test_the_table_opens_with_what_is_not_reliable():
    doubt = "other programs kept 1.4 of 2 cores busy"
    rows = complete([turned("floor", 0.1, 0.0, [doubt]), turned("e3", 0.2, 0.01, [doubt])], {})
    assert table(rows).splitlines()[:3] == ["Not reliable, 1 reason:", "", f"- {doubt}"]
    assert "198–202" in table(rows)
    calm = complete([turned("e3", 0.2, 0.01)], {})
    assert table(calm).startswith("Reliable: ")
