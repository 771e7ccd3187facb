"""Where a decoder's time goes, by layer and part, and what removing layers would buy."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import e3kernels
from e3kernels.profiling import MemoryTimeline, Profile, RangeRecorder, Timeline
from e3pruner.models import find_layers, output_head
from e3pruner.models.stack import evaluating, returning_dicts
from e3pruner.profiling.ceilings import Ceilings, Probe, ceilings_of, synchronizer
from e3pruner.profiling.ceilings import Key as ProbeKey
from e3pruner.profiling.doubts import PARTS
from e3pruner.profiling.fit import check_decoding_fits
from e3pruner.profiling.model.engines import (
    Eager,
    Engine,
    Runtime,
    Speed,
    run,
    speed_of,
)
from e3pruner.profiling.model.parts import part_of, parts_of, ranged_parts
from e3pruner.profiling.operators import operator_seconds
from e3pruner.profiling.process_memory import peak_above_inputs
from e3pruner.profiling.work import Work, WorkCounter
from e3pruner.runtime import LayerSkipRuntime
from e3pruner.surgery import prune
from e3pruner.timing import Estimate, faster_half, in_turns

PHASES = ("prefill", "decode")
Key = tuple[str, int | None, str]  # phase, layer (None: outside the layers), part


@dataclass
class DecoderProfile:
    """What `profile_decoder` measured. Seconds are means of the faster half of the rounds; those of "decode" are a
    token's.

    parts: {(phase, layer, part)} -> "seconds", of them "python" (outside operators: Python, module calls, dispatch of
    views), "flops", "bytes" (see `Work`). runtime: seconds of (phase, "attention" | "ffn" | "rest"), by ablation; empty
    where `runtime_refusal` says why the runtime does not take the model. whole: {engine: Speed}, nothing attached.
    removed: {layers removed: {engine: Speed}}, the pruned models' own; empty where `removal_refusal` says why.
    weights: bytes by part. memory: the traced pass, peak: the process's own growth meanwhile, None where Linux does
    not tell. estimates: the spread of all this, by (engine, phase), ((layers removed, engine), phase), (engine, phase,
    part), the runtime's part "layers" being all of them, and ("eager", phase, layer). ceilings: what the machine can
    do, from the same rounds; None if it was not measured.
    """

    layers: int
    parts: dict[Key, dict[str, float]]
    whole: dict[str, Speed]
    runtime: dict[tuple[str, str], float]
    runtime_refusal: str | None
    removed: dict[int, dict[str, Speed]]
    removal_refusal: str | None
    weights: dict[str, int]
    memory: MemoryTimeline
    peak: int | None
    traced: Profile = field(repr=False)
    estimates: dict[tuple[Any, ...], Estimate] = field(default_factory=dict)
    ceilings: Ceilings | None = None

    def knows_layers(self, engine: str, phase: str) -> bool:
        """Whether what the layers take is known well enough to predict from: if the whole is known, and by the clock
        the parts add up to it; by leaving out, the interval of their time holds neither nothing nor everything.
        """
        whole = getattr(self.whole[engine], phase)
        if not self.knows_whole(engine, phase):
            return False
        if engine == "eager":
            return bool(abs(self.sum_of_parts(engine, phase) / whole - 1) <= PARTS)
        return self.knows_part(phase, "layers")

    def knows_whole(self, engine: Any, phase: str) -> bool:
        """Whether the interval of the time holds none but times; `engine` as in `estimates`."""
        estimate = self.estimates.get((engine, phase))
        return estimate is None or estimate.known

    def knows_part(self, phase: str, part: str) -> bool:
        """Whether the interval of the runtime's `part` holds no nonsense: less than nothing, or more than the whole."""
        estimate = self.estimates.get(("runtime", phase, part))
        return estimate is None or estimate.between(0, getattr(self.whole["runtime"], phase))

    def layer_seconds(self, engine: str, phase: str) -> list[float]:
        """Seconds of each layer, all its parts together."""
        if engine == "runtime":
            return [(self.runtime[phase, "attention"] + self.runtime[phase, "ffn"]) / self.layers] * self.layers
        total = [0.0] * self.layers
        for (its_phase, layer, _), row in self.parts.items():
            if its_phase == phase and layer is not None:
                total[layer] += row["seconds"]
        return total

    def sum_of_parts(self, engine: str, phase: str) -> float:
        """Seconds of all parts together, to be held against the whole."""
        if engine == "runtime":
            return sum(seconds for (its_phase, _), seconds in self.runtime.items() if its_phase == phase)
        return sum(row["seconds"] for key, row in self.parts.items() if key[0] == phase)

    def predicted(self, engine: str, phase: str, removed: Sequence[int]) -> float:
        """Seconds without the layers `removed`: the whole less theirs."""
        of_layer = self.layer_seconds(engine, phase)
        whole: float = getattr(self.whole[engine], phase)
        return whole - sum(of_layer[layer] for layer in removed)

    def layers_for(self, engine: str, phase: str, speedup: float) -> int | None:
        """How many layers of mean cost must go to be `speedup` times as fast; None where removing all is too little."""
        whole = getattr(self.whole[engine], phase)
        mean = statistics.mean(self.layer_seconds(engine, phase))
        count = math.ceil((whole - whole / speedup) / mean - 1e-9)
        return count if count < self.layers else None


def middle(layers: int, count: int) -> list[int]:
    """`count` adjacent layers in the middle of the stack: what is removed where only the number matters."""
    start = (layers - count) // 2
    return list(range(start, start + count))


def without_middle(layers: int, count: int) -> list[int]:
    """The layers that stay when the `middle` ones go."""
    gone = middle(layers, count)
    return [layer for layer in range(layers) if layer not in gone]


def profile_decoder(
    model: PreTrainedModel,
    *,
    batch: int = 1,
    prompt: int = 128,
    tokens: int = 16,
    rounds: int = 5,
    limit: float = 0.0,
    removed: Sequence[int] = (4, 8, 12),
    seed: int = 0,
    folder: str | Path | None = None,
    tried: Mapping[ProbeKey, Probe] | None = None,
) -> DecoderProfile:
    """Profile `model` reading `batch` random prompts of `prompt` tokens and writing `tokens` more, one at a time.

    Runs on Hugging Face's eager forward and, where it takes the model, on `LayerSkipRuntime`. Models without each of
    `removed` numbers of layers (those below the model's) are measured in the same rounds, and so are the kernels
    `tried` (see `ceilings.probes`): `rounds` of them, and as many more as it takes until every time is known to 2 % or
    `limit` seconds have passed. A Chrome trace of one run is kept in `folder`, if given.

    Raises ValueError for counts below 1, and for a shape that does not fit in memory, from an estimate.
    """
    for name, value in {"batch": batch, "prompt": prompt, "tokens": tokens, "rounds": rounds}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    layers = len(find_layers(model))
    check_decoding_fits(model, batch, prompt, tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(output_head(model).weight.shape[0], (batch, prompt), generator=generator).to(model.device)
    with evaluating(model), returning_dicts(model), torch.no_grad():
        runtimes, runtime_refusal = _runtimes(model, prompt + tokens)
        counts = [count for count in removed if 0 < count < layers]
        pruned, removal_refusal = _pruned(model, counts, runtimes)
        engines: dict[Any, Engine] = {"eager": Eager(model), **runtimes, **pruned}
        actions: dict[Any, Callable[[], Any]] = {
            key: partial(run, engine, ids, tokens) for key, engine in engines.items()
        }
        tried = tried or {}
        limits: dict[Any, Callable[[], Any]] = {key: probe.seconds for key, probe in tried.items()}
        parts_action = {"parts": partial(_ranged, model, ids, tokens)}
        measured = in_turns(actions | parts_action | limits, rounds, limit=limit, settled=partial(_settled, engines))
        parts = _typical_parts(measured["parts"])
        runs = {key: measured[key] for key in engines}
        known = {(key, phase): e for key, values in runs.items() for phase, e in speed_of(values).items()}
        speed = {key: Speed(*(known[key, phase].value for phase in PHASES)) for key in engines}
        ablated = _ablated(runs, layers) if runtimes else {}
        work = _work(model, ids, tokens)
        growth, traced = _traced(model, ids, tokens, folder)
    outside = _python_share(traced, parts, speed["eager"], tokens)
    weights = _weights(model)
    return DecoderProfile(
        layers=layers,
        parts={
            key: {"seconds": seconds, "python": outside[key], **work.get(key, Work(0, 0))._asdict()}
            for key, seconds in parts.items()
        },
        whole={engine: speed[engine] for engine in ("eager", "runtime") if engine in speed},
        runtime={key: estimate.value for key, estimate in ablated.items() if key[1] != "layers"},
        runtime_refusal=runtime_refusal,
        removed={n: {name: speed[count, name] for count, name in pruned if count == n} for n, _ in pruned},
        removal_refusal=removal_refusal,
        weights=weights,
        memory=MemoryTimeline.of(traced.trace, {"weights": sum(weights.values())}),
        peak=growth,
        traced=traced,
        estimates=known
        | {("runtime", *key): estimate for key, estimate in ablated.items()}
        | _spread_of_parts(measured["parts"]),
        ceilings=ceilings_of(tried, measured) if tried else None,
    )


def _runtimes(model: PreTrainedModel, capacity: int) -> tuple[dict[str, Runtime], str | None]:
    """The runtime with all layers and with what an ablation leaves of them; empty, with the reason, if it refuses."""
    every = list(range(len(find_layers(model))))
    half = every[::2]
    if len(every) == 1:
        return {}, "the only layer cannot be left out"
    try:
        native = LayerSkipRuntime(model)
    except (ImportError, ValueError, TypeError) as error:
        return {}, str(error)
    keeps: dict[str, Any] = {
        "runtime": None,
        "half the attention": {"attention": half, "mlp": every},
        "half the ffn": {"attention": every, "mlp": half},
        "half the layers": half,
    }
    return {name: Runtime(native, capacity, keep) for name, keep in keeps.items()}, None


def _pruned(
    model: PreTrainedModel, counts: Sequence[int], runtimes: dict[str, Runtime]
) -> tuple[dict[tuple[int, str], Engine], str | None]:
    """By layers removed and name, each engine without them: eager on a model that was cut, the runtime with a mask."""
    layers = len(find_layers(model))
    found: dict[tuple[int, str], Engine] = {}
    for count in counts:
        kept = without_middle(layers, count)
        try:
            found[count, "eager"] = Eager(prune(model, kept, copy_weights=False))
        except ValueError as error:
            return {}, str(error)
        if runtimes:
            found[count, "runtime"] = replace(runtimes["runtime"], keep=kept)
    return found, None


def _ranged(model: PreTrainedModel, ids: Tensor, tokens: int) -> dict[Key, float]:
    """Seconds of every part in one run."""
    with ranged_parts(model), RangeRecorder(synchronizer(ids.device)) as recorder:
        run(Eager(model), ids, tokens)
    return _by_part(Timeline(recorder.ranges).seconds(), tokens)


def _typical_parts(rounds: Sequence[dict[Key, float]]) -> dict[Key, float]:
    """Mean seconds of every part over the `faster_half` of the rounds, of each phase by itself."""
    found: dict[Key, float] = {}
    for phase in PHASES:
        rows = [{key: seconds for key, seconds in row.items() if key[0] == phase} for row in rounds]
        fast = faster_half(rows, lambda row: sum(row.values()))
        found |= {key: statistics.mean(row[key] for row in fast) for key in rows[0]}
    return found


def _spread_of_parts(rounds: Sequence[dict[Key, float]]) -> dict[tuple[Any, ...], Estimate]:
    """The estimate of each part in all layers together, and of each layer with all its parts."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rounds:
        total: dict[tuple[Any, ...], float] = defaultdict(float)
        for (phase, layer, part), seconds in row.items():
            total["eager", phase, part] += seconds
            if layer is not None:
                total["eager", phase, layer] += seconds
        for key, seconds in total.items():
            found.setdefault(key, []).append(seconds)
    return {key: Estimate.of_times(values) for key, values in found.items()}


def _by_part(values: dict[tuple[str, ...], float], tokens: int) -> dict[Key, float]:
    """Values by path of ranges, summed by phase, layer and part; those of "decode" a token's."""
    total: dict[Key, float] = defaultdict(float)
    for path, value in values.items():
        if path and path[0] in PHASES:
            total[path[0], *part_of(path)] += value / (tokens if path[0] == "decode" else 1)
    return dict(total)


def _work(model: PreTrainedModel, ids: Tensor, tokens: int) -> dict[Key, Work]:
    with ranged_parts(model), RangeRecorder() as recorder, WorkCounter(recorder) as counter:
        run(Eager(model), ids, tokens)
    flops = _by_part({path: work.flops for path, work in counter.work.items()}, tokens)
    moved = _by_part({path: work.bytes for path, work in counter.work.items()}, tokens)
    return {key: Work(round(flops[key]), round(moved[key])) for key in flops}


def _traced(model: PreTrainedModel, ids: Tensor, tokens: int, folder: str | Path | None) -> tuple[int | None, Profile]:
    """The growth of the process while the prompt is read and the tokens written, and a trace of it."""
    growth = peak_above_inputs(lambda: run(Eager(model), ids, tokens))
    with ranged_parts(model), e3kernels.profile(folder, force=True) as traced:
        run(Eager(model), ids, tokens)
    return growth, traced


def _python_share(traced: Profile, parts: dict[Key, float], whole: Speed, tokens: int) -> dict[Key, float]:
    """Seconds of every part that pass outside operators."""
    inside = _by_part(operator_seconds(traced.trace, whole.prefill + whole.decode * tokens), tokens)
    return {key: max(0.0, seconds - inside.get(key, 0.0)) for key, seconds in parts.items()}


def _settled(engines: Mapping[Any, Engine], results: Mapping[Any, Sequence[Any]]) -> bool:
    return all(estimate.settled for key in engines for estimate in speed_of(results[key]).values())


def _ablated(runs: Mapping[Any, Sequence[Speed]], layers: int) -> dict[tuple[str, str], Estimate]:
    """The runtime's parts, from runs without every second attention, FFN or layer.

    The fused step is one parallel region with no clock inside, so that parts are only seen by leaving them out. Half of
    them stay, so that what is left does not suddenly fit into a cache. Of the four runs of a round, with all or half of
    the attention and all or half of the FFN, the least-squares fit of rest + attention + FFN: each part is the mean of
    what it adds with and without half of the other. "layers": attention and FFN together.
    """
    found: dict[tuple[str, str], Estimate] = {}
    scale = layers / (layers // 2)
    names = ("runtime", "half the attention", "half the ffn", "half the layers")
    for phase in PHASES:
        rows: dict[str, list[float]] = defaultdict(list)
        for turn in zip(*(runs[name] for name in names), strict=True):
            whole, half_attention, half_ffn, half_layers = (getattr(speed, phase) for speed in turn)
            attention = scale * (whole - half_attention + half_ffn - half_layers) / 2
            ffn = scale * (whole - half_ffn + half_attention - half_layers) / 2
            fitted = (3 * whole + half_attention + half_ffn - half_layers) / 4
            parts = {"attention": attention, "ffn": ffn, "rest": fitted - attention - ffn, "layers": attention + ffn}
            for part, seconds in parts.items():
                rows[part].append(seconds)
        found |= {(phase, part): Estimate.of_differences(values) for part, values in rows.items()}
    return found


def _weights(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the parameters of every part; a tied head counts as the embedding's."""
    seen: set[int] = set()
    total: Counter[str] = Counter()
    for name, module in [*parts_of(model), ("rest", model)]:
        if name.startswith("layer "):
            continue
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total[name] += parameter.nbytes
    return dict(total)
