"""What a cut does to writing, as the pages tell it; and how sure they are of their speeds."""

import math

import pytest

from e3pruner.report import build_report, save_results, writing_table
from e3pruner.report.writing import request_speed, with_error


def written(tokens, loops=0.0, right=0.5):
    figures = {"loops": [loops, 0.1], "distinct_bigrams": [0.5, 0.01], "tokens": tokens, "ends": [0.5, 0.1]}
    return {"greedy": figures, "sampled": figures, "tasks": {"all": {"pass@1": [right, 0.1], "pass@2": [right, 0.1]}}}


@pytest.fixture
def damaged(results):
    """As a run leaves them: the dense model writes 100 tokens at 23.6 per second, the pruned one 200 at 31.2."""
    results = {key: results[key] for key in ("title", "environment", "models")}
    results["writing"] = {"dense": written([100.0, 10.0]), "pruned": written([200.0, 0.0], loops=0.47)}
    results["timing"] = {"doubts": [], "load_average": [0.1, 0.2], "mhz": None}
    return results


def test_a_request_takes_the_tokens_that_it_needs(damaged):
    """31.2 tokens per second instead of 23.6, but twice as many of them."""
    headings, rows = writing_table(damaged)
    assert headings == ["figure", "dense", "pruned"]
    (speed,) = [row for row in rows if row[0] == "request speed"]
    assert speed[1:] == ["1", f"{31.2 / 23.6 / 2:.3g} ± {0.1 * 31.2 / 23.6 / 2:.2g}"]
    (loops,) = [row for row in rows if row[0] == "greedy loops"]
    assert loops[1:] == ["0 ± 0.1", "0.47 ± 0.1"]


@pytest.mark.parametrize(
    ("dense", "other", "rate"),
    [
        ([100.0, 10.0], [100.0, 10.0], None),  # nobody measured it
        ([100.0, 10.0], [3.0, 5.0], 30.0),  # the interval of its length holds nothing
        ([0.0, 0.0], [100.0, 10.0], 30.0),
    ],
)
def test_what_is_not_known_is_no_number(dense, other, rate):
    assert request_speed(written(dense), written(other), 20.0, rate) is None
    assert with_error(None) == "–"
    assert with_error((2.0, math.nan)) == "2"


def test_the_page_shows_what_the_models_write(damaged, tmp_path):
    save_results(damaged, tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "What it does to their writing" in page
    assert "0.47\u00a0±\u00a00.1" in page
    assert "The speeds are reliable" in page


def test_the_page_says_when_its_speeds_cannot_be_trusted(damaged, tmp_path):
    damaged["timing"]["doubts"] = ["other programs kept 1.6 of 2 cores busy (load average 3.1): stop them"]
    damaged["models"][0]["decode_quartiles"] = [22.0, 24.0]
    save_results(damaged, tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert page.index("The speeds are not reliable") < page.index("Before and after")
    assert "other programs kept 1.6 of 2 cores busy" in page
    assert "23.6 (22.0\u2060–\u206024.0)" in page


def test_a_comparison_shows_it_beside_each_method(results, tmp_path):
    brief = {"loops": [0.47, 0.09], "tokens": [120.0, 9.0], "right": [0.1, 0.05], "request_speed": [0.9, 0.1]}
    results = {key: results[key] for key in ("title", "environment")} | {"comparison": results["comparison"][:1]}
    results["comparison"][0]["writing"] = brief | {"request_speed": None}
    results["dense_writing"] = brief | {"loops": [0.0, 0.0]}
    save_results(results, tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert '<th scope="col">end in a loop</th>' in page
    assert "0.47\u00a0±\u00a00.09" in page
    assert "dense model" in page
