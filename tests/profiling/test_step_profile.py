"""The profile of a search step and of a recovery step."""

import importlib
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_models import EXTRA_CONFIGS, TINY_CONFIGS, tiny_model, tiny_tokens

from e3kernels.profiling import RangeRecorder, named_range
from e3pruner import distill, prune
from e3pruner.profiling.page import write_page
from e3pruner.profiling.step.page import step_page
from e3pruner.profiling.step.profile import STEP, _measured, _Run, _started, profile_steps
from e3pruner.report import describe_environment

SEARCH = {"teacher forward", "student forward", "loss", "optimizer"}
RECOVERY = {"data", "teacher forward", "student forward", "loss", "backward", "clip", "optimizer"}


def check_profiles(profiles, recovery=True):
    assert (profiles.recovery_refusal is None) == recovery
    kinds = ("search", "recovery") if recovery else ("search",)
    assert [(p.kind, p.losses) for p in profiles.steps] == [(k, losses) for losses in ("fused", "eager") for k in kinds]
    for profile in profiles.steps:
        assert set(profile.phases) == (SEARCH if profile.kind == "search" else RECOVERY)
        assert 0 < sum(profile.phases.values()) <= 1.0001 * profile.seconds
        peak = profile.memory.peak()
        assert peak["weights"] > 0
        # A search learns the spreads of its model of masks: a dozen numbers.
        assert "gradients" in peak if profile.kind == "recovery" else peak.get("gradients", 0) < 1_000


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    return profile_steps(tiny_model("llama"), tiny_tokens(8, 12), drop=2, batch=2, rounds=1, folder=folder), folder


def test_steps_have_their_phases(profiled):
    check_profiles(profiled[0])


def test_a_step_is_that_of_a_search_with_the_same_target():
    """No mask lacks a protected layer, and the student keeps it."""
    model, cut = tiny_model("llama"), []
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("e3pruner.profiling.step.profile")
        patch.setattr(module, "prune", lambda model, kept, **rest: cut.append(kept) or prune(model, kept, **rest))
        profile_steps(model, tiny_tokens(8, 12), fraction=0.5, protect=[2, 3], batch=2, rounds=1)
    assert {tuple(kept) for kept in cut} == {(2, 3, 5)}


# transformers 5.23 cannot run a gemma4_text that shares keys and values without per-layer inputs.
@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in (*TINY_CONFIGS, *EXTRA_CONFIGS) if name != "gemma4_text"])
def test_steps_of_every_model_type_have_their_phases(model_type):
    profiles = profile_steps(tiny_model(model_type), tiny_tokens(8, 12), drop=2, batch=2, rounds=1)
    check_profiles(profiles, recovery=model_type != "jamba")  # which of its layers attend follows from their index
    if model_type == "jamba":
        assert "Not measured: the recovery (" in step_page(profiles, "jamba").summary


def test_fused_and_eager_steps_take_turns():
    """In blocks, a machine that slowed down in between made one of them look slower."""
    seen = []

    def step(losses):
        with named_range(STEP), named_range("loss"):
            seen.append(losses)

    model = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(model=model, rounds=3, most=9, limit=0.0)
    rounds = _measured(run, {losses: partial(step, losses) for losses in ("fused", "eager")})
    assert all(set(seen[start : start + 2]) == {"fused", "eager"} for start in range(0, 8, 2))
    for steps in rounds.values():
        assert len(steps) == 3
        assert all(set(each.phases) == {"loss"} and each.phases["loss"] <= each.seconds for each in steps)


def test_the_search_lasts_as_long_as_it_is_profiled():
    """It ended when its mask was found: `e3 profile step` with more rounds than that broke off after minutes."""
    run = _Run(tiny_model("llama"), tiny_tokens(15, 12), [0, 1, 2, 3], [], 1, 3, 0.0, 0, None)
    with _started(run, "fused", {}) as (_, search):
        assert all("noise_scale" in next(search) for _ in range(run.most + 3))


def test_the_page_leads_with_a_sentence_and_its_figure(profiled):
    page = step_page(profiled[0], "tiny")
    assert re.match(r"A search step takes [\d.]+ s with fused losses and [\d.]+ s with eager losses\.", page.summary)


def test_eager_losses_are_the_same_losses():
    """The figures beside the fused losses are worth nothing if they are another objective's."""
    from e3pruner.profiling.step.profile import _EagerTeacher

    teacher, data = tiny_model("llama"), tiny_tokens(8, 12)
    curves = []
    for source in (teacher, _EagerTeacher(teacher)):
        student = prune(teacher, [0, 1, 3, 5])
        curves.append(distill(student, teacher=source, data=data, steps=3, batch_size=2, precision="fp32").curve)
    for fused, eager in zip(*curves, strict=True):
        assert eager["loss"] == pytest.approx(fused["loss"], rel=1e-5)
        assert eager["grad_norm"] == pytest.approx(fused["grad_norm"], rel=1e-4)


def test_ranges_leave_training_as_it_is():
    teacher, data = tiny_model("llama"), tiny_tokens(8, 12)
    curves = []
    for recorded in (False, True):
        student = prune(teacher, [0, 1, 3, 5])
        if recorded:
            with RangeRecorder():
                curves.append(distill(student, teacher=teacher, data=data, steps=2).curve)
        else:
            curves.append(distill(student, teacher=teacher, data=data, steps=2).curve)
    assert curves[0] == curves[1]


def test_the_page_and_its_traces(profiled, tmp_path):
    profiles, folder = profiled
    text = write_page(step_page(profiles, "tiny"), tmp_path, describe_environment(), "e3 profile step").read_text()
    assert text.count("<svg") == 6
    assert (folder / "search" / "trace.json").exists()
    assert (folder / "recovery" / "trace.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"), [({"drop": 6}, "drop=6 must be from 1 to 5"), ({"rounds": 9}, "sequences has 8; 12 steps")]
)
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        profile_steps(tiny_model("llama"), tiny_tokens(8, 12), **({"drop": 2, "batch": 1, "rounds": 1} | wrong))
