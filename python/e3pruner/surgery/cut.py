"""`prune`: of a model in memory, or of files that are never read into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from transformers import PreTrainedModel

from e3pruner.surgery.adapter import ADAPTER_CONFIG, prune_adapter
from e3pruner.surgery.checkpoint import prune_checkpoint
from e3pruner.surgery.gguf import prune_gguf
from e3pruner.surgery.in_memory import prune_model
from e3pruner.surgery.plan import PruningPlan

Plan = PruningPlan | Sequence[int]


@overload
def prune(model: PreTrainedModel, plan: Plan, *, copy_weights: bool = True) -> PreTrainedModel: ...
@overload
def prune(
    model: str | os.PathLike[str], plan: Plan, *, out: str | os.PathLike[str], trust_remote_code: bool = False
) -> Path: ...
def prune(
    model: PreTrainedModel | str | os.PathLike[str],
    plan: Plan,
    *,
    copy_weights: bool = True,
    out: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | Path:
    """A vanilla model of the same class with only the layers that `plan` keeps.

    `plan`: a `PruningPlan`, anything else with `.kept`, or the indices of the layers to keep, in any order.

    Of a model in memory, a model: dtype, device, mode and generation settings are those of `model`, which stays as it
    is. `copy_weights=False` lets both models share their weights, for saving or evaluating at half the memory; training
    one would then change the other. `save_pretrained` writes a checkpoint that plain `AutoModelForCausalLM` loads.

    Of files, the folder `out`, which appears when it is complete; a few megabytes of them are in memory at a time.
    `model` is the folder of a checkpoint in safetensors, of any size and dtype: its tensors keep their bytes (of those
    that hold a block of every layer, such as Gemma's embeddings per layer, kept layers' blocks do), names and per-layer
    settings are renumbered, what else lies there is carried over, except for weights in other forms. Of the model's
    card only licence, language and tags go into that of the result, `README.md`, which says what was removed and how to
    do it again. `pruning.json` gets the SHA-256 of every tensor. Or it is the folder of an adapter of PEFT that was
    trained on the dense model; it then names no base model, for it fits the pruned one alone. Or it is a GGUF file.

    Sub-layers that the plan removes have their output projection set to 0: the checkpoint stays vanilla and its size
    does not shrink, which a warning says. Before anything is returned it is proven to be `model` without the removed
    layers, see `assert_parity`; of a folder by reading one layer at a time.

    Raises `ValueError` for indices out of range, doubled, or none; for a plan of another model; for settings that
    cannot be renumbered; for tensors whose place in the model is not known; for weights on several devices; and if the
    proof fails. `FileExistsError` if `out` exists. Errors of `find_layers` too.
    """
    if isinstance(model, PreTrainedModel) or not isinstance(model, str | os.PathLike):
        if out is not None:
            raise ValueError(f"out={str(out)!r} goes with a folder or a file; save a model by save_pretrained")
        return prune_model(model, plan, copy_weights=copy_weights)
    if out is None:
        raise ValueError(f"model={str(model)!r} is cut as files; out= must name the folder for the result")
    if (Path(model) / ADAPTER_CONFIG).is_file():
        return prune_adapter(Path(model), plan, Path(out))
    if Path(model).suffix == ".gguf":
        return prune_gguf(Path(model), plan, Path(out))
    return prune_checkpoint(Path(model), plan, Path(out), trust_remote_code=trust_remote_code)
