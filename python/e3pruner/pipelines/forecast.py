"""What a model will take on a machine, in bytes and seconds, by formulas from its configuration alone.

Bytes of a stage on one device, with W all weights, w those of one layer, O those outside the layers (embeddings, head),
P parameters, H the width, t tokens of a batch, T all tokens, m masks at once, s bytes of a number:

    search, evaluate    whole   W + states                       streamed   O + 2·w + states
    states                      T·H·s (the teacher's last) + 2·m·t·H·s (before and behind a layer), 192 MiB of logits
    prune               files   nothing: what is copied and compared is mapped
    distill             whole   16·P_kept (fp32 weight, gradient, Adam's two moments) + W of the teacher + activations
                        fsdp2   16·P_kept / devices + 2·w_kept (gathered) + W / devices + activations
                        cached  without W of the teacher
    activations                 t·L·(34·H + 6·I)·s/2 (every tensor that a layer's backward pass reads), t·L·H·s with
                                checkpointing; I the MLP's inner width

Beside these 0.4 GiB are the process itself: Python, torch, transformers.

Seconds are the larger of two bounds: FLOPs, 2·P·T of a forward pass and 6·P·T of a training step, over what the machine
multiplies; bytes, weights once per sweep, over what its memory, or where they are streamed its disk, gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from e3pruner.evaluation.target import check_drop
from e3pruner.models import find_layers
from e3pruner.models.device import usable_device
from e3pruner.profiling.ceilings import ceilings_of, probes
from e3pruner.timing import in_turns

_PROCESS = 400 << 20  # bytes
_LOGITS = 3 * (64 << 20)  # tiles of the teacher, of a student, and what is made of them
_MASKS = 8  # of a step of the default search
_BATCH = 4 * 256  # tokens
_USED = 0.5  # share of a data sheet's figures that programs reach
_DISK = 3e9  # bytes a second, of an NVMe drive


@dataclass(frozen=True)
class Machine:
    """memory: bytes of each of `devices`. flops: a second and device, dense products in bfloat16. bandwidth, disk:
    bytes a second. measured: whether here, or of a data sheet, of which half is counted on.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    devices: int = 1
    disk: float = _DISK
    measured: bool = False


# Of the vendors' data sheets: memory in GB, TFLOP/s (bfloat16, dense), GB/s.
_SHEETS = {
    "a100": (80, 312, 2039),
    "h100": (80, 989, 3350),
    "h200": (141, 989, 4800),
    "b200": (180, 2250, 8000),
    "l40s": (48, 362, 864),
    "rtx3090": (24, 71, 936),
    "rtx4090": (24, 165, 1008),
    "mi300x": (192, 1307, 5300),
}


@dataclass(frozen=True)
class Need:
    """What `stage` takes under `placement`: bytes on each device, seconds; whether it fits."""

    stage: str
    placement: str
    memory: float
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Forecast:
    """The needs of each stage on `machine`, `drop` layers being removed."""

    machine: Machine
    drop: int
    tokens: int
    training: int
    needs: list[Need]


@dataclass(frozen=True)
class Sizes:
    """Of a model: bytes of all weights, of its largest layer, of what is outside the layers; parameters, those that a
    token multiplies by, and those of the layers; bytes of a number; layers, width, inner width; bytes of a token's keys
    and values.
    """

    weights: int
    layer: int
    outside: int
    parameters: int
    active: float
    stack: int
    number: int
    layers: int
    width: int
    inner: int
    kv: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sizes:
        """From a model that may be on the meta device."""
        config = model.config.get_text_config(decoder=True)
        layers = find_layers(model)
        sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        number, heads = model.dtype.itemsize, getattr(config, "num_attention_heads", 1)
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            weights=weights,
            layer=max(sizes),
            outside=weights - sum(sizes),
            parameters=sum(p.numel() for p in model.parameters()),
            active=_active(model),
            stack=sum(p.numel() for p in layers.parameters()),
            number=number,
            layers=len(layers),
            width=config.hidden_size,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            kv=_key_values(config, 2 * key_heads * head) * number * len(layers),
        )


def machine(name: str | None = None) -> Machine:
    """The machine of this name: "h100:8" is eight of a data sheet's; None, the one that this runs on, measured for some
    seconds.

    Raises ValueError naming the ones that are known.
    """
    if name is None:
        return _this_machine()
    kind, _, count = name.lower().partition(":")
    if kind not in _SHEETS or not re.fullmatch(r"[1-9]\d*|", count):
        raise ValueError(f"device={name!r} must be one of {', '.join(_SHEETS)}, or of so many: h100:8")
    memory, flops, bandwidth = _SHEETS[kind]
    return Machine(name, memory * 1e9, flops * 1e12, bandwidth * 1e9, int(count or 1))


def _this_machine() -> Machine:
    device = usable_device()
    tried = probes(device, [torch.bfloat16])
    seconds = in_turns({key: probe.seconds for key, probe in tried.items()}, 3)
    found = ceilings_of(tried, seconds)
    if device.type == "cuda":
        memory, devices = float(torch.cuda.get_device_properties(device).total_memory), torch.cuda.device_count()
        name = torch.cuda.get_device_name(device)
    else:
        memory, devices, name = float(psutil.virtual_memory().total), 1, "this CPU"
    return Machine(name, memory, found.gemm["bfloat16"], found.read, devices, measured=True)


def forecast(
    sizes: Sizes, on: Machine, *, drop: int | None = None, tokens: int = 4096, training: int = 1 << 16
) -> Forecast:
    """What each stage takes, `drop` layers being removed, a quarter unless told: search and evaluation on `tokens`,
    recovery on `training` tokens. Raises ValueError for a `drop` that leaves no layer.
    """
    drop = max(1, sizes.layers // 4) if drop is None else drop
    check_drop(drop, sizes.layers)
    rate, read = (value * (1 if on.measured else _USED) for value in (on.flops, on.bandwidth))

    def need(stage: str, placement: str, memory: float, flops: float, moved: float, disk: float = 0.0) -> Need:
        seconds = max(flops / rate, moved / read, disk / on.disk)
        return Need(stage, placement, memory + _PROCESS, seconds, memory + _PROCESS <= on.memory)

    needs = [*_passes(sizes, drop, tokens, need), *_recovery(sizes, drop, training, on.devices, need)]
    return Forecast(on, drop, tokens, training, needs)


def _passes(sizes: Sizes, drop: int, tokens: int, need: Any) -> Iterator[Need]:
    """Search, evaluation of two models, cutting files."""
    held = tokens * sizes.width * sizes.number + _LOGITS
    states = held + 2 * _MASKS * min(tokens, _BATCH) * sizes.width * sizes.number
    layers = sizes.weights - sizes.outside
    passes, steps = 0.7 * sizes.layers, 3 * drop + 2
    work = 2 * sizes.active * tokens
    batches = math.ceil(tokens / _BATCH)
    yield need("search", "whole", sizes.weights + states, passes * work, steps * batches * sizes.weights)
    streamed = states + 2 * _MASKS * (batches - 1) * _BATCH * sizes.width * sizes.number
    yield need("search", "stream", sizes.outside + 2 * sizes.layer + streamed, passes * work, 0, steps * layers)
    share = (sizes.layers - drop) / sizes.layers
    yield need("evaluate", "whole", (1 + share) * sizes.weights + held, 2 * work, 2 * batches * sizes.weights)
    both = 2 * (sizes.outside + 2 * sizes.layer) + held
    yield need("evaluate", "stream", both, 2 * work, 0, 2 * 3 * layers)
    yield need("prune", "files", 0, 0, 0, (1 + share) * 3 * sizes.weights)


def _recovery(sizes: Sizes, drop: int, tokens: int, devices: int, need: Any) -> Iterator[Need]:
    kept = sizes.parameters - sizes.stack * drop / sizes.layers
    depth = sizes.layers - drop
    activations = _BATCH * depth * (34 * sizes.width + 6 * sizes.inner) + _LOGITS
    learn = 6 * sizes.active * kept / sizes.parameters * tokens
    teach = 2 * sizes.active * tokens
    steps = math.ceil(tokens / _BATCH)
    moved = steps * 16 * kept
    yield need("distill", "whole", 16 * kept + sizes.weights + activations, learn + teach, moved)
    yield need("distill", "whole, teacher cached", 16 * kept + activations, learn, moved)
    if devices > 1:
        shared = 16 * kept / devices + 2 * sizes.layer * 2 / sizes.number + activations / devices
        own = shared + sizes.weights / devices
        yield need("distill", f"fsdp2, {devices} devices", own, (learn + teach) / devices, moved / devices)


def _key_values(config: Any, numbers: int) -> int:
    """Numbers that a layer keeps of a token: keys and values, or the latent that both are made of."""
    latent = getattr(config, "kv_lora_rank", None)
    return numbers if latent is None else latent + config.qk_rope_head_dim


def _active(model: PreTrainedModel) -> float:
    """The parameters that a token multiplies by: of experts those that it is routed to, of the embedding none."""
    config = model.config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((number for name in names if (number := getattr(config, name, None))), 0)
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    embedding: Any = model.get_input_embeddings()
    unused = 0 if model.get_output_embeddings().weight is embedding.weight else embedding.weight.numel()
    routed = sum(p.numel() for p in find_layers(model).parameters() if p.dim() == 3 and p.shape[0] == experts)
    return sum(p.numel() for p in model.parameters()) - unused - (1 - share) * routed
