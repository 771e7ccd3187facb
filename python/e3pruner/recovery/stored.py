"""What a teacher cache holds of each position: the likeliest next tokens, or what the output head is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

import e3kernels as e3k
from e3pruner.models import OutputHead
from e3pruner.storage import fingerprint, write_tensors

Store = Literal["topk", "hidden", "hidden-int8"]
Tail = Literal["bucket", "renorm", "truncated"]
DEFAULT_K = 10
HEAD = "head.safetensors"


class Stored(Protocol):
    """`names`: of the tensors of a shard, each (rows, S − 1, ...). `bytes_per_token`: of them."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def bytes_per_token(self) -> int: ...

    def on(self, device: torch.device) -> Stored:
        """With what it needs beside the targets on `device`."""

    def of(self, hidden: Tensor, head: OutputHead, autocast: torch.autocast) -> dict[str, Tensor]:
        """What is kept of a batch, from the teacher's last hidden states (B, S − 1, H) and its head."""

    def targets(self, parts: Mapping[str, Tensor]) -> Any:
        """What `loss` takes, from what was kept of a batch."""

    def loss(self, hidden: Tensor, head: OutputHead, targets: Any, labels: Tensor, **options: Any) -> Any:
        """See `Teacher.loss`."""


@dataclass(frozen=True)
class TopK:
    """The `k` likeliest tokens of `vocabulary`: `ids` and `logprobs` (..., k), fp16, likeliest first. Their rounding
    changes a probability by less than 0.05 % of |log p|; what is missing to 1 is the `tail` of `e3kernels.topk_kl`.
    """

    k: int
    vocabulary: int
    temperature: float
    tail: Tail = "bucket"

    @property
    def names(self) -> tuple[str, ...]:
        return "ids", "logprobs"

    @property
    def bytes_per_token(self) -> int:
        return self.k * (torch.float16.itemsize + self._id_dtype.itemsize)

    def on(self, device: torch.device) -> TopK:
        return self

    def of(self, hidden: Tensor, head: OutputHead, autocast: torch.autocast) -> dict[str, Tensor]:
        logprobs, ids = [], []
        for sequence in hidden:  # one at a time: (S − 1, V) logits are all that is ever materialised
            with autocast:
                logits = head.logits(sequence).float() / self.temperature
            if not logits.isfinite().all():
                raise ValueError("teacher: its logits hold NaN or infinity; nothing can be learnt from them")
            values, indices = logits.log_softmax(-1).topk(self.k)
            # What fp16 would round to −∞ would be padding, and no longer count among the entries that a row holds.
            logprobs.append(values.clamp(min=torch.finfo(torch.float16).min).half().cpu())
            ids.append(indices.cpu())
        return {"logprobs": torch.stack(logprobs), "ids": torch.stack(ids).to(self._id_dtype)}

    def targets(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parts["logprobs"].float(), parts["ids"].to(torch.int64)

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

    @property
    def _id_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states h (..., H) that `head`, the teacher's, is given: the divergence is over the full vocabulary, at
    any temperature. In bfloat16; or, `rounded`, as int8 with scales (..., 1), fp32: h ≈ scale·q, scale = max|h| / 127.
    """

    head: OutputHead
    rounded: bool

    @property
    def names(self) -> tuple[str, ...]:
        return ("hidden", "scales") if self.rounded else ("hidden",)

    @property
    def bytes_per_token(self) -> int:
        width = self.head.weight.shape[1]
        return width + torch.float32.itemsize if self.rounded else width * torch.bfloat16.itemsize

    def on(self, device: torch.device) -> HiddenStates:
        weight, bias = self.head.weight, self.head.bias
        if weight.device == device:
            return self
        bias = None if bias is None else bias.to(device)
        return replace(self, head=replace(self.head, weight=weight.to(device), bias=bias))

    def of(self, hidden: Tensor, head: OutputHead, autocast: torch.autocast) -> dict[str, Tensor]:
        if not hidden.isfinite().all():
            raise ValueError("teacher: its hidden states hold NaN or infinity; nothing can be learnt from them")
        if not self.rounded:
            return {"hidden": hidden.to("cpu", torch.bfloat16)}
        own = hidden.float()
        scales = own.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return {"hidden": (own / scales).round().to("cpu", torch.int8), "scales": scales.cpu()}

    def targets(self, parts: Mapping[str, Tensor]) -> Tensor:
        hidden = parts["hidden"].to(self.head.weight.dtype)
        return parts["scales"].to(hidden.dtype) * hidden if self.rounded else hidden

    def loss(self, hidden: Tensor, head: OutputHead, targets: Tensor, labels: Tensor, **options: Any) -> Any:
        both = head.arguments("student") | self.head.arguments("teacher")
        return e3k.linear_entropy_kl(student_hidden=hidden, teacher_hidden=targets, labels=labels, **both, **options)


def is_store(value: Any) -> bool:
    """Whether it is the name of a `Store`."""
    return value in get_args(Store)


def check_store(store: str, k: int | None, vocabulary: int) -> int | None:
    """The `k` that `store` has: 10 unless given, None for hidden states. Raises ValueError for what does not fit."""
    if not is_store(store):
        raise ValueError(f"store={store!r} must be one of {', '.join(get_args(Store))}")
    if store != "topk":
        if k is not None:
            raise ValueError(f"k={k} is of store='topk'; store={store!r} keeps the whole vocabulary")
        return None
    k = DEFAULT_K if k is None else k
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k={k} must be in 1 … {vocabulary}")
    return k


def head_settings(head: OutputHead) -> dict[str, Any]:
    """What of `head` stands in a manifest; its weights are a file of their own."""
    return {"softcap": head.softcap, "scale": head.scale, "weights": fingerprint(_tensors(head))}


def save_head(folder: Path, head: OutputHead) -> None:
    write_tensors(folder / HEAD, _tensors(head), {})


def load_head(folder: Path, settings: Mapping[str, Any]) -> OutputHead:
    """The head in `folder`, mapped. Raises ValueError where it is not the one that `settings` speak of."""
    tensors = load_file(folder / HEAD)
    if fingerprint(tensors) != settings["weights"]:
        raise ValueError(f"{folder / HEAD} is damaged: its content is not that of its checksum")
    return OutputHead(tensors["weight"], tensors.get("bias"), settings["softcap"], settings["scale"])


def _tensors(head: OutputHead) -> dict[str, Tensor]:
    named = {"weight": head.weight, "bias": head.bias}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None}
