"""The configuration of a pruned model: every setting that speaks of layers by number, translated or refused."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from e3pruner.models.stack import count_setting
from e3pruner.surgery.demands import check_kept

# Layers of multi-token prediction, stored behind the last one.
PREDICTION_LAYERS = "num_nextn_predict_layers"
# The first layer after a leading group: as many layers stay in the group as are kept of it.
_BOUNDARIES = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers")
_INDEX_SETS = (
    *("attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers"),
    "moe_layers",
)
# Setting: (its value that treats all layers alike, what any other value does).
_REFUSED: dict[str, tuple[Any, str]] = {
    "rescale_every": (
        0,
        "every so many layers halve the hidden state; load it by from_pretrained(..., rescale_every=0), or say so in "
        "config.json, which changes rounding only",
    ),
}
_ADAPTER = re.compile(r"_adapter_list\.(\d+)(?!\d)")

# Setting that says every how many layers another kind comes: the list that says it of each layer, and is read first.
_SPACINGS = {
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
}


def pruned_config(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` for a model of the layers `kept` (ascending) only.

    The number of layers follows; lists with one entry per layer are sliced, whether set or generated from a pattern;
    indices and boundaries are renumbered. Raises `ValueError` naming a setting that ties what a layer does to its index
    in a way that no configuration of the pruned model expresses, or a demand on the layers that stay (`demands_of`).
    """
    pruned = copy.deepcopy(config)
    text = pruned.get_text_config(decoder=True)
    settings = {name: value for name, value in vars(text).items() if value is not None}
    for name, (harmless, reason) in _REFUSED.items():
        if settings.get(name, harmless) != harmless:
            raise ValueError(f"config.{name}={settings[name]!r} ({text.model_type}) cannot be pruned: {reason}")
    check_kept(config, kept)

    overrides = text.to_dict().get("per_layer_config")
    text.per_layer_config = None  # its indices are those of the dense model
    setting = count_setting(text)
    count = getattr(text, setting)
    caches = {"num_hidden_layers": text.num_hidden_layers // count * len(kept)} if setting == "num_layers" else {}
    for name, value in (_translated(settings, kept, count) | {setting: len(kept)} | caches).items():
        setattr(text, name, value)
    for name, per_layer in _SPACINGS.items():
        kinds = settings.get(per_layer)
        if kinds is not None and [kinds[old] for old in kept] != list(kinds[: len(kept)]):
            vars(text).pop(name, None)  # it would contradict the list
    if targets := getattr(pruned, "deepstack_layer_map", None):
        pruned.deepstack_layer_map = [(vision, kept.index(layer)) for vision, layer in targets]
        pruned.spatial_target_layers = [kept.index(layer) for layer in pruned.spatial_target_layers]
    renumbered: dict[int | str, dict[str, Any]]
    renumbered = {kept.index(int(old)): each for old, each in (overrides or {}).items() if int(old) in kept}
    text.per_layer_config = renumbered or (None if overrides else overrides)  # {} keeps a type's defaults away
    return pruned


def renumbered_inside(config: PreTrainedConfig, kept: Sequence[int], name: str) -> str | None:
    """What a module or tensor of a layer is called when the layers `kept` are left; None if it goes.

    The block that the hybrid layers of Zamba 2 share holds an adapter for each of them, in their order.
    """
    hybrid = getattr(config.get_text_config(decoder=True), "hybrid_layer_ids", None)
    if not hybrid or (found := _ADAPTER.search(name)) is None:
        return name
    number = int(found[1])
    new = sum(layer in kept for layer in hybrid[:number])
    return f"{name[: found.start(1)]}{new}{name[found.end(1) :]}" if hybrid[number] in kept else None


def _translated(settings: dict[str, Any], kept: Sequence[int], num_layers: int) -> dict[str, Any]:
    translated: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _INDEX_SETS:
            translated[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in _BOUNDARIES:
            translated[name] = sum(old < value for old in kept)
        elif isinstance(value, list | tuple) and len(value) == num_layers and not name.endswith("_token_id"):
            translated[name] = type(value)(value[old] for old in kept)
    if "decoder_sparse_step" in settings:  # experts in every step-th layer that mlp_only_layers does not name
        step, dense = settings["decoder_sparse_step"], settings.get("mlp_only_layers", [])
        translated["decoder_sparse_step"] = 1
        translated["mlp_only_layers"] = [i for i, old in enumerate(kept) if old in dense or (old + 1) % step]
    if "num_kv_shared_layers" in settings:  # the last ones
        first = num_layers - settings["num_kv_shared_layers"]
        translated["num_kv_shared_layers"] = sum(old >= first for old in kept)
    if (sources := settings.get("kv_source_layers")) is not None:  # the last of their kind that ran
        ropes, owned = settings["no_rope_layers"], {source for layer, source in enumerate(sources) if source != layer}
        writers = {old: [w for w in kept if w < old and w in owned and ropes[w] == ropes[old]] for old in kept}
        translated["kv_source_layers"] = [
            new if sources[old] == old else kept.index(writers[old][-1]) for new, old in enumerate(kept)
        ]
    if "moe_layer_end_index" in settings:  # inclusive
        translated["moe_layer_end_index"] = sum(old <= settings["moe_layer_end_index"] for old in kept) - 1
    if "scale_depth" in settings:  # MiniCPM3: what is added to the residual stream is divided by the root of the depth
        factor, root = settings["scale_depth"] / math.sqrt(num_layers), math.sqrt(len(kept))
        near = [factor * root, *(math.nextafter(factor * root, end) for end in (-math.inf, math.inf))]
        translated["scale_depth"] = min(near, key=lambda scale: abs(scale / root - factor))
    if "ple_layer_ids" in settings:  # Qwen4: counted from 1
        translated["ple_layer_ids"] = [new + 1 for new, old in enumerate(kept) if old + 1 in settings["ple_layer_ids"]]
    if settings.get("num_blocks") == num_layers:  # xLSTM, beside num_hidden_layers
        translated["num_blocks"] = len(kept)
    if "n_recurrent_layers" in settings:  # Dory: layers before, within and behind the loop
        first, loop = settings["n_input_layers"], settings["n_recurrent_layers"]
        translated["n_input_layers"] = sum(old < first for old in kept)
        translated["n_recurrent_layers"] = sum(first <= old < first + loop for old in kept)
        translated["n_output_layers"] = sum(old >= first + loop for old in kept)
    if "block_types" in settings:  # RecurrentGemma: repeated over the depth
        pattern = settings["block_types"]
        translated["block_types"] = [pattern[old % len(pattern)] for old in kept]
    if "attention_types" in settings:  # GPT-Neo: [[kinds, repeats], ...], from which attention_layers is expanded
        translated["attention_types"] = [[[kind], 1] for kind in translated["attention_layers"]]
    return translated
