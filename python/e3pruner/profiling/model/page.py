"""The page of a decoder's profile."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from e3kernels.profiling import MemoryTimeline
from e3pruner.profiling import plots
from e3pruner.profiling.ceilings import Ceilings
from e3pruner.profiling.doubts import PARTS as PARTS_APART
from e3pruner.profiling.doubts import above_ceiling, apart, mispredicted
from e3pruner.profiling.model.parts import PARTS
from e3pruner.profiling.model.profile import PHASES, DecoderProfile, middle
from e3pruner.profiling.page import NOT_KNOWN, Page, Section, Table, figures, percent, spread
from e3pruner.report.table import plural
from e3pruner.timing import unsettled

NOT_ALL = "not even all"
Sums = dict[str, dict[str, float]]  # by part


def decoder_page(profile: DecoderProfile, title: str, dtype: str, speedup: float) -> Page:
    """Everything that `profile` holds; `speedup` is the one that is asked for, `dtype` that of the weights."""
    ceilings = profile.ceilings
    sections = [_answer(profile, speedup)]
    sections += [_phase(profile, phase, ceilings) for phase in PHASES]
    if ceilings is not None:
        sections.append(_roofline(profile, ceilings, dtype))
    sections.append(memory_section(profile.memory, profile.peak))
    rows = _rows(profile, speedup) + (ceilings.rows() if ceilings is not None else [])
    return Page(title, _headline(profile, speedup), sections, rows, decoder_doubts(profile, dtype))


def _headline(profile: DecoderProfile, speedup: float) -> str:
    """The page in a sentence: how long a token takes, and how many layers are in the way of writing it faster."""
    sentences = []
    for engine, speed in profile.whole.items():
        needed = _needed(profile, engine, "decode", speedup)
        buy = {
            NOT_KNOWN: "what layers buy is not known",
            NOT_ALL: f"no number of layers makes it {speedup:g} times as fast",
        }
        gain = buy.get(needed, f"{needed} of the {profile.layers} layers less make it {speedup:g} times as fast")
        read, write = (
            f"takes {figures([1e3 * getattr(speed, phase)])[0]} ms"
            if profile.knows_whole(engine, phase)
            else "is not known"
            for phase in PHASES
        )
        sentences.append(f"{engine.capitalize()}: the prompt {read}, a token {write}; {gain}.")
    return " ".join(sentences)


def _needed(profile: DecoderProfile, engine: str, phase: str, speedup: float) -> str:
    """How many layers must go, as text."""
    if not profile.knows_layers(engine, phase):
        return NOT_KNOWN
    count = profile.layers_for(engine, phase, speedup)
    return NOT_ALL if count is None else str(count)


def decoder_doubts(profile: DecoderProfile, dtype: str) -> list[str]:
    """What of the profile is not reliable, and why."""
    found = []
    for engine in profile.whole:
        for phase in PHASES:
            name = f"{engine}, {phase}"
            if (estimate := profile.estimates.get((engine, phase))) is not None:
                found += unsettled({name: estimate})
            if engine == "eager" or profile.knows_layers(engine, phase):
                found += apart(
                    name, profile.sum_of_parts(engine, phase), getattr(profile.whole[engine], phase), PARTS_APART
                )
            else:
                found.append(f"{name}: what its layers take drowns in the scatter of the runs; no figure is made of it")
            for count, measured in profile.removed.items():
                if profile.knows_layers(engine, phase):
                    predicted = profile.predicted(engine, phase, middle(profile.layers, count))
                    said = f"{name}, {plural(count, 'layer')} less"
                    found += mispredicted(said, predicted, getattr(measured[engine], phase))
    if (ceilings := profile.ceilings) is not None:
        for phase in PHASES:
            found += _above_ceilings(profile, ceilings, phase, dtype)
    return found


def _above_ceilings(profile: DecoderProfile, ceilings: Ceilings, phase: str, dtype: str) -> list[str]:
    found = []
    limit = ceilings.estimates.get(f"matrix product {dtype}")
    for part, row in part_sums(profile, phase).items():
        time = profile.estimates.get(("eager", phase, part))
        if time is not None and limit is not None and row["seconds"]:
            found += above_ceiling(
                f"{part}, {phase}", time, limit, row["flops"] / row["seconds"] / ceilings.gemm[dtype]
            )
    return found


def _answer(profile: DecoderProfile, speedup: float) -> Section:
    """Predicted and measured speed without layers, and how many must go for `speedup`."""
    rows, needed, curves = [], [], {}
    marks: dict[str, dict[int, tuple[float, tuple[float, float]]]] = defaultdict(dict)
    for engine in profile.whole:
        for phase in PHASES:
            whole = getattr(profile.whole[engine], phase)
            known, name = profile.knows_layers(engine, phase), f"{engine}, {phase}"
            needed.append([name, _time(profile, engine, phase), _needed(profile, engine, phase, speedup)])
            if known:
                curves[name] = [
                    whole / profile.predicted(engine, phase, middle(profile.layers, n))
                    for n in range(profile.layers // 2 + 1)
                ]
            for removed, measured in profile.removed.items():
                seconds = getattr(measured[engine], phase)
                predicted = profile.predicted(engine, phase, middle(profile.layers, removed)) if known else None
                is_known = profile.knows_whole((removed, engine), phase)
                if is_known and profile.knows_whole(engine, phase):
                    marks[name][removed] = (whole / seconds, _speedups(profile, engine, phase, removed, whole))
                rows.append(
                    [
                        name,
                        str(removed),
                        NOT_KNOWN if predicted is None else figures([1e3 * predicted])[0],
                        _time(profile, (removed, engine), phase) or figures([1e3 * seconds])[0],
                        "–" if predicted is None or not is_known else _sign(predicted / seconds),
                    ]
                )
    tables = [
        Table(f"Layers to remove for {speedup:g} times the speed", ["", "ms now (quartiles)", "layers"], needed),
        Table(
            "Latency without layers from the middle of the stack",
            ["", "removed", "predicted ms", "measured ms (quartiles)", "predicted against measured"],
            rows,
        ),
    ]
    refusals = {"runtime": profile.runtime_refusal, "models without layers": profile.removal_refusal}
    note = (
        "Lines: predicted from the layers' own times. Marks: measured on models without them, with their quartiles. "
        "Not known: the interval of the figure holds nonsense, such as layers that take less than nothing."
    ) + "".join(f" Not measured: {what} ({why})." for what, why in refusals.items() if why is not None)
    return Section(
        "What removing layers would buy", note, tables, {"removal": partial(plots.removal_curve, curves, marks)}
    )


def _time(profile: DecoderProfile, engine: Any, phase: str) -> str:
    """Milliseconds with their quartiles, as far as these are there."""
    if (estimate := profile.estimates.get((engine, phase))) is not None:
        return spread(estimate)
    return "" if isinstance(engine, tuple) else figures([1e3 * getattr(profile.whole[engine], phase)])[0]


def _speedups(profile: DecoderProfile, engine: str, phase: str, removed: int, whole: float) -> tuple[float, float]:
    """The quartiles of how many times as fast."""
    estimate = profile.estimates.get(((removed, engine), phase))
    seconds = getattr(profile.removed[removed][engine], phase)
    low, high = (seconds, seconds) if estimate is None else (estimate.low, estimate.high)
    return whole / high, whole / low


def _phase(profile: DecoderProfile, phase: str, ceilings: Ceilings | None) -> Section:
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
    rows = [_part_row(part, row, profile, phase) for part, row in sums.items()]
    total = {key: sum(row[key] for row in sums.values()) for key in ("seconds", "python", "flops", "bytes")}
    rows.append(_part_row("sum of the parts", total, profile, phase))
    tables = [
        Table(
            f"Eager: {figures([1e3 * getattr(whole, phase)])[0]} ms {unit}",
            [
                "part",
                "ms (quartiles)",
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
        lines = [_ablated_row(profile, phase, part, whole_runtime) for part in ("attention", "ffn", "rest")]
        heading = f"Runtime: {figures([1e3 * whole_runtime])[0]} ms {unit}, parts by leaving them out"
        tables.append(Table(heading, ["part", "ms (quartiles)", "of the whole"], lines))
    note = "Each layer's parts by the clock around their calls. Outside operators: Python, module calls and views."
    if ceilings is not None:
        note += f" The ceilings here are {ceilings.read / 1e9:.1f} GB/s read, {ceilings.copy / 1e9:.1f} GB/s copied."
    name = {"prefill": "Reading the prompt", "decode": "Writing a token"}[phase]
    spreads = [profile.estimates.get(("eager", phase, layer)) for layer in range(profile.layers)]
    return Section(name, note, tables, {f"layers-{phase}": partial(plots.layer_bars, bars, python, spreads, unit)})


def _ablated_row(profile: DecoderProfile, phase: str, part: str, whole: float) -> list[str]:
    seconds, estimate = profile.runtime[phase, part], profile.estimates.get(("runtime", phase, part))
    if not profile.knows_part(phase, part):
        return [part, NOT_KNOWN, "–"]
    return [part, figures([1e3 * seconds])[0] if estimate is None else spread(estimate), percent(seconds / whole)]


def _part_row(part: str, row: dict[str, float], profile: DecoderProfile, phase: str) -> list[str]:
    seconds, whole = row["seconds"], getattr(profile.whole["eager"], phase)
    weights = sum(profile.weights.values()) if part == "sum of the parts" else profile.weights.get(part, 0)
    rates = [row["flops"] / seconds / 1e9, row["bytes"] / seconds / 1e9] if seconds else [None, None]
    estimate = profile.estimates.get(("eager", phase, part))
    return [
        part,
        figures([1e3 * seconds])[0] if estimate is None else spread(estimate._replace(value=seconds)),
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
            if (phase, p) in profile.runtime and profile.knows_part(phase, p)
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
    for phase in PHASES:
        for part, row in part_sums(profile, phase).items():
            common = {"engine": "eager", "phase": phase, "part": part}
            rows.append({"kind": "parts", **common, **row, **_quartiles(profile, "eager", phase, part)})
    for (phase, part), seconds in profile.runtime.items():
        common, known = {"engine": "runtime", "phase": phase, "part": part}, profile.knows_part(phase, part)
        known_seconds = {"seconds": seconds if known else None}
        rows.append({"kind": "parts", **common, **known_seconds, **_quartiles(profile, "runtime", phase, part)})
    for engine in profile.whole:
        for phase in PHASES:
            whole = getattr(profile.whole[engine], phase)
            common = {"engine": engine, "phase": phase}
            parts = profile.sum_of_parts(engine, phase)
            known = profile.knows_layers(engine, phase)
            needed = profile.layers_for(engine, phase, speedup) if known else None
            rows.append(
                {"kind": "whole", **common, "seconds": whole, "sum_of_parts": parts, "ratio": parts / whole}
                | _quartiles(profile, engine, phase)
            )
            rows.append({"kind": "speedup", **common, "times": speedup, "layers": needed, "known": known})
            for count, measured in profile.removed.items():
                predicted = profile.predicted(engine, phase, middle(profile.layers, count)) if known else None
                seconds = getattr(measured[engine], phase)
                ratio = None if predicted is None else predicted / seconds
                found = {"removed": count, "predicted": predicted, "measured": seconds, "ratio": ratio}
                rows.append({"kind": "removal", **common, **found, **_quartiles(profile, (count, engine), phase)})
    rows.append(memory_row(profile.memory, profile.peak))
    return rows


def _quartiles(profile: DecoderProfile, *key: Any) -> dict[str, Any]:
    estimate = profile.estimates.get(key)
    return {} if estimate is None else {"quartiles": [estimate.low, estimate.high], "rounds": estimate.rounds}


def memory_row(memory: MemoryTimeline, growth: int | None) -> dict[str, Any]:
    """Peak bytes by category, their sum, and the process's own: what was held before and its growth."""
    peak = memory.peak()
    process = None if growth is None else growth + sum(memory.before.values())
    ratio = None if process is None else sum(peak.values()) / process
    return {"kind": "memory", "categories": peak, "sum": sum(peak.values()), "process": process, "ratio": ratio}
