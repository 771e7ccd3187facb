"""Decoder layers that are brought to where they are computed when they are called, and leave again.

Their weights stay mapped from the checkpoint's files: the system keeps of them what fits and drops it when memory is
wanted. A layer's copy, in another dtype or on another device, exists from just before its call until two layers later;
where neither differs there is no copy at all, and the next layer's pages are asked for while this one computes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3pruner.models.files.shards import read_shards
from e3pruner.models.stack import find_layers, stack_name
from e3pruner.precision import weights_in

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # of safetensors
_STREAMS: WeakKeyDictionary[nn.Module, Stream] = WeakKeyDictionary()


class Stream:
    """Brings the layers of `model`, whose weights are mapped from files, to `device` in `dtype` as they are called.

    dtype: None keeps the weights' own. `reads` counts how often the weights of each layer were brought.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self.layers = find_layers(model)
        self.reads = [0] * len(self.layers)
        self._home = [{name: p.data for name, p in layer.named_parameters()} for layer in self.layers]
        self._here: dict[int, dict[str, Tensor]] = {}
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="e3 stream")
        for index, layer in enumerate(self.layers):
            for buffer in layer.buffers():
                buffer.data = buffer.data.to(device)
            layer.forward = partial(self._run, index, layer.forward)
        _STREAMS[self.layers] = self

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside the block layers come in `dtype`."""
        before = self.dtype
        self._leave()
        self.dtype = dtype
        try:
            yield
        finally:
            self._leave()
            self.dtype = before

    def _leave(self) -> None:
        """Puts every layer back."""
        for index in [*self._here]:
            self._place(index, self._home[index])
        self._here.clear()
        self._coming.clear()

    def _run(self, index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._bring(index)
        if index + 1 < len(self.layers) and index + 1 not in self._here and index + 1 not in self._coming:
            self._coming[index + 1] = self._reader.submit(self._copy, index + 1)
        return own(*args, **kwargs)

    def _bring(self, index: int) -> None:
        """Puts the weights of one layer in place, and those that were there before the last one back."""
        if index in self._here:
            return
        coming = self._coming.pop(index, None)
        self._here[index] = self._copy(index) if coming is None else coming.result()
        self.reads[index] += 1
        self._place(index, self._here[index])
        for other in [each for each in self._here if each != index]:
            self._place(other, self._home[other])
            del self._here[other]

    def _place(self, index: int, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.layers[index].named_parameters():
            parameter.data = weights[name]

    def _copy(self, index: int) -> dict[str, Tensor]:
        return {name: self._moved(weight) for name, weight in self._home[index].items()}

    def _moved(self, weight: Tensor) -> Tensor:
        if weight.is_floating_point() and self.dtype is not None and weight.dtype != self.dtype:
            return weight.to(self.device, self.dtype)
        if self.device.type == "cpu":
            _ask_for(weight)
            return weight
        return weight.pin_memory().to(self.device, non_blocking=True)


def stream(
    model: PreTrainedModel, folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """`model` as it was loaded on the CPU from `folder`: its layers are streamed, everything else moves to `device` in
    `dtype` (None: its own).

    Raises `ValueError` where the folder does not hold the layers' weights as the model does: they are in memory then.
    """
    _check_mapped(model, folder)
    prefix = stack_name(model) + "."
    Stream(model, device, dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(prefix):
            wanted = dtype if tensor.is_floating_point() and isinstance(tensor, nn.Parameter) else None
            tensor.data = tensor.data.to(device, wanted)
    return model


@contextmanager
def computing_in(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block the weights of `model` are rounded to `dtype` (None: they are not); then they are as before.

    Of streamed layers the copies are: nothing that lies in files is read for it.
    """
    streamed = stream_of(model)
    prefix = stack_name(model) + "."
    with ExitStack() as stack:
        here = (p for name, p in model.named_parameters() if streamed is None or not name.startswith(prefix))
        stack.enter_context(weights_in(here, dtype))
        if streamed is not None and dtype is not None:
            stack.enter_context(streamed.computing_in(dtype))
        yield


def stream_of(model: PreTrainedModel) -> Stream | None:
    """The stream that brings the layers of `model`, if they are streamed."""
    return _STREAMS.get(find_layers(model))


def check_resident(name: str, model: nn.Module, what: str) -> None:
    """Raises `ValueError` naming `name` for streamed layers, where `what` is done: autograd loses weights that are
    exchanged between the passes, and what is written to a copy leaves with it.
    """
    if any(module in _STREAMS for module in model.modules()):
        raise ValueError(
            f"{name} ({type(model).__name__}) is streamed from its files, which forward passes, search and evaluate "
            f"take; {what} placement='whole'"
        )


def _check_mapped(model: PreTrainedModel, folder: Path) -> None:
    stored = {name: tensor.entry for shard in read_shards(folder) for name, tensor in shard.tensors.items()}
    prefix = stack_name(model) + "."
    for name, parameter in model.named_parameters():
        wanted = {"dtype": _NAMES.get(parameter.dtype), "shape": list(parameter.shape)}
        if name.startswith(prefix) and stored.get(name) != wanted:
            raise ValueError(
                f"placement='stream': {folder} does not hold {name} as the model does ({wanted}), but "
                + (
                    f"as {dict(stored[name])}; save it once with save_pretrained in the model's dtype and stream that"
                    if name in stored
                    else "makes it of tensors of other names; placement='whole' loads it"
                )
            )


def _ask_for(weight: Tensor) -> None:
    """Tells the system that the pages of `weight`, mapped from a file, are needed soon."""
    if (advise := _madvise()) is not None and weight.is_contiguous():
        start = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, weight.data_ptr() + weight.nbytes - start, mmap.MADV_WILLNEED)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if os.name != "posix" or not hasattr(mmap, "MADV_WILLNEED"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function  # type: ignore[no-any-return]
