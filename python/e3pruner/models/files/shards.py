"""The safetensors files of a checkpoint folder, by their headers alone.

The format: the header's length as eight bytes, little-endian; the header, JSON; the bytes of the tensors, one after
another, at the offsets that the header gives (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3pruner.storage import parse_json, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_HEADER = 100 << 20  # bytes; the library refuses more


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its `entry` of the header (dtype, shape), and its bytes `begin` … `end` of the file."""

    file: Path
    entry: Mapping[str, Any]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    @property
    def itemsize(self) -> float:
        shape: list[int] = self.entry["shape"]
        return self.size / max(1, math.prod(shape))


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors by name, in the order of their bytes, and the header's own metadata."""

    file: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> Shard:
        """Raises ValueError naming a file that is damaged."""
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                size = os.fstat(opened.fileno()).st_size
                if not 2 <= length <= min(_MOST_HEADER, size - 8):
                    raise ValueError(f"its header cannot have {length} bytes")
                header = parse_json(opened.read(length).decode())
            metadata = header.pop("__metadata__", {})
            tensors = {
                name: Stored(
                    file, {"dtype": entry["dtype"], "shape": entry["shape"]}, *(8 + length + o for o in offsets)
                )
                for name, entry in header.items()
                for offsets in (entry["data_offsets"],)
            }
            if any(not 8 + length <= each.begin <= each.end <= size for each in tensors.values()):
                raise ValueError("tensors lie beyond its end")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from error
        return cls(file, dict(sorted(tensors.items(), key=lambda item: item[1].begin)), metadata)


def read_shards(folder: Path) -> list[Shard]:
    """The weights of a checkpoint folder: one file, or those that its index names, with what the index names of each.

    Raises FileNotFoundError for a folder without, ValueError for an index or a file that is damaged.
    """
    if (single := folder / WEIGHTS).is_file():
        return [Shard.read(single)]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}: only safetensors are cut as files; load the model and save "
            "it again with save_pretrained"
        )
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise ValueError(f"{folder / INDEX} is damaged: its weight_map does not name files by tensor")
    shards = []
    for file in sorted(set(files.values())):
        shard = Shard.read(folder / file)
        named = {name for name, where in files.items() if where == file}
        if missing := sorted(named - shard.tensors.keys()):
            raise ValueError(f"{folder / INDEX} names {missing[0]} in {file}, which has no such tensor")
        shards.append(Shard(shard.file, {n: t for n, t in shard.tensors.items() if n in named}, shard.metadata))
    return shards
