"""The page of the steps' profiles."""

from __future__ import annotations

from functools import partial
from typing import Any

from e3pruner.profiling import plots
from e3pruner.profiling.doubts import PHASES, apart
from e3pruner.profiling.model.page import memory_row, memory_section
from e3pruner.profiling.page import Page, Section, Table, figures, percent, spread
from e3pruner.profiling.step.profile import StepProfile, StepProfiles
from e3pruner.timing import unsettled


def step_page(profiles: StepProfiles, title: str) -> Page:
    """One section a kind of step, its profiles with fused and eager losses side by side, then its memory."""
    sections = []
    for kind in dict.fromkeys(p.kind for p in profiles.steps):
        sections += _sections(kind, [p for p in profiles.steps if p.kind == kind])
    summary = _headline(profiles.steps)
    if profiles.recovery_refusal is not None:
        summary += f" Not measured: the recovery ({profiles.recovery_refusal})."
    doubts = [doubt for p in profiles.steps for doubt in _doubts(p)]
    return Page(title, summary, sections, [row for p in profiles.steps for row in _rows(p)], doubts)


def _headline(steps: list[StepProfile]) -> str:
    """How long each kind of step takes with either kind of losses."""
    sentences = []
    for kind in dict.fromkeys(p.kind for p in steps):
        times = " and ".join(f"{figures([p.seconds])[0]} s with {p.losses} losses" for p in steps if p.kind == kind)
        sentences.append(f"A {kind} step takes {times}.")
    return " ".join(sentences)


def _doubts(profile: StepProfile) -> list[str]:
    name = f"the {profile.kind} step with {profile.losses} losses"
    return unsettled({name: profile.estimate}) + apart(name, profile.covered, 1.0, PHASES)


def _sections(kind: str, profiles: list[StepProfile]) -> list[Section]:
    names = list(dict.fromkeys(name for p in profiles for name in p.phases))
    rows = []
    for name in names:
        row = [name]
        for p in profiles:
            row += [*figures([1e3 * p.phases.get(name, 0.0)]), percent(p.phases.get(name, 0.0) / p.seconds)]
        rows.append(row)
    for label, values in _summary(profiles).items():
        rows.append([label, *(cell for value in values for cell in (value, ""))])
    headings = ["phase", *(cell for p in profiles for cell in (f"{p.losses} losses, ms", "of the step"))]
    table = Table(f"A {kind} step", headings, rows)
    bars = {f"{p.losses} losses": p.phases for p in profiles}
    note = (
        "By the clock around each phase. The fused loss computes its gradient in the same pass, so that part of what "
        "eager losses leave to the backward pass is in its loss."
    )
    spreads = {f"{p.losses} losses": p.estimate for p in profiles}
    time = Section(f"The {kind} step", note, [table], {f"phases-{kind}": partial(plots.phase_bars, bars, spreads)})
    held = [_memory(kind, p) for p in profiles]
    return [time, *held]


def _memory(kind: str, profile: StepProfile) -> Section:
    section = memory_section(profile.memory, profile.growth)
    drawn = {f"memory-{kind}-{profile.losses}": plot for plot in section.plots.values()}
    return section._replace(title=f"Memory of the {kind} step, {profile.losses} losses", plots=drawn)


def _summary(profiles: list[StepProfile]) -> dict[str, list[str]]:
    return {
        "sum of the phases": [*figures([1e3 * p.seconds * p.covered for p in profiles])],
        "the step (quartiles)": [spread(p.estimate) for p in profiles],
        "tokens/s": [*figures([p.tokens / p.seconds for p in profiles])],
        "peak MiB": [*figures([sum(p.memory.peak().values()) / 2**20 for p in profiles])],
    }


def _rows(profile: StepProfile) -> list[dict[str, Any]]:
    common = {"step": profile.kind, "losses": profile.losses}
    rows = [{"kind": "phase", **common, "phase": name, "seconds": s} for name, s in profile.phases.items()]
    rate = profile.tokens / profile.seconds
    whole = {
        "kind": "step",
        **common,
        "seconds": profile.seconds,
        "quartiles": [profile.estimate.low, profile.estimate.high],
        "rounds": profile.estimate.rounds,
        "sum_of_parts": profile.covered,
        "tokens_per_s": rate,
    }
    return [*rows, whole, memory_row(profile.memory, profile.growth) | common]
