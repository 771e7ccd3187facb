"""The report from a synthetic results file: whole, self-contained, honest about what is missing."""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3pruner.report import build_report, load_results, model_table, save_results
from e3pruner.report.html import shown, unbroken
from e3pruner.report.plots import COLOURS, PLOTS, draw, plotted, runs, themed
from e3pruner.report.table import figure


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


ONE_PLOT = ("importance", "mask_path", "curve", "frontier", "recovery")
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
        ('{"schema": 1}', "lacks 'title'"),
        ("null", "no results file"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": 1, "title": 3}', "title is 3"),
    ],
)
def test_a_bad_results_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        build_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


JUNK = ["$x^{", "$a$ $\\frac{$ \\$", "_hidden", "--></svg><script>", "\x00\x1b[31m", "\ud800", "{{ 7 }} %s &amp;"]


def with_junk(value: Any, junk: str) -> Any:
    """`value` with every text in it, keys but those of the format's own, replaced by `junk` and a number."""
    count = iter(range(10**6))

    def changed(part: Any, name: str = "") -> Any:
        if isinstance(part, str):
            return f"{junk}{next(count)}" if name != "method" else junk
        if isinstance(part, list):
            return [changed(item, name) for item in part]
        if isinstance(part, dict):
            free = name in ("curve", "config", "seconds", "answers", "versions", "backends", "machine")
            return {f"{junk}{key}" if free else key: changed(item, key) for key, item in part.items()}
        return part

    return changed(value)


@pytest.mark.parametrize("junk", JUNK)
def test_no_text_in_the_results_stops_the_report(results: dict[str, Any], tmp_path: Path, junk: str) -> None:
    # Three depths of one method each suffice; the plots of junk are drawn for real.
    results["comparison"] = results["comparison"][:1] + results["comparison"][3:4]
    results["mask_path"] = {"steps": [0, 1], "removed": [[0, 1], [1, 0]]}
    save_results(with_junk(results, junk), tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == len(PLOTS)
    assert "<script" not in page
    if junk.isprintable():
        assert escape(junk) in page
    if junk == "_hidden":  # matplotlib leaves such names out of a legend
        assert page.count("_hidden") > 12


@pytest.mark.parametrize("path", [("curve",), ("comparison", 0, "method"), ("comparison", 0, "recovery")])
def test_a_name_is_drawn_as_it_is(results: dict[str, Any], tmp_path: Path, path: tuple[Any, ...]) -> None:
    part = results
    for key in path[:-1]:
        part = part[key]
    name = "_cost $5 and $10"
    part[path[-1]] = {name: results["curve"]["bi"]} if path == ("curve",) else name
    plot = "curve" if path == ("curve",) else "depth"
    save_results(results, tmp_path)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", draw(plot, load_results(tmp_path), tmp_path))
    assert any(name in text for text in texts)


WRONG = [None, [], {}, 3, -1, True, "x", [None], [[]], [{}], {"x": None}, [[1]], {"x": [[1, 2, 3]]}, [["a", "b"]]]
PARTS = [
    "title",
    "environment",
    "summary",
    "command",
    "config",
    "seconds",
    "layers",
    "removed",
    "importance",
    "mask_path",
]
PARTS += ["methods", "comparison", "curve", "recovery", "models", "tasks", "generations", "frontier"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_form_is_shown_or_named(results: dict[str, Any], tmp_path: Path, part: str) -> None:
    refused = 0
    for number, wrong in enumerate(WRONG):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_results({key: results[key] for key in ("title", "environment")} | {part: wrong}, folder)
        try:
            build_report(folder)
        except ValueError as error:
            refused += 1
            assert f"results.json is damaged: {part}" in str(error)  # noqa: PT017  some are shown
            assert [path.name for path in folder.iterdir()] == ["results.json"]
    assert refused > 6


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in `value`, but of each list the first and of each plain mapping two only."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def test_wherever_it_is_damaged_a_sentence_says_so(results: dict[str, Any], tmp_path: Path) -> None:
    """Every value of the results in turn replaced by null, a list, an object, a text and a negative number."""
    for path in places(results):
        if not path or path[0] in ("environment", "config", "seconds"):
            continue
        for wrong in (None, [], {}, "x", -1):
            damaged = copy.deepcopy({key: results[key] for key in ("title", "environment", path[0])})
            part = damaged
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = wrong
            save_results(damaged, tmp_path)
            try:
                loaded = load_results(tmp_path)
            except ValueError as error:
                assert f"results.json is damaged: {path[0]}" in str(error)  # noqa: PT017
                continue
            model_table(loaded)
            for name in PLOTS:
                if plotted(name, loaded):
                    PLOTS[name](loaded)


def test_the_results_of_the_demo_have_their_form() -> None:
    results = load_results(Path(__file__).parents[2] / "bench" / "results", "demo.json")
    assert [model["name"] for model in results["models"]] == ["dense", "pruned", "recovered"]


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
    assert "<td>1.120 (1.008–1.344)</td>" in page.replace("\N{WORD JOINER}", "")


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


@pytest.mark.parametrize("kl", [float("inf"), float("nan"), 1e300, -1.0])
def test_a_divergence_that_is_no_number_is_drawn(results: dict[str, Any], tmp_path: Path, kl: float) -> None:
    results["importance"][3] = results["curve"]["bi"][1][1] = results["models"][1]["kl"] = kl
    results["comparison"][0]["kl"] = [kl, 0.5, 0.6]
    results["recovery"]["train"][2][1] = results["recovery"]["held_out"][0][1] = kl
    save_results(results, tmp_path)
    assert build_report(tmp_path).read_text(encoding="utf-8").count("<svg") == len(PLOTS)


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2], "1, 2"),
        ([], "–"),
        (None, "–"),
        (0.123456, "0.123"),
        (12345.6, "12,346"),
        ({"a": [1.0]}, "a 1"),
        (True, "True"),
    ],
)
def test_facts_are_text(value, text):
    """Lists used to stand on the page as Python writes them, and figures with all their digits."""
    assert shown(value) == text


def test_the_page_says_where_it_comes_from_and_links_its_data(tmp_path, results):
    save_results(results, tmp_path)
    page = build_report(tmp_path).read_text()
    for name in ("results.json", *(path.name for path in tmp_path.glob("*.png"))):
        assert f'<a href="{name}">{name}</a>' in page
    assert "load average" in page
    assert results["environment"]["date"] in page


def test_a_figure_breaks_only_before_its_spread() -> None:
    """On a narrow screen "1.234–1.304" used to take three lines."""
    assert unbroken("95.1 ± 2 (94.2–97)") == "95.1\u00a0±\u00a02 (94.2\u2060–\u206097)"


def test_many_doubts_leave_room_for_the_page(results: dict[str, Any], tmp_path: Path) -> None:
    kept = {key: results[key] for key in ("title", "environment")}
    save_results(kept | {"timing": {"doubts": [f"reason {number}" for number in range(19)]}}, tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "<summary>and 13 more</summary>" in page
    assert all(f"reason {number}<" in page for number in range(19))


@pytest.mark.parametrize(
    ("value", "text"), [(118250102.6, "1.18e+08"), (37839.2, "37,839"), (48.94, "48.9"), (0.05, "0.05"), (1e6, "1e+06")]
)
def test_figures_have_three_significant_digits(value: float, text: str) -> None:
    assert figure(value) == text
