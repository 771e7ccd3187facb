"""A teacher on disk: what it predicts on a text, so that training needs no teacher in memory.

A folder of safetensors shards beside a JSON manifest, and for hidden states the teacher's output head. A shard holds,
for its sequences, the tensors (rows, S − 1, ...) that `stored` describes.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.form import check_form, positive
from e3pruner.models import OutputHead, output_head
from e3pruner.models.identity import model_identity
from e3pruner.models.skipping_forward import each_last_hidden
from e3pruner.models.stack import evaluating
from e3pruner.models.vocabulary import common_vocabulary, tokenizer_size
from e3pruner.precision import autocast_dtype
from e3pruner.recovery.stored import (
    HEAD,
    HiddenStates,
    Store,
    Stored,
    Tail,
    TopK,
    check_store,
    head_settings,
    is_store,
    load_head,
    save_head,
)
from e3pruner.storage import fingerprint, locked, read_checked, remove_temporaries, write_checked, write_tensors
from e3pruner.text.batches import Batch
from e3pruner.text.given import Given, sequences_of
from e3pruner.text.sequences import Sequences

MANIFEST = "manifest.json"
KIND = "e3pruner.teacher-cache 3"
FORM = {
    "model": str,
    "tokenizer": (str, None),
    "data": str,
    "sequences": positive,
    "length": positive,
    "vocabulary": positive,
    "tokens": (int, None),
    "store": is_store,
    "batch_size": positive,
    "precision": str,
    "shard_rows": positive,
}
TOPK_FORM = {"k": positive, "temperature": float}
HIDDEN_FORM = {"head": {"softcap": (float, None), "scale": float, "weights": str}}
SHARD_TOKENS = 1 << 17
OPEN_SHARDS = 64


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    return fingerprint(tokenizer.get_vocab(), tokenizer.special_tokens_map)


def cache_bytes(sequences: int, length: int, head: OutputHead, store: Store = "topk", k: int | None = None) -> int:
    """Bytes of what is stored of `sequences` · (`length` − 1) predictions of a teacher with this output head, which
    lies beside hidden states."""
    vocabulary = head.weight.shape[0]
    manifest = {"store": store, "k": check_store(store, k, vocabulary), "vocabulary": vocabulary, "temperature": 1.0}
    beside = 0 if store == "topk" else head.weight.nbytes
    return sequences * (length - 1) * _stored(manifest, head).bytes_per_token + beside


class TeacherCache:
    """The predictions stored in `folder`, as the teacher of `distill` on the very data that they were made of.

    Raises ValueError for a folder that is damaged, unfinished or of another format, and, given one, for a `tokenizer`
    other than the teacher's. Shards are memory-mapped: reading in any order costs no more memory than a batch. Each is
    compared with its checksum when it is opened first; a damaged one raises ValueError with its name.
    `tail`: what its loss makes of the probability that is not stored, as in `e3kernels.topk_kl`.
    """

    head = None

    def __init__(
        self, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, tail: Tail = "bucket"
    ) -> None:
        if tail not in get_args(Tail):
            raise ValueError(f"tail={tail!r} must be one of {get_args(Tail)}")
        self.folder, self.tail = Path(folder), tail
        self.manifest = _read_manifest(self.folder)
        self.stored = _stored(self.manifest, self._head() if "head" in self.manifest else None, tail)
        self.vocabulary: int = self.manifest["vocabulary"]
        self.tokenizer_size: int | None = self.manifest["tokens"]
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
        if missing := [f.name for f in _shard_files(self.folder, self.manifest) if not f.exists()]:
            raise ValueError(
                f"{self.folder} is unfinished: {len(missing)} shards, {missing[0]} first; resume making it"
            )
        if tokenizer is not None and tokenizer_identity(tokenizer) != self.manifest["tokenizer"]:
            raise ValueError(f"{self.folder} was made with another tokenizer; make a cache with this one")

    @property
    def identity(self) -> str:
        return fingerprint(self.manifest, self.tail)

    def narrow(self, vocabulary: int) -> None:
        """Cut the head that hidden states go through. Raises ValueError for likeliest tokens, whose probabilities are
        normalised over the whole vocabulary."""
        if isinstance(self.stored, HiddenStates):
            self.stored = replace(self.stored, head=self.stored.head.narrowed(vocabulary))
            self.vocabulary = vocabulary
            return
        raise ValueError(
            f"{self.folder} holds predictions over {self.vocabulary} tokens; to learn from the first {vocabulary} of "
            f"them, make a cache with vocabulary={vocabulary}"
        )

    def check(self, data: Sequences, temperature: float) -> None:
        """Raises ValueError unless the cache is of `data` at `temperature`."""
        if data.identity != self.manifest["data"]:
            rows, length = self.manifest["sequences"], self.manifest["length"]
            shape = tuple(data.shape)
            raise ValueError(f"data {shape} is not what {self.folder}, {(rows, length)}, was made of")
        if self.manifest.get("temperature", temperature) != temperature:
            raise ValueError(
                f"temperature={temperature} must be that of {self.folder}, {self.manifest['temperature']}: the tail of "
                "another temperature is not stored"
            )

    def verify(self) -> None:
        """Reads everything. Raises ValueError naming the first shard whose content is not what was written."""
        self._checked.clear()
        self._open.clear()
        count = len(_shard_files(self.folder, self.manifest))
        for index in track(range(count), "verify", console=Console(stderr=True)):
            self._shard(index)

    def targets(self, batch: Batch) -> Any:
        """What is stored of the batch's rows of the data: of the likeliest tokens (log-probabilities fp32, ids int64),
        each (B, S − 1, k); or hidden states (B, S − 1, H)."""
        if batch.rows is None:
            raise ValueError(f"a batch without rows: {self.folder} finds its predictions by the number of the sequence")
        per_shard, device = self.manifest["shard_rows"], batch.input_ids.device
        rows = [(self._shard(row // per_shard), row % per_shard) for row in batch.rows.tolist()]
        with torch.autocast("cpu", enabled=False):  # which refuses to stack fp16
            parts = {
                name: torch.stack([shard.get_slice(name)[at] for shard, at in rows]).to(device)
                for name in self.stored.names
            }
        self.stored = self.stored.on(device)
        return self.stored.targets(parts)

    def loss(self, hidden: Tensor, head: OutputHead, targets: Any, labels: Tensor, **options: Any) -> Any:
        return self.stored.loss(hidden, head, targets, labels, **options)

    def _head(self) -> OutputHead:
        try:
            head = load_head(self.folder, self.manifest["head"])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / HEAD} is missing or damaged: {error}") from error
        return head.narrowed(self.manifest["vocabulary"])

    def _shard(self, index: int) -> Any:
        """A shard, whose checksum is compared when it is opened for the first time."""
        if index not in self._open:
            file = _shard_file(self.folder, index)
            try:
                shard = safe_open(file, framework="pt")
                if index not in self._checked:
                    _check_content(file, shard, self.stored.names)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is missing or damaged: {error}") from error
            self._checked.add(index)
            self._open[index] = shard
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]


def _check_content(file: Path, shard: Any, names: Iterable[str]) -> None:
    content = {name: shard.get_tensor(name) for name in names}
    if (shard.metadata() or {}).get("content") != fingerprint(content):
        raise ValueError(f"{file} is damaged: its content is not that of its checksum")


def cache_teacher(
    teacher: PreTrainedModel,
    data: Given,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    store: Store = "topk",
    k: int | None = None,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    precision: str = "auto",
    force: bool = False,
) -> TeacherCache:
    """Store what `teacher` predicts at every position of `data` in `folder`: what `distill` takes.

    store: "topk", the `k` likeliest next tokens, 10 unless told, at this `temperature`: 4 or 6 bytes each, the
    likeliest first; "hidden", the H numbers in bfloat16 that the output head is given, and the head beside them: the
    divergence over the full vocabulary at any temperature, for 2·H bytes; "hidden-int8", the same in H + 4.

    vocabulary: how many columns of the teacher's logits count, from the first on; what is behind them is cut before the
    softmax, as padding that no token uses. Unless told, the size of `tokenizer`, and without one all; a student learns
    the same ones.

    A folder in which an earlier call was cut short, even by a kill, is completed: whole shards are kept.

    Of a streamed teacher each layer is read once for as many batches as go together.

    Raises ValueError for k outside 1 … vocabulary, or beside hidden states, for predictions that are not finite, and
    for a folder whose cache is of another model, tokenizer, data or setting, naming which; FileExistsError for a folder
    that holds other files, unless `force`; OSError if the disk has too little room, before it starts.
    """
    folder = Path(folder)
    head, tokens = output_head(teacher), tokenizer_size(tokenizer)
    columns = {"teacher": head.weight.shape[0]}
    rows = sequences_of("data", data, common_vocabulary(columns, vocabulary, tokens), teacher=teacher)
    if tokens is not None and int(rows.input_ids.max()) >= tokens:
        tokens = None  # not the tokenizer of this text: it does not prove what no token uses
    if vocabulary is None and tokens is not None:
        vocabulary = min(tokens, columns["teacher"])
    vocabulary = common_vocabulary(columns, vocabulary, tokens)
    head = head.narrowed(vocabulary)
    length = rows.shape[1]
    k = check_store(store, k, vocabulary)
    dtype = autocast_dtype(precision, teacher.device)
    manifest = {
        "model": model_identity(teacher),
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer),
        "data": rows.identity,
        "sequences": len(rows),
        "length": length,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "store": store,
        **({"k": k, "temperature": temperature} if store == "topk" else {"head": head_settings(head)}),
        "batch_size": batch_size,
        "precision": str(dtype or torch.float32),
        # Whole batches, so that a resumed run computes the same ones.
        "shard_rows": max(1, SHARD_TOKENS // (length * batch_size)) * batch_size,
    }
    stored = _stored(manifest, head)
    with locked(folder):
        _start(folder, manifest, head, force)
        todo = [i for i, file in enumerate(_shard_files(folder, manifest)) if not file.exists()]
        with evaluating(teacher), torch.no_grad():
            for index in track(todo, description="cache the teacher", console=Console(stderr=True)):
                shard = torch.arange(len(rows)).split(manifest["shard_rows"])[index]
                batches = [Batch.of_rows(rows, some).to(teacher.device) for some in shard.split(batch_size)]
                content = _content(teacher, head, batches, stored, dtype)
                write_tensors(_shard_file(folder, index), content, {"content": fingerprint(content)})
    return TeacherCache(folder, tokenizer=tokenizer)


def _stored(manifest: Mapping[str, Any], head: OutputHead | None, tail: Tail = "bucket") -> Stored:
    if manifest["store"] == "topk":
        return TopK(manifest["k"], manifest["vocabulary"], manifest["temperature"], tail)
    assert head is not None  # it lies beside hidden states
    return HiddenStates(head, rounded=manifest["store"] == "hidden-int8")


def _start(folder: Path, manifest: dict[str, Any], head: OutputHead, force: bool) -> None:
    """Check `folder` and write its manifest."""
    remove_temporaries(folder)
    if (folder / MANIFEST).exists():
        stored = _read_manifest(folder)
        for name, value in manifest.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"{folder} holds a cache with {name} {stored.get(name)!r}, this one has {value!r}; choose another"
                )
        return
    if not force and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no cache; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    need = cache_bytes(manifest["sequences"], manifest["length"], head, manifest["store"], manifest.get("k"))
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(f"{folder} has room for {free:,} bytes, the cache needs {need:,}")
    if "head" in manifest:
        save_head(folder, head)
    write_checked(folder / MANIFEST, KIND, manifest)


def _content(
    teacher: PreTrainedModel, head: OutputHead, batches: Sequence[Batch], stored: Stored, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """What a shard holds of `batches`."""
    # Autocast on a CPU refuses to stack fp16: it is for the model only.
    autocast = torch.autocast(teacher.device.type, dtype, enabled=dtype is not None)
    coming, parts = each_last_hidden(teacher, [batch.inputs for batch in batches]), []
    for _ in batches:
        with autocast:
            hidden = next(coming)[:, :-1]
        parts.append(stored.of(hidden, head, autocast))
    return {name: torch.cat([part[name] for part in parts]) for name in stored.names}


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = read_checked(file, KIND, FORM)
        check_form(file, manifest, TOPK_FORM if manifest["store"] == "topk" else HIDDEN_FORM)
        return manifest
    except OSError as error:
        raise ValueError(f"{file} is missing ({error}); {folder} is no teacher cache") from error
    except ValueError as error:
        raise ValueError(f"{error}; {folder} is no teacher cache") from error


def _shard_file(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def _shard_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    count = -(-manifest["sequences"] // manifest["shard_rows"])
    return [_shard_file(folder, index) for index in range(count)]
