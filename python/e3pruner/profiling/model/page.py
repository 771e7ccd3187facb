"""The page of a decoder's profile."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from e3kernels.profiling import MemoryTimeline
from e3pruner.profiling import plots
from e3pruner.profiling.ceilings import Ceilings
from e3pruner.profiling.model.parts import PARTS
from e3pruner.profiling.model.profile import PHASES, DecoderProfile, middle
from e3pruner.profiling.page import Page, Section, Table, figures, percent

Sums = dict[str, dict[str, float]]  # by part


def decoder_page(profile: DecoderProfile, title: str, ceilings: Ceilings, dtype: str, speedup: float) -> Page:
    """Everything that `profile` holds; `speedup` is the one that is asked for, `dtype` that of the weights."""
    sections = [_answer(profile, speedup)]
    sections += [_phase(profile, phase, ceilings) for phase in PHASES]
    sections += [_roofline(profile, ceilings, dtype), memory_section(profile.memory, profile.peak)]
    summary = "Where the time of reading a prompt and of writing a token goes, and what removing layers would buy."
    return Page(title, summary, sections, _rows(profile, speedup) + ceilings.rows())


def _answer(profile: DecoderProfile, speedup: float) -> Section:
    """Predicted and measured speed without layers, and how many must go for `speedup`."""
    rows, needed, curves = [], [], {}
    marks: dict[str, dict[int, float]] = defaultdict(dict)
    for engine in profile.whole:
        for phase in PHASES:
            whole = getattr(profile.whole[engine], phase)
            count = profile.layers_for(engine, phase, speedup)
            needed.append(
                [f"{engine}, {phase}", *figures([1e3 * whole]), "not even all" if count is None else str(count)]
            )
            name = f"{engine}, {phase}"
            curves[name] = [
                whole / profile.predicted(engine, phase, middle(profile.layers, n))
                for n in range(profile.layers // 2 + 1)
            ]
            for removed, measured in profile.removed.items():
                seconds = getattr(measured[engine], phase)
                predicted = profile.predicted(engine, phase, middle(profile.layers, removed))
                marks[name][removed] = whole / seconds
                rows.append(
                    [name, str(removed), *figures([1e3 * predicted, 1e3 * seconds]), _sign(predicted / seconds)]
                )
    tables = [
        Table(f"Layers to remove for {speedup:g} times the speed", ["", "ms now", "layers"], needed),
        Table(
            "Latency without layers from the middle of the stack",
            ["", "removed", "predicted ms", "measured ms", "predicted against measured"],
            rows,
        ),
    ]
    refusals = {"runtime": profile.runtime_refusal, "models without layers": profile.removal_refusal}
    note = "Lines: predicted from the layers' own times. Marks: measured on models without them." + "".join(
        f" Not measured: {what} ({why})." for what, why in refusals.items() if why is not None
    )
    return Section(
        "What removing layers would buy", note, tables, {"removal": partial(plots.removal_curve, curves, marks)}
    )


def _phase(profile: DecoderProfile, phase: str, ceilings: Ceilings) -> Section:
    unit = "to read the prompt" if phase == "prefill" else "a token"
    bars: dict[str, list[float]] = {}
    python = [0.0] * profile.layers
    for part in PARTS:
        of_layers = [profile.parts.get((phase, layer, part), {}) for layer in range(profile.layers)]
        if any(of_layers):
            bars[part] = [row.get("seconds", 0.0) for row in of_layers]
            python = [p + row.get("python", 0.0) for p, row in zip(python, of_layers, strict=True)]
    sums = part_sums(profile, phase)
    whole = profile.whole["eager"]
    rows = [_part_row(part, row, profile, getattr(whole, phase)) for part, row in sums.items()]
    total = {key: sum(row[key] for row in sums.values()) for key in ("seconds", "python", "flops", "bytes")}
    rows.append(_part_row("sum of the parts", total, profile, getattr(whole, phase)))
    tables = [
        Table(
            f"Eager: {1e3 * getattr(whole, phase):.2f} ms {unit}",
            [
                "part",
                "ms",
                "of the whole",
                "outside operators ms",
                "GFLOP",
                "MB moved",
                "GFLOP/s",
                "GB/s",
                "weights MiB",
            ],
            rows,
        )
    ]
    if profile.runtime:
        whole_runtime = getattr(profile.whole["runtime"], phase)
        parts = {part: profile.runtime[phase, part] for part in ("attention", "ffn", "rest")}
        parts["sum of the parts"] = sum(parts.values())
        lines = [[name, *figures([1e3 * s]), percent(s / whole_runtime)] for name, s in parts.items()]
        heading = f"Runtime: {1e3 * whole_runtime:.2f} ms {unit}, parts by leaving them out"
        tables.append(Table(heading, ["part", "ms", "of the whole"], lines))
    note = (
        "Each layer's parts by the clock around their calls. Outside operators: Python, module calls and views. "
        f"The ceilings here are {ceilings.read / 1e9:.1f} GB/s read, {ceilings.copy / 1e9:.1f} GB/s copied."
    )
    name = {"prefill": "Reading the prompt", "decode": "Writing a token"}[phase]
    return Section(name, note, tables, {f"layers-{phase}": partial(plots.layer_bars, bars, python, unit)})


def _part_row(part: str, row: dict[str, float], profile: DecoderProfile, whole: float) -> list[str]:
    seconds = row["seconds"]
    weights = sum(profile.weights.values()) if part == "sum of the parts" else profile.weights.get(part, 0)
    rates = [row["flops"] / seconds / 1e9, row["bytes"] / seconds / 1e9] if seconds else [None, None]
    return [
        part,
        *figures([1e3 * seconds]),
        percent(seconds / whole),
        *figures([1e3 * row["python"], row["flops"] / 1e9, row["bytes"] / 1e6, *rates, weights / 2**20]),
    ]


def part_sums(profile: DecoderProfile, phase: str) -> Sums:
    """Seconds, Python, FLOPs and bytes of each part in all layers and outside them together."""
    sums: Sums = {}
    for part in PARTS:
        rows = [
            row for (its_phase, _, its_part), row in profile.parts.items() if (its_phase, its_part) == (phase, part)
        ]
        if rows:
            sums[part] = {key: sum(row[key] for row in rows) for key in rows[0]}
    return sums


def _roofline(profile: DecoderProfile, ceilings: Ceilings, dtype: str) -> Section:
    points = []
    for phase in PHASES:
        sums = part_sums(profile, phase)
        work = {part: sums[part] for part in ("attention", "ffn", "head") if part in sums}
        points += [plots.Point(p, f"eager, {phase}", r["flops"], r["bytes"], r["seconds"]) for p, r in work.items()]
        points += [
            plots.Point(p, f"runtime, {phase}", r["flops"], r["bytes"], profile.runtime[phase, p])
            for p, r in work.items()
            if (phase, p) in profile.runtime
        ]
    note = (
        "What each part achieves against what the machine can do: left of the bend memory limits, right of it the "
        "multipliers. FLOPs and bytes are those of the eager operators, for the runtime too."
    )
    return Section(
        "Against the machine's limits", note, [], {"roofline": partial(plots.roofline, points, ceilings, dtype)}
    )


def memory_section(memory: MemoryTimeline, growth: int | None) -> Section:
    """The memory timeline, and its peak by category beside what the process itself grew by."""
    peak = memory.peak()
    rows = [[name, *figures([size / 2**20])] for name, size in peak.items()]
    rows.append(["sum of the categories", *figures([sum(peak.values()) / 2**20])])
    if growth is not None:
        rows.append(
            ["process: held before, and its growth", *figures([(growth + sum(memory.before.values())) / 2**20])]
        )
    shown = {"memory": partial(plots.memory_timeline, memory)} if memory.points else {}
    note = "Every allocation of the traced run, by the range it was made in, at the moment at which most was held."
    return Section("Memory", note, [Table("Peak", ["category", "MiB"], rows)], shown)


def _sign(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _rows(profile: DecoderProfile, speedup: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (phase, layer, part), row in profile.parts.items():
        rows.append({"kind": "part", "engine": "eager", "phase": phase, "layer": layer, "part": part, **row})
    for (phase, part), seconds in profile.runtime.items():
        rows.append(
            {"kind": "part", "engine": "runtime", "phase": phase, "layer": None, "part": part, "seconds": seconds}
        )
    for engine in profile.whole:
        for phase in PHASES:
            whole = getattr(profile.whole[engine], phase)
            common = {"engine": engine, "phase": phase}
            parts = profile.sum_of_parts(engine, phase)
            needed = profile.layers_for(engine, phase, speedup)
            rows.append({"kind": "whole", **common, "seconds": whole, "sum_of_parts": parts, "ratio": parts / whole})
            rows.append({"kind": "speedup", **common, "times": speedup, "layers": needed})
            for count, measured in profile.removed.items():
                predicted = profile.predicted(engine, phase, middle(profile.layers, count))
                seconds = getattr(measured[engine], phase)
                found = {"removed": count, "predicted": predicted, "measured": seconds, "ratio": predicted / seconds}
                rows.append({"kind": "removal", **common, **found})
    rows.append(memory_row(profile.memory, profile.peak))
    return rows


def memory_row(memory: MemoryTimeline, growth: int | None) -> dict[str, Any]:
    """Peak bytes by category, their sum, and the process's own: what was held before and its growth."""
    peak = memory.peak()
    process = None if growth is None else growth + sum(memory.before.values())
    ratio = None if process is None else sum(peak.values()) / process
    return {"kind": "memory", "categories": peak, "sum": sum(peak.values()), "process": process, "ratio": ratio}
