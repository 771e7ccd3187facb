"""Gate or skip decoder layers of a model in place, by hooks: no module is wrapped, no parameter is renamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

import e3kernels
from e3pruner.compat import CACHE, CACHE_NAMES
from e3pruner.models.layer_calls import entries, replaced, route_of
from e3pruner.models.stack import check_indices, find_layers
from e3pruner.models.sublayers import KINDS, check_sublayers, scaled, silenced, writer


@contextmanager
def gated(model: PreTrainedModel, gates: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, layer l of `model` returns h + m_l·(f_l(h) − h).

    A mapping {"attention": m, "mlp": m'} gates the two sub-layers: what each adds to the residual stream is multiplied.
    `gates` m: (L,), or (L, B) with one mask for each of the B samples of a batch; floating; it may require grad.
    Layers that run at exactly m = 1 without grad keep their plain forward. Hidden states recorded by
    `output_hidden_states=True` are the gated ones.

    Raises `TypeError` or `ValueError` for gates of another kind or shape, and for a batch of another size than B.
    """
    layers = find_layers(model)
    if isinstance(gates, Mapping):
        with _gated_sublayers(layers, gates):
            yield
        return
    _check_gates(gates, len(layers))
    plain = [False] * len(layers)
    if not gates.requires_grad:
        plain = (gates == 1).reshape(len(layers), -1).all(dim=1).tolist()
    with ExitStack() as stack:
        for layer, gate, is_plain in zip(layers, gates, plain, strict=True):
            if not is_plain:
                # prepend: transformers records hidden states by hooks of its own, which must see the gated output.
                handle = layer.register_forward_hook(_gate_hook(gate), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
        yield


@contextmanager
def _gated_sublayers(layers: nn.ModuleList, gates: Mapping[str, Tensor]) -> Iterator[None]:
    if set(gates) != set(KINDS):
        raise ValueError(f"gates has the keys {sorted(gates)}; a mapping has 'attention' and 'mlp'")
    for kind in KINDS:
        _check_gates(gates[kind], len(layers))
    writers = [writer(layer, kind) for kind in KINDS for layer in layers]
    with scaled(writers, [gate for kind in KINDS for gate in gates[kind]]):
        yield


@contextmanager
def skipped(
    model: PreTrainedModel, removed: Iterable[int], sublayers: Mapping[str, Sequence[int]] | None = None
) -> Iterator[None]:
    """Inside the block, `model` computes exactly what it would without the layers `removed`, for forward passes
    without a cache: a skipped layer returns its input and costs nothing. `sublayers` names layers whose "attention" or
    "mlp" adds nothing to the residual stream; it is computed all the same.

    Every layer keeps its index, and with it its mask and its rotary embedding, so the configuration is not touched.
    A cache would count positions by layer 0, wrongly where that is skipped, so one is refused with `ValueError`;
    `generate` needs `use_cache=False`. Raises `ValueError` for indices out of range or doubled and if no layer is left.
    """
    layers = find_layers(model)
    removed = check_indices("removed", removed, len(layers))
    if len(removed) == len(layers):
        raise ValueError(f"removed={removed} leaves no layer; keep at least one")
    silent = {} if sublayers is None else check_sublayers("sublayers", sublayers, len(layers))
    route = route_of(model)
    with ExitStack() as stack:
        stack.enter_context(silenced([writer(layers[layer], kind) for kind in silent for layer in silent[kind]]))
        stack.callback(model.register_forward_pre_hook(_refuse_cache, with_kwargs=True).remove)
        gone = {index: layers[index] for index in removed}
        stack.enter_context(replaced(gone, lambda index, given, own: route.handed_on(index, given)))
        yield


def _check_gates(gates: Tensor, num_layers: int) -> None:
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        raise TypeError(f"gates must be a floating tensor, not {getattr(gates, 'dtype', type(gates).__name__)}")
    if gates.dim() not in (1, 2) or gates.shape[0] != num_layers:
        raise ValueError(f"gates has shape {tuple(gates.shape)}; expected ({num_layers},) or ({num_layers}, batch)")


def _gate_hook(gate: Tensor) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = _hidden_states(args, kwargs)
        branch_out, *rest = entries(output)
        if gate.dim() == 1 and len(gate) != len(hidden):
            raise ValueError(f"gates has one mask for each of {len(gate)} samples, the batch has {len(hidden)}")
        aligned = gate.view(gate.shape + (1,) * (hidden.dim() - 1)) if gate.dim() else gate
        mixed = e3kernels.gated_residual(hidden, branch_out, aligned.to(hidden.device))
        return (mixed, *rest) if isinstance(output, tuple | list) else mixed

    return hook


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _refuse_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHE_NAMES):
        raise ValueError(f"{CACHE}: a model with skipped layers takes no cache; pass use_cache=False, or prune it")
