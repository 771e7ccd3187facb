"""Cut layers out of a GGUF file, as llama.cpp reads it: blocks renumbered, lists with an entry per block filtered."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e3pruner.models.stack import check_indices
from e3pruner.requirements import require
from e3pruner.surgery.folder import bytes_bar, result
from e3pruner.surgery.plan import PLAN_FILE, PruningPlan

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Lists whose length is not the number of blocks, whatever it happens to be.
_NOT_PER_BLOCK = ("rope.dimension_sections", "classifier.output_labels", "tokenizer.", "general.")
_BOUNDARIES = ("leading_dense_block_count",)
# Setting: (its value that treats all blocks alike, what any other value does).
_REFUSED: dict[str, tuple[int, str]] = {
    "attention.shared_kv_layers": (0, "the last blocks read the keys and values of earlier ones"),
    "attention.sliding_window_pattern": (1, "which blocks attend to all follows from their index"),
    "embedding_length_per_layer_input": (0, "one tensor holds the embeddings of all blocks"),
    "full_attention_interval": (1, "which blocks attend follows from their index"),
    "interleave_moe_layer_step": (1, "which blocks hold experts follows from their index"),
    "moe_every_n_layers": (1, "which blocks hold experts follows from their index"),
    "nextn_predict_layers": (0, "the last blocks predict further tokens"),
}
# Every so many blocks llama.cpp treats one differently, by its index alone where the file has no list that says which.
_PERIODS = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "llama4": 4, "smollm3": 4}


def prune_gguf(file: Path, plan: PruningPlan | Sequence[int], out: Path) -> Path:
    """Writes to the folder `out` the GGUF `file` with only the blocks that `plan` keeps, under the same name.

    Tensors keep their bytes, which are compared once the file is read back; their SHA-256 are in `pruning.json`.
    Raises ModuleNotFoundError without the package gguf, ValueError for a plan of another model, for one of several
    parts, for settings that tie what a block does to its index, and for tensors of no known place, by name.
    """
    require("gguf")
    import gguf  # optional

    reader: Any = gguf.GGUFReader(file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kind = fields["general.architecture"].contents()
    values = {name.removeprefix(f"{kind}."): field.contents() for name, field in fields.items()}
    if values.get("split.count", 1) > 1:
        raise ValueError(f"{file} is one of {values['split.count']} parts; merge them by llama-gguf-split --merge")
    count = values["block_count"]
    kept = _kept(file, plan, count)
    changed = _changed(file, kind, values, kept)
    places = {f"blk.{old}.": f"blk.{new}." for new, old in enumerate(kept)}
    tensors = {new: tensor for tensor in reader.tensors if (new := _moved(file, tensor.name, places, count))}

    with result(out) as temporary:
        writer: Any = gguf.GGUFWriter(temporary / file.name, kind, endianess=reader.endianess)
        writer.data_alignment = reader.alignment
        for name, field in fields.items():
            if name != "general.architecture":  # the writer has it
                value = changed.get(name.removeprefix(f"{kind}."), values[name.removeprefix(f"{kind}.")])
                is_list = field.types[0] == gguf.GGUFValueType.ARRAY
                writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1] if is_list else None)
        for name, tensor in tensors.items():
            data = tensor.data
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with bytes_bar("cut", sum(tensor.n_bytes for tensor in tensors.values())) as advance:
            for tensor in tensors.values():
                writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
                advance(tensor.n_bytes)
        writer.close()
        digests = _compared(gguf.GGUFReader(temporary / file.name), tensors, kind, values | changed)
        if not isinstance(plan, PruningPlan):
            plan = PruningPlan(kept, sorted(set(range(count)) - set(kept)))
        plan.save(temporary / PLAN_FILE, {"proof": "bytes", "sha256": digests})
    return out


def _kept(file: Path, plan: PruningPlan | Sequence[int], count: int) -> list[int]:
    if getattr(plan, "num_layers", count) != count:
        raise ValueError(f"plan is for {getattr(plan, 'num_layers', count)} layers, {file} has {count} blocks")
    if any(getattr(plan, "sublayers", {}).values()):
        raise ValueError(f"plan removes sub-layers, which {file} cannot do without; remove whole layers")
    chosen: Any = getattr(plan, "kept", plan)
    kept = check_indices("kept", chosen, count)
    if not kept:
        raise ValueError("kept=[] keeps no layer; at least one must stay")
    return kept


def _changed(file: Path, kind: str, values: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """What the settings of `values` that speak of blocks become."""
    count = values["block_count"]
    for name, (harmless, reason) in _REFUSED.items():
        value = values.get(name, harmless)
        if not isinstance(value, list) and value != harmless:
            raise ValueError(f"{file}: {kind}.{name}={value} cannot be pruned: {reason}")
    period = 1 if isinstance(values.get("attention.sliding_window_pattern"), list) else _PERIODS.get(kind, 1)
    if odd := [old for new, old in enumerate(kept) if ((old + 1) % period == 0) != ((new + 1) % period == 0)]:
        raise ValueError(
            f"{file}: llama.cpp treats every {period}. block of {kind} differently, by its index: block {odd[0]} would "
            f"become block {kept.index(odd[0])}, which is of the other kind"
        )
    changed: dict[str, Any] = {"block_count": len(kept)}
    for name, value in values.items():
        if name in _BOUNDARIES:
            changed[name] = sum(old < value for old in kept)
        elif isinstance(value, list) and len(value) == count and not name.startswith(_NOT_PER_BLOCK):
            changed[name] = [value[old] for old in kept]
    return changed


def _moved(file: Path, name: str, places: dict[str, str], count: int) -> str | None:
    """What the tensor `name` is called afterwards; None if its block goes."""
    if (found := _BLOCK.fullmatch(name)) is None:
        if "blk." in name:
            raise ValueError(f"{file}: tensor {name} belongs to no known place")
        return name
    if int(found[1]) >= count:
        raise ValueError(f"{file}: tensor {name} lies behind the {count} blocks of the model")
    new = places.get(f"blk.{found[1]}.")
    return None if new is None else new + found[2]


def _compared(written: Any, tensors: dict[str, Any], kind: str, values: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of every tensor of a file that was read back. Raises ValueError unless it holds what it should."""
    found = {name.removeprefix(f"{kind}."): field.contents() for name, field in written.fields.items()}
    if wrong := [name for name, value in values.items() if found.get(name) != value]:
        raise ValueError(f"{wrong[0]} was not written as it should be: {found.get(wrong[0])!r}")
    read = {tensor.name: tensor for tensor in written.tensors}
    if read.keys() != tensors.keys():
        raise ValueError(f"tensors were not written as they should be: {sorted(read.keys() ^ tensors.keys())[0]}")
    digests = {}
    for name, tensor in tensors.items():
        before, after = (hashlib.sha256(each.data.data).hexdigest() for each in (tensor, read[name]))
        if before != after or tensor.shape.tolist() != read[name].shape.tolist():
            raise ValueError(f"tensor {name} was not written as it should be")
        digests[name] = after
    return digests
