"""Models whose decoder layers are read from their checkpoint when they are called, and leave again.

Weights stay mapped from the files: the system keeps of them what fits and drops it when memory is wanted. A layer has
its weights from just before its call until the next one's: mapped, where the checkpoint has them as the model does,
else made of what it has (experts that it stores one by one, quantised ones, another dtype or device). The next layer
is read while this one computes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from e3pruner.compat import fill, quantizer_of, without_progress
from e3pruner.models.files.empty import check_complete, empty_model, read_config
from e3pruner.models.files.names import TensorNames
from e3pruner.models.files.shards import Shard, read_shards
from e3pruner.models.stack import find_layers, stack_name
from e3pruner.precision import weights_in

Leaves = dict[tuple[nn.Module, str], nn.Parameter | Tensor]  # of a layer: parameters and buffers, by where they are
_STREAMS: WeakKeyDictionary[nn.Module, Stream] = WeakKeyDictionary()


class Stream:
    """Brings the layers of `model`, whose parameters are on the meta device, to `device` as they are called.

    parts: of each layer, the tensors of the checkpoint that make it, by their names there. quantizer: what reads them,
    if they are quantised. `reads` counts how often each layer was brought.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Mapping[int, Mapping[str, Any]],
        device: torch.device,
        quantizer: Any = None,
    ) -> None:
        self.model, self.device = model, device
        self.dtype: torch.dtype | None = None  # the model's
        self.layers = find_layers(model)
        self.reads = [0] * len(self.layers)
        self._parts, self._quantizer = parts, quantizer
        self._absent = [_leaves(layer) for layer in self.layers]
        self._here: dict[int, Leaves] = {}
        self._coming: dict[int, Future[Leaves]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="e3 stream")
        for index, layer in enumerate(self.layers):
            for buffer in (each for each in layer.buffers() if not each.is_meta):
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

    def weights(self, index: int) -> Leaves:
        """The parameters and buffers of one layer in the model's dtype, on the CPU."""
        self._leave()
        return self._read(index)

    def _read(self, index: int) -> Leaves:
        """The same; they are mapped where the checkpoint has them as the model does."""
        with without_progress():
            fill(self.model, self._parts[index], self.model.dtype, self._quantizer)
        found = _leaves(self.layers[index])
        self._place(self._absent[index])
        _check_filled(self.model, found)
        return found

    def _leave(self) -> None:
        """Puts every layer back."""
        for index in [*self._coming]:
            self._coming.pop(index).result()
        for index in [*self._here]:
            self._place(self._absent[index])
        self._here.clear()

    def _run(self, index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._bring(index)
        following = index + 1
        for skipped in self._coming.keys() - {following}:
            del self._coming[skipped]
        # The names of a model's tensors are asked for as it is read, at which bitsandbytes unpacks those that run.
        if self._quantizer is None and following < len(self.layers) and following not in (*self._here, *self._coming):
            self._coming[following] = self._reader.submit(self._copy, following)
        return own(*args, **kwargs)

    def _bring(self, index: int) -> None:
        """Puts the weights of one layer in place, and lets those go that were there before."""
        if index in self._here:
            return
        coming = self._coming.pop(index, None)
        self._here[index] = self._reader.submit(self._copy, index).result() if coming is None else coming.result()
        self.reads[index] += 1
        self._place(self._here[index])
        for other in [each for each in self._here if each != index]:
            self._place(self._absent[other])
            del self._here[other]

    def _place(self, leaves: Leaves) -> None:
        for (module, name), tensor in leaves.items():
            held = module._parameters if name in module._parameters else module._buffers
            held[name] = tensor  # type: ignore[assignment]

    @torch.no_grad()
    def _copy(self, index: int) -> Leaves:
        return {place: self._moved(tensor) for place, tensor in self._read(index).items()}

    def _moved(self, weight: nn.Parameter | Tensor) -> nn.Parameter | Tensor:
        kept = self.dtype is None or not isinstance(weight, nn.Parameter) or not weight.is_floating_point()
        dtype = weight.dtype if kept or self._quantizer is not None else self.dtype
        if dtype == weight.dtype and self.device == weight.device:
            _ask_for(weight)
            return weight
        pinned = weight.data.pin_memory() if self.device.type == "cuda" and dtype == weight.dtype else weight.data
        moved = pinned.to(self.device, dtype, non_blocking=True)
        return nn.Parameter(moved, requires_grad=False) if isinstance(weight, nn.Parameter) else moved


def streamed_model(
    folder: Path,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint `folder`, in evaluation mode: its layers are streamed to `device`, the CPU unless told,
    and everything else is there, in `dtype` (None: the checkpoint's).

    It is of the class that the checkpoint was saved from. Its layers' parameters are on the meta device except while
    they are called. Raises what transformers raises where it cannot read quantised weights here (see `quantizer_of`);
    ValueError for a checkpoint that lacks tensors, by name.
    """
    device = device or torch.device("cpu")
    config, shards = read_config(folder, trust_remote_code), read_shards(folder)
    quantizer = quantizer_of(config)
    if dtype is not None and quantizer is None:
        config.dtype = dtype  # but for what transformers keeps in fp32 beside it
    model = empty_model(config, trust_remote_code)
    check_complete(folder, model, shards)
    if quantizer is not None:
        quantizer.preprocess_model(
            model=model,
            dtype=model.dtype,
            device_map={"": "cpu"},
            checkpoint_files=[str(shard.file) for shard in shards],
            use_kernels=False,
        )
    parts = _by_layer(TensorNames(model, quantizer), shards)
    with without_progress():
        fill(model, parts.pop(None), model.dtype, quantizer)
    model.tie_weights()
    inside = set(find_layers(model).modules())
    _check_filled(model, {place: leaf for place, leaf in _leaves(model).items() if place[0] not in inside})
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    Stream(model, {layer: part for layer, part in parts.items() if layer is not None}, device, quantizer)
    for (module, _), tensor in _leaves(model).items():
        if module not in inside:
            tensor.data = tensor.data.to(device)
    return model


def _by_layer(names: TensorNames, shards: Sequence[Shard]) -> dict[int | None, dict[str, Any]]:
    """Slices of the tensors in `shards` by name, those of each layer together and those of none; what layers share, and
    the checkpoint has once, in each of them. What lies behind the last layer (multi-token prediction) is of a layer
    that the model does not have."""
    parts: dict[int | None, dict[str, Any]] = {layer: {} for layer in (None, *range(names.num_layers))}
    shared = _shared(names)
    for shard in shards:
        opened = safe_open(shard.file, framework="pt")
        for name in sorted(shard.tensors):
            at, content = names.layer_of(name), opened.get_slice(name)
            parts.setdefault(at.layer if at else None, {})[name] = content
            if at is not None:
                for layer in shared.get(names.in_model(name), ()):
                    parts[layer].setdefault(names.moved(at, layer), content)
    return parts


def _shared(names: TensorNames) -> dict[str, set[int]]:
    """By the name of each parameter of a layer that others have too: which layers do."""
    groups: dict[int, list[str]] = {}
    for name, parameter in names.model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    several = [group for group in groups.values() if len(group) > 1]
    return {name: {at.layer for each in group if (at := names.layer_of(each))} for group in several for name in group}


def named_weights(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The parameters and buffers of `model` by name, in parts: everything at once, or of a streamed model, as its
    checkpoint has them, a layer at a time."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    if (streamed := stream_of(model)) is None:
        yield tensors
        return
    prefix, names = f"{stack_name(model)}.", {module: name for name, module in model.named_modules()}
    yield {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    for index in range(len(streamed.layers)):
        yield {f"{names[module]}.{name}": leaf for (module, name), leaf in streamed.weights(index).items()}


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


def _leaves(module: nn.Module) -> Leaves:
    """The parameters and buffers of `module` and of all that is in it, by the module that holds each and its name."""
    return {
        (each, name): tensor
        for each in module.modules()
        for name, tensor in (*each._parameters.items(), *each._buffers.items())
        if tensor is not None
    }


def _check_filled(model: PreTrainedModel, leaves: Leaves) -> None:
    for (module, name), leaf in leaves.items():
        if leaf.is_meta:
            owner = next(path for path, each in model.named_modules() if each is module)
            raise ValueError(f"model ({model.config.model_type}): its checkpoint lacks {owner}.{name}")


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
