"""A profile against an earlier one."""

import json

import pytest
from profiling.test_decoder_profile import synthetic
from profiling.test_doubts import to_be_shown

from e3pruner.profiling.changes import Change, compared, read_profile, times_of
from e3pruner.profiling.model.engines import Speed
from e3pruner.profiling.model.page import decoder_page
from e3pruner.profiling.page import write_page
from e3pruner.report import describe_environment
from e3pruner.timing import Estimate


def profile(token, scatter=0.01):
    """A decoder whose token takes so many seconds, in nine rounds."""
    made = to_be_shown(synthetic())
    made.whole["eager"] = Speed(22.0, token)
    made.estimates = {
        ("eager", "prefill"): Estimate(22.0, 21.9, 22.1, 9),
        ("eager", "decode"): Estimate(token, token * (1 - scatter), token * (1 + scatter), 9),
    }
    return decoder_page(made, "tiny", "float32", 1.3)


@pytest.fixture
def earlier(tmp_path):
    write_page(profile(22.0), tmp_path / "old", describe_environment(), "e3 profile model tiny")
    return tmp_path / "old"


@pytest.mark.parametrize(("token", "scatter", "changed"), [(18.0, 0.01, True), (22.1, 0.01, False), (18.0, 0.4, False)])
def test_what_changed_beyond_its_spread_is_said(earlier, tmp_path, token, scatter, changed):
    page = compared(profile(token, scatter), read_profile(earlier, "whole"))
    (found,) = [row for row in page.rows if row["kind"] == "change" and row["name"] == "eager, decode"]
    assert found == {"kind": "change", "name": "eager, decode", "before": 22, "now": token, "beyond_spread": changed}
    text = write_page(page, tmp_path / "new", describe_environment(), "e3 profile model tiny").read_text()
    assert f"{int(changed)} of 2 times changed beyond their spread" in text
    assert ("-18.2 %" in page.summary) == changed
    assert page.sections[0].title == "Since the earlier profile"


def test_once_measured_tells_no_change():
    assert not Change("a", Estimate(1.0, 1.0, 1.0, 1), Estimate(5.0, 5.0, 5.0, 9)).beyond_spread


def test_a_profile_of_something_else_and_a_doubtful_one_are_said(earlier):
    rows = read_profile(earlier, "whole")
    rows[0] |= {"title": "another model"}
    doubts = compared(profile(22.0), rows).doubts
    assert "the earlier profile is of something else: another model" in doubts
    assert any(doubt.startswith("the earlier profile says of itself that it is not reliable") for doubt in doubts)


def test_what_is_no_such_profile_is_refused_before_anything_is_measured(earlier, tmp_path):
    with pytest.raises(ValueError, match="is no profile with rows of the kind 'operation'"):
        read_profile(earlier, "operation")
    with pytest.raises(FileNotFoundError):
        read_profile(tmp_path / "nowhere", "whole")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"kind": "run"}) + "\n[]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: no row of a profile"):
        read_profile(tmp_path / "bad.jsonl", "whole")


def test_every_kind_of_time_has_a_name_of_its_own():
    quartiles = {"seconds": 1.0, "quartiles": [1.0, 1.0], "rounds": 5}
    rows = [
        {"kind": "step", "step": "search", "losses": "fused", **quartiles},
        {"kind": "operation", "operation": "topk_kl", "provider": "native", "dtype": "float32", **quartiles},
        {"kind": "removal", "engine": "runtime", "phase": "decode", "removed": 4, "measured": 2.0, **quartiles},
        {"kind": "ceilings", "estimates": {"read": [1.0, 1.0, 1.0, 5]}},
        {"kind": "parts", "engine": "eager", "phase": "decode", "part": "ffn", **quartiles},
        {"kind": "whole", "engine": "eager", "phase": "decode", **quartiles},
    ]
    assert list(times_of(rows)) == [
        "search step, fused losses",
        "topk_kl, float32, native",
        "runtime, 4 layers less, decode",
        "ceiling: read",
        "eager, decode, ffn",
        "eager, decode",
    ]


def test_a_time_that_is_not_known_has_not_changed():
    """It used to be called changed by −99.9 %, beside "not known"."""
    change = Change("a", Estimate(1139.0, 1100.0, 1200.0, 9), Estimate(1.0, 0.1, 4.0, 5))
    assert not change.beyond_spread
    assert change.cells()[2:] == ["not known", "–"]
