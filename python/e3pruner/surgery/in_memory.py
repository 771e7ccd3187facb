"""Cut layers out of a model in memory."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3pruner.models.stack import check_indices, check_unquantised, decoder_of, find_layers, stack_name
from e3pruner.models.sublayers import KINDS, projection
from e3pruner.surgery.config import PREDICTION_LAYERS, pruned_config, renumbered_inside
from e3pruner.surgery.engines import warn_of_engines
from e3pruner.surgery.parity import assert_parity, assert_same_settings
from e3pruner.surgery.plan import PruningPlan


def prune_model(model: PreTrainedModel, plan: PruningPlan | Sequence[int], *, copy_weights: bool) -> PreTrainedModel:
    """A vanilla model of the same class with only the layers that `plan` keeps; see `e3pruner.prune`."""
    find_layers(model)  # raises for a model without
    check_unquantised("model", model, "it is cut as files: prune(folder, plan, out=...) keeps its bytes")
    kept = kept_layers(model, plan)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise ValueError(f"model has weights on {', '.join(devices)}; load it on one device to prune it")
    pruned = skeleton(model, kept)
    _fill(pruned, model, kept, copy_weights)
    pruned.tie_weights()
    pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.train(model.training)
    sublayers = getattr(plan, "sublayers", {kind: [] for kind in KINDS})
    _empty_sublayers(pruned, kept, sublayers)
    assert_parity(model, pruned, kept, sublayers)
    warn_of_engines(model.config, kept)
    return pruned


def skeleton(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """The model of the layers `kept`, ascending, of `model`, without weights: they may be on the meta device here too.

    Raises `ValueError` as `prune` does for all that can be known without running either: a demand of the configuration,
    settings that cannot be renumbered, layers that their index would change, weights of other names or shapes.
    """
    config = pruned_config(model.config, kept)
    text = config.get_text_config(decoder=True)
    if getattr(text, PREDICTION_LAYERS, None):
        setattr(text, PREDICTION_LAYERS, 0)  # they are in a checkpoint, and in no model
    with init_empty_weights(include_buffers=False):
        pruned = type(model)(config)
        ours: Any = decoder_of(pruned)
        if hasattr(ours, "set_attention_type"):  # BigBird exchanges modules when it is called with short rows
            ours.set_attention_type(decoder_of(model).attention_type)
    assert_same_settings(model, pruned, kept)
    stack, counts = stack_name(model), (len(find_layers(model)), len(kept))
    taken = {new: tensor.shape for new, tensor in _renamed(model.state_dict().items(), model, kept)}
    needed = {name: tensor.shape for name, tensor in pruned.state_dict().items()}
    odd = {name for name in taken.keys() & needed if taken[name] != needed[name]}
    beside = [name for name in odd if not name.startswith(f"{stack}.")]
    packed = {name for name in beside if packed_axis(taken[name], needed[name], *counts) is not None}
    if taken.keys() != needed.keys() or odd != packed:
        raise ValueError(f"model ({model.config.model_type}) cannot be pruned: with fewer layers it has other weights")
    return pruned


def packed_axis(dense: Sequence[int], pruned: Sequence[int], total: int, left: int) -> int | None:
    """The axis along which a tensor beside the layers holds one block for each, by its shape with `total` layers and
    with `left`: the only one that is shorter. Gemma's embeddings per layer are such tensors."""
    shorter = [axis for axis, (old, new) in enumerate(zip(dense, pruned, strict=False)) if old != new]
    fits = len(dense) == len(pruned) and len(shorter) == 1 and dense[shorter[0]] * left == pruned[shorter[0]] * total
    return shorter[0] if fits else None


def _renamed(
    tensors: Iterable[tuple[str, Tensor]], model: PreTrainedModel, kept: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors that stay, those of layers under their new index."""
    stack = stack_name(model)
    renamed = {f"{stack}.{old}.": f"{stack}.{new}." for new, old in enumerate(kept)}
    for name, tensor in tensors:
        layer = re.match(rf"{re.escape(stack)}\.\d+\.", name)
        if layer is None:
            yield name, tensor
            continue
        inside = renumbered_inside(model.config, kept, name[layer.end() :])
        if layer[0] in renamed and inside is not None:
            yield renamed[layer[0]] + inside, tensor


def _empty_sublayers(pruned: PreTrainedModel, kept: Sequence[int], sublayers: Mapping[str, Sequence[int]]) -> None:
    """Zeros in place of the projections of `sublayers`, which go by the layers' indices in the dense model."""
    layers = find_layers(pruned)
    for kind in KINDS:
        for old in sublayers[kind]:
            module = projection(layers[kept.index(old)], kind)
            for name, parameter in module.named_parameters():  # new tensors: the old ones may be the dense model's
                setattr(module, name, nn.Parameter(torch.zeros_like(parameter), parameter.requires_grad))
    warn_of_sublayers(sublayers)


def warn_of_sublayers(sublayers: Mapping[str, Sequence[int]]) -> None:
    """Says of a plan that removes `sublayers` that their weights stay."""
    if count := sum(map(len, sublayers.values())):
        warnings.warn(
            f"the output projections of {count} sub-layers are set to 0: the checkpoint loads anywhere, and is as "
            "large and as slow as with them; only e3pruner.LayerSkipRuntime(keep=plan.keep) skips them",
            stacklevel=4,
        )


def kept_layers(model: PreTrainedModel, plan: Any) -> list[int]:
    """The layers of `model` that `plan` keeps, ascending. Raises `ValueError` for a plan of another model."""
    num_layers = len(find_layers(model))
    if getattr(plan, "num_layers", num_layers) != num_layers:
        raise ValueError(f"plan is for {plan.num_layers} layers, model has {num_layers}")
    if getattr(plan, "model_type", "") not in ("", model.config.model_type):
        raise ValueError(f"plan is for a {plan.model_type} model, model is {model.config.model_type}")
    kept = check_indices("kept", getattr(plan, "kept", plan), num_layers)
    if not kept:
        raise ValueError("kept=[] keeps no layer; at least one must stay")
    return kept


def _fill(pruned: PreTrainedModel, model: PreTrainedModel, kept: Sequence[int], copied: bool) -> None:
    """Give `pruned` the weights and buffers of `model`, those of kept layers under their new index."""
    copies: dict[int, Tensor] = {}
    shapes, total = {name: tensor.shape for name, tensor in pruned.state_dict().items()}, len(find_layers(model))

    def own(name: str, tensor: Tensor) -> Tensor:
        if (axis := packed_axis(tensor.shape, shapes.get(name, tensor.shape), total, len(kept))) is not None:
            indices = torch.tensor(kept, device=tensor.device)
            blocks: Tensor = tensor.unflatten(axis, (total, -1)).index_select(axis, indices)
            return blocks.flatten(axis, axis + 1)
        return tensor.clone() if copied else tensor

    def taken(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in _renamed(tensors, model, kept):
            if id(tensor) not in copies:  # tied weights stay one tensor
                copies[id(tensor)] = own(name, tensor.detach())
            found[name] = copies[id(tensor)]
        return found

    state = taken(model.state_dict(keep_vars=True).items())
    pruned.load_state_dict(state, assign=True)
    buffers = taken(model.named_buffers())
    cast = []
    for name, buffer in list(pruned.named_buffers()):
        if name not in state:  # not part of a checkpoint: computed anew where one is loaded
            if buffer.dtype != buffers[name].dtype:
                cast.append(name)
            owner, _, leaf = name.rpartition(".")
            setattr(pruned.get_submodule(owner), leaf, buffers[name])
    if cast:
        warnings.warn(
            f"model was cast after loading, {', '.join(cast)} with it; its checkpoint will load with these in full "
            f"precision and give other logits. Load models with dtype=... instead.",
            stacklevel=3,
        )
