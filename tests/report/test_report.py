"""The report from a synthetic results file: whole, self-contained, honest about what is missing."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3pruner.report import build_report, load_results, model_table, save_results
from e3pruner.report.plots import COLOURS, PLOTS, draw, runs, themed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, whole_results: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("report")
    save_results(whole_results, folder)
    build_report(folder)
    return folder


@pytest.fixture
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_needs_nothing_else(page: str) -> None:
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:|//|file:)""", without_namespaces)
    assert "<script" not in page
    assert "<link" not in page


def test_page_shows_every_part(page: str, results: dict[str, Any]) -> None:
    assert page.count("<svg") == len(PLOTS)
    for text in ("recovered", "71.20", "55.0%", "1.120", "pruned by bi", "e3 demo --drop 8", "What is the capital"):
        assert text in page
    assert page.count('class="cut"') == len(results["removed"])


def test_generated_text_is_escaped(page: str) -> None:
    assert "Paris &amp; &lt;b&gt;light&lt;/b&gt;." in page
    assert "<b>light" not in page


def test_plots_follow_the_theme_of_the_page(page: str) -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--removed)" in plots
    for colour in vars(COLOURS).values():
        assert colour not in plots


def test_plots_are_pngs(folder: Path) -> None:
    assert {path.stem for path in folder.glob("*.png")} == set(PLOTS)
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


ONE_PLOT = ("importance", "mask_path", "curve", "recovery")
OTHER_PARTS = {"comparison": {"quality", "price", "depth"}}
OTHER_PARTS |= {part: set() for part in (None, "models", "generations", "methods", "config", "seconds")}


@pytest.mark.parametrize("part", [*ONE_PLOT, *OTHER_PARTS])
def test_each_part_stands_alone(results: dict[str, Any], tmp_path: Path, part: str | None) -> None:
    kept = ("title", "environment", part)
    save_results({key: value for key, value in results.items() if key in kept}, tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "How these figures came about" in page
    drawn = OTHER_PARTS.get(part, {part})
    assert {path.stem for path in tmp_path.glob("*.png")} == drawn
    assert {name for name in PLOTS if f'id="{name}"' in page} == drawn


def test_same_results_same_page(folder: Path, page: str, tmp_path: Path) -> None:
    shutil.copy(folder / "results.json", tmp_path)
    assert build_report(tmp_path).read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "no results file"),
        ('{"schema": 99}', "no results file"),
        ('{"schema": 1}', "lacks title"),
    ],
)
def test_a_bad_results_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        build_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        load_results(tmp_path)


def test_results_survive_the_round_trip(results: dict[str, Any], tmp_path: Path) -> None:
    save_results(results, tmp_path)
    assert load_results(tmp_path) == json.loads(json.dumps({"schema": 1, **results}))


def test_a_comparison_of_one_depth_has_no_curve_over_depths(results: dict[str, Any], tmp_path: Path) -> None:
    results["comparison"] = [line for line in results["comparison"] if line["drop"] == 8]
    save_results(results, tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert 'id="quality"' in page
    assert 'id="depth"' not in page
    assert "<td>1.120 (1.008–1.344)</td>" in page


def test_table_puts_the_rivals_behind_the_pruned_model(results: dict[str, Any]) -> None:
    headings, rows = model_table(results)
    assert headings[:3] == ["model", "layers", "parameters"]
    names = ["dense", "pruned", "pruned by leave-one-out", "pruned by bi", "recovered"]
    assert [row[0] for row in rows] == names
    assert rows[2][headings.index("held-out KL")] == "1.190"
    assert rows[2][headings.index("decode tokens/s")] == "–"


def test_table_leaves_out_what_nobody_measured(results: dict[str, Any]) -> None:
    for model in results["models"]:
        del model["prefill_tokens_per_s"]
    assert "prefill tokens/s" not in model_table(results)[0]


def test_layers_of_no_importance_are_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    # A layer whose removal changes nothing has KL 0, or a rounding error below it: no logarithm exists.
    results["importance"] = [0.0, -1e-9, 0.3]
    assert "nan" not in draw("importance", results, tmp_path).lower()


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=40))
def test_runs_cover_the_row(row: list[float]) -> None:
    parts = list(runs(np.asarray(row)))
    assert [value for start, stop, value in parts for _ in range(start, stop)] == row
    assert all(a[2] != b[2] for a, b in pairwise(parts))


def test_themed_svg_scales_with_the_page() -> None:
    svg = f'<?xml version="1.0"?>\n<svg width="6pt" height="2pt" viewBox="0 0 6 2"><rect fill="{COLOURS.ink}"/></svg>'
    assert themed(svg) == '<svg viewBox="0 0 6 2"><rect fill="var(--ink)"/></svg>'
