"""A teacher on disk: its top-k log-probabilities of a text, so that training needs no teacher in memory.

A folder of safetensors shards beside a JSON manifest. A shard holds, for its sequences, `ids` (rows, S − 1, k) and
`logprobs` (rows, S − 1, k) in fp16, likeliest first: with k = 10 and a vocabulary above 65,536 tokens 60 bytes per
token, below it 40. Their rounding changes a probability by less than 0.05 % of |log p|; what is missing to 1 is the
tail, which `e3kernels.linear_topk_kl` treats as one event.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import e3kernels as e3k
from e3pruner.form import positive
from e3pruner.models import OutputHead, last_hidden, output_head
from e3pruner.models.identity import model_identity
from e3pruner.models.stack import evaluating
from e3pruner.models.vocabulary import common_vocabulary, tokenizer_size
from e3pruner.precision import autocast_dtype
from e3pruner.storage import fingerprint, locked, read_checked, remove_temporaries, write_checked, write_tensors
from e3pruner.text.batches import Batch
from e3pruner.text.given import Given, sequences_of
from e3pruner.text.sequences import Sequences

Tail = Literal["bucket", "renorm", "truncated"]
MANIFEST = "manifest.json"
KIND = "e3pruner.teacher-cache 2"
FORM = {
    "model": str,
    "tokenizer": (str, None),
    "data": str,
    "sequences": positive,
    "length": positive,
    "vocabulary": positive,
    "tokens": (int, None),
    "k": positive,
    "temperature": float,
    "batch_size": positive,
    "precision": str,
    "shard_rows": positive,
}
SHARD_TOKENS = 1 << 17
OPEN_SHARDS = 64


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    return fingerprint(tokenizer.get_vocab(), tokenizer.special_tokens_map)


def cache_bytes(sequences: int, length: int, vocabulary: int, k: int = 10) -> int:
    """Bytes of the log-probabilities and ids of `sequences` · (`length` − 1) predictions."""
    return sequences * (length - 1) * k * (torch.float16.itemsize + _id_dtype(vocabulary).itemsize)


def _id_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32


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
        """Raises ValueError: what is stored is normalised over all of its vocabulary."""
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
        if temperature != self.manifest["temperature"]:
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

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(log-probabilities fp32, ids int64), each (B, S − 1, k), of the batch's rows of the data."""
        if batch.rows is None:
            raise ValueError(f"a batch without rows: {self.folder} finds its predictions by the number of the sequence")
        per_shard = self.manifest["shard_rows"]
        logprobs, ids = [], []
        for row in batch.rows.tolist():
            shard, at = self._shard(row // per_shard), row % per_shard
            # Autocast on a CPU refuses to join fp16.
            logprobs.append(shard.get_slice("logprobs")[at : at + 1].float())
            ids.append(shard.get_slice("ids")[at : at + 1])
        device = batch.input_ids.device
        return torch.cat(logprobs).to(device), torch.cat(ids).to(device, torch.int64)

    def loss(
        self, hidden: Tensor, head: OutputHead, targets: tuple[Tensor, Tensor], labels: Tensor, **options: Any
    ) -> Any:
        logprobs, ids = targets
        return e3k.linear_topk_kl(
            student_hidden=hidden,
            teacher_logprobs=logprobs,
            teacher_ids=ids,
            labels=labels,
            tail=self.tail,
            **head.arguments("student"),
            **options,
        )

    def _shard(self, index: int) -> Any:
        """A shard, whose checksum is compared when it is opened for the first time."""
        if index not in self._open:
            file = _shard_file(self.folder, index)
            try:
                shard = safe_open(file, framework="pt")
                if index not in self._checked:
                    _check_content(file, shard)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is missing or damaged: {error}") from error
            self._checked.add(index)
            self._open[index] = shard
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]


def _check_content(file: Path, shard: Any) -> None:
    content = {name: shard.get_tensor(name) for name in ("ids", "logprobs")}
    if (shard.metadata() or {}).get("content") != fingerprint(content):
        raise ValueError(f"{file} is damaged: its content is not that of its checksum")


def cache_teacher(
    teacher: PreTrainedModel,
    data: Given,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    k: int = 10,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    precision: str = "auto",
    force: bool = False,
) -> TeacherCache:
    """Store the `k` likeliest next tokens of every position of `data` in `folder`: what `distill` takes.

    vocabulary: how many columns of the teacher's logits count, from the first on; what is behind them is cut before the
    softmax, as padding that no token uses. Unless told, the size of `tokenizer`, and without one all; a student learns
    the same ones.

    A folder in which an earlier call was cut short, even by a kill, is completed: whole shards are kept.

    Raises ValueError for k outside 1 … vocabulary, for logits that are not finite, and for a folder whose cache is of
    another model, tokenizer, data or setting, naming which; FileExistsError for a folder that holds other files, unless
    `force`; OSError if the disk has too little room, before it starts.
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
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k={k} must be in 1 … {vocabulary}")
    dtype = autocast_dtype(precision, teacher.device)
    manifest = {
        "model": model_identity(teacher),
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer),
        "data": rows.identity,
        "sequences": len(rows),
        "length": length,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "k": k,
        "temperature": temperature,
        "batch_size": batch_size,
        "precision": str(dtype or torch.float32),
        # Whole batches, so that a resumed run computes the same ones.
        "shard_rows": max(1, SHARD_TOKENS // (length * batch_size)) * batch_size,
    }
    with locked(folder):
        _start(folder, manifest, force)
        todo = [i for i, file in enumerate(_shard_files(folder, manifest)) if not file.exists()]
        with evaluating(teacher), torch.no_grad():
            for index in track(todo, description="cache the teacher", console=Console(stderr=True)):
                shard = torch.arange(len(rows)).split(manifest["shard_rows"])[index]
                batches = (Batch.of_rows(rows, some).to(teacher.device) for some in shard.split(batch_size))
                parts = [_top(teacher, head, batch, k, temperature, dtype) for batch in batches]
                logprobs, ids = (torch.cat(column) for column in zip(*parts, strict=True))
                content = {"logprobs": logprobs, "ids": ids.to(_id_dtype(vocabulary))}
                write_tensors(_shard_file(folder, index), content, {"content": fingerprint(content)})
    return TeacherCache(folder, tokenizer=tokenizer)


def _start(folder: Path, manifest: dict[str, Any], force: bool) -> None:
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
    need = cache_bytes(manifest["sequences"], manifest["length"], manifest["vocabulary"], manifest["k"])
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(f"{folder} has room for {free:,} bytes, the cache needs {need:,}")
    write_checked(folder / MANIFEST, KIND, manifest)


def _top(
    teacher: PreTrainedModel, head: OutputHead, batch: Batch, k: int, temperature: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    # Autocast on a CPU refuses to stack fp16: it is for the model only.
    autocast = torch.autocast(teacher.device.type, dtype, enabled=dtype is not None)
    with autocast:
        hidden = last_hidden(teacher, **batch.inputs)[:, :-1]
    logprobs, ids = [], []
    for sequence in hidden:  # one at a time: (S − 1, V) logits are all that is ever materialised
        with autocast:
            logits = head.logits(sequence).float() / temperature
        if not logits.isfinite().all():
            raise ValueError("teacher: its logits hold NaN or infinity; nothing can be learnt from them")
        values, indices = logits.log_softmax(-1).topk(k)
        # What fp16 would round to −∞ would be padding, and no longer count among the entries that a row holds.
        logprobs.append(values.clamp(min=torch.finfo(torch.float16).min).half().cpu())
        ids.append(indices.cpu())
    return torch.stack(logprobs), torch.stack(ids)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        return read_checked(file, KIND, FORM)
    except OSError as error:
        raise ValueError(f"{file} is missing ({error}); {folder} is no teacher cache") from error
    except ValueError as error:
        raise ValueError(f"{error}; {folder} is no teacher cache") from error


def _shard_file(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def _shard_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    count = -(-manifest["sequences"] // manifest["shard_rows"])
    return [_shard_file(folder, index) for index in range(count)]
