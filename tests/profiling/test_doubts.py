"""What a profile says of itself, on recorded seconds of a calm machine and of a busy one."""

import math

import pytest
from profiling.test_decoder_profile import synthetic

from e3kernels.profiling import MemoryTimeline
from e3pruner.profiling.doubts import above_ceiling, apart, mispredicted
from e3pruner.profiling.model.engines import Speed
from e3pruner.profiling.model.page import decoder_doubts, decoder_page
from e3pruner.profiling.model.profile import _ablated
from e3pruner.profiling.page import doubts_of, verdict, write_page
from e3pruner.profiling.step.profile import _Step, _typical
from e3pruner.report import describe_environment
from e3pruner.timing import Conditions, Estimate, unsettled

CALM, BUSY = Estimate(1.0, 0.995, 1.005, 9), Estimate(1.0, 0.9, 1.7, 5)


def runs(attention, ffn, rest, noise):
    """Rounds of the runtime with all, and half of its six layers, each round's runs disturbed by `noise`."""
    makes = {"runtime": (1, 1), "half the attention": (0.5, 1), "half the ffn": (1, 0.5), "half the layers": (0.5, 0.5)}
    return {
        name: [Speed(seconds := a * attention + f * ffn + rest + extra, seconds) for extra in noise[name]]
        for name, (a, f) in makes.items()
    }


def with_runtime(noise):
    profile, names = synthetic(), ("runtime", "half the attention", "half the ffn", "half the layers")
    ablated = _ablated(runs(4.0, 5.0, 1.0, {name: noise(number) for number, name in enumerate(names)}), profile.layers)
    profile.whole["runtime"] = Speed(10.0, 10.0)
    profile.runtime = {key: estimate.value for key, estimate in ablated.items() if key[1] != "layers"}
    profile.estimates = {("runtime", *key): estimate for key, estimate in ablated.items()}
    return profile


def to_be_shown(profile):
    """With all that a page wants of a profile."""
    profile.memory = MemoryTimeline([], {})
    for row in profile.parts.values():
        row |= {"python": 0.0, "flops": 1, "bytes": 1}
    return profile


def test_parts_by_leaving_out_are_known_on_a_calm_machine():
    profile = with_runtime(lambda number: [0.01, 0.0, 0.02, 0.01, 0.0])
    assert profile.knows_layers("runtime", "decode")
    assert profile.runtime["decode", "attention"] == pytest.approx(4.0)
    assert profile.runtime["decode", "rest"] == pytest.approx(1.0, abs=0.05)
    assert profile.layers_for("runtime", "decode", 1.3) == 2  # of 1.5 seconds each, 2.3 less


def test_parts_that_drown_in_the_scatter_are_no_numbers(tmp_path):
    """It used to print a rest of −110.7 % and 29 layers for 1.3 times the speed."""
    profile = with_runtime(lambda number: [9.0 * (number * (turn + 2) % 4) for turn in range(5)])
    assert not profile.knows_layers("runtime", "decode")
    page = decoder_page(to_be_shown(profile), "busy", "float32", 1.3)
    assert any("drowns in the scatter" in doubt for doubt in page.doubts)
    (needed,) = [row for row in page.sections[0].tables[0].rows if row[0] == "runtime, decode"]
    assert needed[2] == "not known"
    (found,) = [r for r in page.rows if r["kind"] == "speedup" and (r["engine"], r["phase"]) == ("runtime", "decode")]
    assert found["layers"] is None
    assert "what layers buy is not known" in page.summary


def test_parts_that_do_not_add_up_are_said():
    profile = synthetic()  # 12 of 22 seconds in its layers, and the rest in no part
    assert "eager, decode: the parts add up to 55 % of the whole" in decoder_doubts(profile, "float32")
    assert not profile.knows_layers("eager", "decode")


@pytest.mark.parametrize(
    ("doubts", "said"),
    [
        (unsettled({"a token": CALM}), []),
        (unsettled({"a token": BUSY}), ["a token is known to ±56 % only, after 5 rounds: raise --limit"]),
        (apart("a step", 0.96, 1.0, 0.05), []),
        (apart("a step", 1.07, 1.0, 0.05), ["a step: the parts add up to 107 % of the whole"]),
        (mispredicted("8 layers less", 1.09, 1.0), []),
        (mispredicted("8 layers less", 0.8, 1.0), ["8 layers less: predicted -20 % from what was measured"]),
        (above_ceiling("ffn", CALM, CALM, 1.015), []),
        (above_ceiling("ffn", CALM, CALM, 1.4), ["ffn is at 140 % of its ceiling, which is none then"]),
        (above_ceiling("ffn", BUSY, CALM, 1.4), []),  # its own scatter explains it, and is doubted itself
    ],
)
def test_each_doubt(doubts, said):
    assert doubts == said


def test_the_phases_are_those_of_the_rounds_that_the_step_is_of():
    """Medians of each phase by itself added up to more than the step."""
    rounds = [_Step(10, {"a": 9, "b": 1}), _Step(10, {"a": 1, "b": 9}), _Step(30, {"a": 9, "b": 21})]
    seconds, phases, estimate = _typical(rounds)
    assert seconds == sum(phases.values()) == 10
    assert estimate.high > 10


def test_the_page_opens_with_what_is_not_reliable(tmp_path):
    page = decoder_page(to_be_shown(synthetic()), "tiny", "float32", 1.3)
    conditions = Conditions(others=1.4, cores=2, load=(2.9, 3.1))
    text = write_page(page, tmp_path, describe_environment(), "e3 profile model tiny", conditions).read_text()
    assert text.index("<h3>Not reliable</h3>") < text.index(page.summary[:20]) < text.index("What removing layers")
    assert "other programs kept 1.4 of 2 cores busy (load average 3.1)" in text
    assert "cores of others" in text
    assert verdict(doubts_of(page, conditions)).startswith("Not reliable: ")
    assert verdict([]) == "Reliable."
    assert math.isinf(Estimate.of_times([1.0]).margin)


def test_a_part_is_shown_with_the_seconds_that_its_share_is_of(tmp_path):
    """A busy machine's table had a part of 4 ms that was 2.3 % of 1,139, and a sum that was not that of its rows."""
    profile = to_be_shown(synthetic())
    seconds = sum(row["seconds"] for key, row in profile.parts.items() if (key[0], key[2]) == ("decode", "ffn"))
    profile.estimates["eager", "decode", "ffn"] = Estimate(0.4 * seconds, 0.3 * seconds, 1.1 * seconds, 5)
    page = decoder_page(profile, "tiny", "float32", 1.3)
    table = next(section for section in page.sections if section.title == "Writing a token").tables[0]
    (row,) = [row for row in table.rows if row[0] == "ffn"]
    assert row[1].startswith(f"{1e3 * seconds:,.0f} (")
    assert row[2] == f"{100 * seconds / 22:.1f} %"


def test_the_first_sentence_names_no_time_that_is_not_known():
    profile = to_be_shown(synthetic())
    profile.parts["decode", None, "rest"] = dict.fromkeys(("seconds", "python", "flops", "bytes"), 10.0)
    assert profile.knows_layers("eager", "decode")
    profile.estimates["eager", "decode"] = Estimate(22.0, 10.0, 90.0, 5)
    page = decoder_page(profile, "tiny", "float32", 1.3)
    assert "a token is not known; what layers buy is not known." in page.summary
