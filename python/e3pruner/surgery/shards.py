"""Safetensors files rewritten without being read into memory: new headers, the bytes of tensors copied as they are."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3pruner.models.files.shards import INDEX, WEIGHTS, Shard, Stored
from e3pruner.storage import write_json

_CHUNK = 4 << 20  # bytes of a tensor in memory at a time, per thread


@dataclass(frozen=True)
class Packed(Stored):
    """Of a stored tensor that holds blocks of `block` bytes, `total` in turn, those whose number is in `kept`; `entry`
    has their shape."""

    block: int
    total: int
    kept: frozenset[int]

    @classmethod
    def of(cls, tensor: Stored, shape: Sequence[int], axis: int, total: int, kept: Iterable[int]) -> Packed:
        """Of `tensor`, which holds a block for each of `total` layers along `axis`, what is left in `shape`."""
        outer = total * math.prod(tensor.entry["shape"][:axis])
        entry = {**tensor.entry, "shape": list(shape)}
        return cls(
            tensor.file, entry, tensor.begin, tensor.end, (tensor.end - tensor.begin) // outer, total, frozenset(kept)
        )

    @property
    def size(self) -> int:
        return (self.end - self.begin) // self.total * len(self.kept)


def write_shards(
    folder: Path,
    shards: list[Shard],
    *,
    zeros: Callable[[str], bool] = lambda name: False,
    advance: Callable[[int], None] = lambda count: None,
    index: bool = True,
) -> dict[str, str]:
    """Writes `shards` into `folder`, and with `index` an index where there are several; those without tensors are left
    out.

    The bytes of each tensor are those of the file it is stored in, of a `Packed` one some of them, or 0 where `zeros`
    says so. `advance` is told how many bytes were written. Returns the SHA-256 of each tensor's bytes, taken as they
    are copied.
    """
    shards = [shard for shard in shards if shard.tensors]
    digests: dict[str, str] = {}
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = _renumbered(shard.file.name, number, len(shards))
        digests |= _write(folder / name, shard, zeros, advance)
        files |= dict.fromkeys(shard.tensors, name)
    if index and (len(shards) > 1 or shards[0].file.name != WEIGHTS):
        total = sum(tensor.size for shard in shards for tensor in shard.tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    return digests


def _renumbered(name: str, number: int, count: int) -> str:
    """`model-00003-of-00007.safetensors` as one of `count` files; other names stay."""
    return re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", f"-{number:05}-of-{count:05}", name)


def _write(file: Path, shard: Shard, zeros: Callable[[str], bool], advance: Callable[[int], None]) -> dict[str, str]:
    # Wide items first, as the library has it: every tensor then begins at a multiple of its item's size.
    order = sorted(shard.tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    offset = 0
    for name, tensor in order:
        header[name] = {**tensor.entry, "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with ExitStack() as stack:
        target = stack.enter_context(file.open("xb"))
        target.write(len(text).to_bytes(8, "little") + text)
        target.flush()
        os.truncate(target.fileno(), start + offset)
        threads = stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count() or 1)))
        sources = {source: stack.enter_context(source.open("rb")) for source in {t.file for _, t in order}}

        def written(item: tuple[str, Stored]) -> str:
            name, tensor = item
            to = start + header[name]["data_offsets"][0]
            digest = hashlib.sha256()
            source = sources[tensor.file].fileno()
            for chunk in _zeros(tensor) if zeros(name) else _copied(source, target.fileno(), tensor, to):
                digest.update(chunk)
                advance(len(chunk))
            return digest.hexdigest()

        return dict(zip([name for name, _ in order], threads.map(written, order), strict=True))


def _zeros(tensor: Stored) -> Iterator[bytes]:
    """The bytes of a tensor of zeros; the file has them already."""
    for begin in range(0, tensor.size, _CHUNK):
        yield bytes(min(_CHUNK, tensor.size - begin))


def _copied(source: int, target: int, tensor: Stored, to: int) -> Iterator[bytes]:
    """The bytes of `tensor`, each chunk once it stands in `target`, from `to` on."""
    if isinstance(tensor, Packed):
        yield from _picked(source, target, tensor, to)
        return
    for begin in range(tensor.begin, tensor.end, _CHUNK):
        size = min(_CHUNK, tensor.end - begin)
        place = to + begin - tensor.begin
        chunk = _read(source, size, begin, tensor)
        if not _copied_by_system(source, target, size, begin, place):
            _put(target, chunk, place)
        yield chunk


def _picked(source: int, target: int, tensor: Packed, to: int) -> Iterator[bytes]:
    """The same of the blocks that stay."""
    at_once = max(1, _CHUNK // tensor.block)
    for first in range(0, (tensor.end - tensor.begin) // tensor.block, at_once):
        begin = tensor.begin + first * tensor.block
        chunk = _read(source, min(at_once * tensor.block, tensor.end - begin), begin, tensor)
        blocks = (chunk[at : at + tensor.block] for at in range(0, len(chunk), tensor.block))
        left = b"".join(block for number, block in enumerate(blocks, first) if number % tensor.total in tensor.kept)
        _put(target, left, to)
        to += len(left)
        yield left


def _read(source: int, size: int, begin: int, tensor: Stored) -> bytes:
    chunk = os.pread(source, size, begin)
    if len(chunk) != size:
        raise OSError(f"{tensor.file} ended while it was read")
    return chunk


def _put(target: int, chunk: bytes, place: int) -> None:
    written = 0
    while written < len(chunk):
        written += os.pwrite(target, memoryview(chunk)[written:], place + written)


def _copied_by_system(source: int, target: int, size: int, begin: int, place: int) -> bool:
    """Whether the file system copied, or shares, the bytes by itself; where it cannot nothing is lost by asking."""
    if not hasattr(os, "copy_file_range"):
        return False
    done = 0
    try:
        while done < size:
            if not (count := os.copy_file_range(source, target, size - done, begin + done, place + done)):
                return False
            done += count
    except OSError:
        return False
    return True
