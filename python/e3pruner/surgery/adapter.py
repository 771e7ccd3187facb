"""Cut an adapter of PEFT along with the model that it was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e3pruner.models.files.shards import Shard
from e3pruner.storage import read_json
from e3pruner.surgery.folder import carry_over, result
from e3pruner.surgery.plan import PLAN_FILE, PruningPlan
from e3pruner.surgery.renumbering import Renumbering
from e3pruner.surgery.shards import write_shards

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPER = "base_model.model."  # before the names of the model in those of PEFT
_LAYER = re.compile(rf"{re.escape(_WRAPPER)}((?:[^\d.][^.]*\.)+)(\d+)\.(.+)")
_LEAF = re.compile(r"\.(?:lora_|base_layer|ia3_|hada_|lokr_|oft_|boft_|vera_|hra_|original_module|modules_to_save).*")


def prune_adapter(folder: Path, plan: PruningPlan | Sequence[int], out: Path, *, base: str | None = None) -> Path:
    """Writes to `out` the adapter in `folder` for the model that `plan` keeps of the one it was trained on.

    Tensors keep their bytes; those of removed layers go. `base`: what the adapter shall name as its model; without it
    none, as the one it names is the dense model. Raises ValueError for an adapter that is not made of parts of layers,
    by name, for one whose layers are not those of `plan`, and for one of which nothing is left.
    """
    config, shard = _read(folder)
    kept = list(plan.kept if isinstance(plan, PruningPlan) else plan)
    found = {name: match for name in shard.tensors if (match := _LAYER.fullmatch(name))}
    if len(stems := sorted({match[1] for match in found.values()})) != 1:
        raise ValueError(f"adapter {folder} has tensors of {len(stems)} stacks of layers, {stems}; it must be of one")
    layers = sorted({int(match[2]) for match in found.values()})
    if isinstance(plan, PruningPlan) and layers[-1] >= plan.num_layers:
        raise ValueError(f"adapter {folder} adapts layer {layers[-1]}; plan is for {plan.num_layers} layers")
    if packed := sorted(name for name in shard.tensors if name not in found and "per_layer" in name):
        raise ValueError(f"adapter {folder} adapts {packed[0]}, which has a part of every layer; it cannot be cut")
    places = {old: new for new, old in enumerate(sorted(kept))}
    if not set(layers) & set(places):
        raise ValueError(f"adapter {folder} adapts the layers {layers}, of which plan keeps none")

    modules = {_LEAF.sub("", name.removeprefix(_WRAPPER)) for name in shard.tensors}
    rules = Renumbering(stems, places, modules)
    tensors = {}
    for name, tensor in shard.tensors.items():
        if (new := rules.name(name.removeprefix(_WRAPPER))) is not None:
            tensors[_WRAPPER + new] = tensor
    with result(out) as temporary:
        carry_over(folder, temporary, {_WEIGHTS})
        content = renumbered_config(config, rules, places) | {"base_model_name_or_path": base, "revision": None}
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        digests = write_shards(temporary, [Shard(shard.file, tensors, shard.metadata)], index=False)
        if isinstance(plan, PruningPlan):
            plan.save(temporary / PLAN_FILE, {"proof": "bytes", "sha256": digests})
    return out


def renumbered_config(config: dict[str, Any], rules: Renumbering, places: dict[int, int]) -> dict[str, Any]:
    """`adapter_config.json` with every layer in it under its new number."""
    content = dict(config)
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if isinstance(value := config.get(name), list):
            content[name] = [new for each in value for new in rules.rule(each, _ends)]
        elif isinstance(value, str):  # a pattern, which a name matches as a whole
            content[name] = next(iter(rules.rule(value, _matches)), None)
    for name in ("rank_pattern", "alpha_pattern"):
        if value := config.get(name):
            content[name] = {new: each for old, each in value.items() for new in rules.rule(old, _ends)}
    if (layers := config.get("layers_to_transform")) is not None:
        old = [layers] if isinstance(layers, int) else layers
        content["layers_to_transform"] = [places[layer] for layer in old if layer in places]
    return content


def _read(folder: Path) -> tuple[dict[str, Any], Shard]:
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no peft_type")
    for name in ("num_layers", "adapter_layers", "layer_replication"):
        if config.get(name):
            raise ValueError(f"adapter {folder} ({config['peft_type']}): {name}={config[name]} ties it to all layers")
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"adapter {folder} has no {_WEIGHTS}; only safetensors are cut as files")
    return config, Shard.read(folder / _WEIGHTS)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _ends(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
