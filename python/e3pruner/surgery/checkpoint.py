"""Cut layers out of a checkpoint folder, file by file: the model is never in memory."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from e3pruner.card import write_card
from e3pruner.models.files.empty import check_complete, empty_model, read_config
from e3pruner.models.files.names import TensorNames
from e3pruner.models.files.shards import Shard, read_shards
from e3pruner.models.stack import find_layers, stack_name
from e3pruner.models.streaming import streamed_model
from e3pruner.models.sublayers import KINDS, projection
from e3pruner.surgery import quantisation
from e3pruner.surgery.config import PREDICTION_LAYERS, pruned_config, renumbered_inside
from e3pruner.surgery.engines import warn_of_engines
from e3pruner.surgery.folder import bytes_bar, carry_over, result
from e3pruner.surgery.in_memory import kept_layers, packed_axis, warn_of_sublayers
from e3pruner.surgery.parity import assert_parity, assert_same_settings
from e3pruner.surgery.plan import PLAN_FILE, PruningPlan
from e3pruner.surgery.shards import Packed, write_shards


def prune_checkpoint(
    folder: Path, plan: PruningPlan | Sequence[int], out: Path, *, trust_remote_code: bool = False
) -> Path:
    """Writes to `out` the checkpoint in `folder` with only the layers that `plan` keeps; see `e3pruner.prune`."""
    with result(out) as temporary:
        made_by = _cut(folder, plan, temporary, trust_remote_code)
        command = ("e3", "prune", "--model", str(folder), "--plan", PLAN_FILE, "--out", str(out))
        write_card(temporary, str(folder), made_by, shlex.join(command))
    return out


def _cut(folder: Path, plan: PruningPlan | Sequence[int], out: Path, trust_remote_code: bool) -> PruningPlan:
    config = read_config(folder, trust_remote_code)
    model, shards = empty_model(config, trust_remote_code), read_shards(folder)
    check_complete(folder, model, shards)
    kept = kept_layers(model, plan)
    smaller = pruned_config(config, kept)
    pruned = empty_model(smaller, trust_remote_code)
    assert_same_settings(model, pruned, kept)
    names = TensorNames(model)
    names.check_known(name for shard in shards for name in sorted(shard.tensors))
    places = {old: new for new, old in enumerate(kept)} | _prediction_layers(names, shards, smaller)
    moved = _moved(names, shards, places, kept)
    sublayers = getattr(plan, "sublayers", {kind: [] for kind in KINDS})
    if any(sublayers.values()) and quantisation.is_quantised(config):
        raise ValueError(f"sublayers={sublayers}: weights that are quantised are not set to 0; remove whole layers")
    zeros = {moved[name] for name in _projections(names, moved, sublayers)}

    rules = quantisation.rules_of(names, (name for shard in shards for name in shard.tensors), places)
    quantisation.renumber(smaller, rules)
    quantisation.save_config(smaller, out)
    carry_over(folder, out, {shard.file.name for shard in shards})
    quantisation.renumber_files(out, rules)
    packed = _packed(names, shards, pruned, kept)
    cut = [
        Shard(
            shard.file,
            {moved[name]: packed.get(name, tensor) for name, tensor in shard.tensors.items() if name in moved},
            quantisation.renumbered_metadata(shard.metadata, rules),
        )
        for shard in shards
    ]
    size = sum(tensor.size for shard in cut for tensor in shard.tensors.values())
    with bytes_bar("cut", size) as advance:
        digests = write_shards(out, cut, zeros=zeros.__contains__, advance=advance)
    proof = _prove(folder, out, kept, sublayers, trust_remote_code)
    warn_of_sublayers(sublayers)
    warn_of_engines(config, kept)
    if not isinstance(plan, PruningPlan):
        removed = sorted(set(range(names.num_layers)) - set(kept))
        plan = PruningPlan(kept, removed, model_type=config.model_type)
    plan.save(out / PLAN_FILE, {"proof": proof, "sha256": digests})
    return plan


def _prove(
    folder: Path, out: Path, kept: Sequence[int], sublayers: Mapping[str, Sequence[int]], trust_remote_code: bool
) -> str:
    """By what it is proven that `out` is the model in `folder` without the removed layers: "logits", or "bytes" where
    the model in `folder` cannot be run here for its quantisation, which a warning says."""
    try:
        dense = streamed_model(folder, trust_remote_code=trust_remote_code)
        if quantisation.is_quantised(dense.config):
            dense(input_ids=torch.arange(4, device=dense.device)[None], use_cache=False)
    except Exception as error:
        if not quantisation.is_quantised(read_config(folder, trust_remote_code)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]}"
        warnings.warn(
            f"model {folder} cannot be run here ({reason}): the settings, names and bytes of its layers are proven, "
            "its logits are not",
            stacklevel=5,
        )
        return "bytes"
    pruned = streamed_model(out, trust_remote_code=trust_remote_code)
    assert_parity(dense, pruned, kept, sublayers, steps=2)
    return "logits"


def _prediction_layers(names: TensorNames, shards: Sequence[Shard], smaller: PreTrainedConfig) -> dict[int, int]:
    """Where the layers behind the last one go, those of multi-token prediction: behind the last one that is left.

    Those that no setting speaks of are left out, which a warning says, and so is a setting that speaks of none.
    """
    found = {at.layer for shard in shards for name in shard.tensors if (at := names.layer_of(name))}
    behind = sorted(layer for layer in found if layer >= names.num_layers)
    text = smaller.get_text_config(decoder=True)
    told = range(names.num_layers, names.num_layers + (getattr(text, PREDICTION_LAYERS, None) or 0))
    if told and not behind:
        setattr(text, PREDICTION_LAYERS, 0)
    if unread := [layer for layer in behind if layer not in told]:
        warnings.warn(
            f"layers {unread} lie behind the {names.num_layers} of the model, and {PREDICTION_LAYERS}={len(told)}: "
            "nothing reads them, and they are left out",
            stacklevel=5,
        )
    places = {old: old - names.num_layers + text.num_hidden_layers for old in behind if old in told}
    if places:
        warnings.warn(
            f"layers {list(places)}, of multi-token prediction, become {list(places.values())}; they were trained "
            "behind the dense model",
            stacklevel=5,
        )
    return places


def _moved(
    names: TensorNames, shards: Sequence[Shard], places: Mapping[int, int], kept: Sequence[int]
) -> dict[str, str]:
    """What the tensors that stay are called in the pruned model, by what they are called."""
    config, moved = names.model.config, {}
    for name in (name for shard in shards for name in sorted(shard.tensors)):
        at = names.layer_of(name)
        new: str | None = name
        if at is not None:
            new = renumbered_inside(config, kept, names.moved(at, places[at.layer])) if at.layer in places else None
        if new is not None:
            moved[name] = new
    return moved


def _packed(
    names: TensorNames, shards: Sequence[Shard], pruned: PreTrainedModel, kept: Sequence[int]
) -> dict[str, Packed]:
    """What stays of the tensors beside the layers that hold a block for each of them."""
    before, after, found = names.model.state_dict(), pruned.state_dict(), {}
    for name, tensor in (item for shard in shards for item in shard.tensors.items()):
        inside = names.in_model(name)
        if names.layer_of(name) or inside not in after or before[inside].shape == (shape := after[inside].shape):
            continue
        axis = packed_axis(before[inside].shape, shape, names.num_layers, len(kept))
        if axis is None or tensor.entry["shape"] != list(before[inside].shape):
            raise ValueError(f"tensor {name} has a part of each layer, which {dict(tensor.entry)} does not tell apart")
        found[name] = Packed.of(tensor, shape, axis, names.num_layers, kept)
    return found


def _projections(names: TensorNames, moved: Mapping[str, str], sublayers: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """The tensors that become 0: the output projections of `sublayers`."""
    layers, stack = find_layers(names.model), stack_name(names.model)
    for kind in KINDS:
        for layer in sublayers[kind]:
            own = projection(layers[layer], kind)
            inside = next(name for name, module in layers[layer].named_modules() if module is own)
            found = [name for name in moved if names.in_model(name).startswith(f"{stack}.{layer}.{inside}.")]
            if {names.in_model(name).rpartition(".")[2] for name in found} != {n for n, _ in own.named_parameters()}:
                raise ValueError(
                    f"sublayers[{kind!r}] holds {layer}, whose {inside} is stored as {found or 'part of another'}: "
                    "it cannot be set to 0 in a file; remove whole layers, or prune the dequantised model in memory"
                )
            yield from found
