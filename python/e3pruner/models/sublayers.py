"""The two sub-layers of a decoder layer, attention and MLP: where each writes to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import e3kernels
from e3pruner.models.stack import check_indices

KINDS = ("attention", "mlp")
# The last matrices of a sub-layer, as decoder layers of transformers call them.
_PROJECTIONS = {
    "attention": (
        "self_attn.o_proj self_attn.dense self_attn.out_proj attn.c_proj attn.out_proj attn.attention.out_proj "
        "attention.dense self_attention.dense"
    ),
    "mlp": "mlp.down_proj mlp.c_proj mlp.dense_4h_to_h mlp.fc2 mlp.fc_out fc2",
}
# Norms behind a sub-layer (Gemma 2 and 3, OLMo 2; GLM 4); where there are none, the projection itself is the last.
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)


def projection(layer: nn.Module, kind: str) -> nn.Module:
    """The matrix whose output is all that a sub-layer adds to the residual stream.

    Raises `ValueError` for a layer without exactly one, as in a mixture of experts.
    """
    modules = dict(layer.named_modules())
    found: list[nn.Module] = [modules[name] for name in _PROJECTIONS[kind].split() if name in modules]
    if len(found) != 1:
        raise ValueError(f"{type(layer).__name__} has no {kind} that ends in one projection; it goes as a whole layer")
    return found[0]


def writer(layer: nn.Module, kind: str) -> nn.Module:
    """The module whose output goes to the residual stream: the norm behind the projection, or the projection.

    Raises `ValueError` as `projection` does.
    """
    own = projection(layer, kind)
    for names in _POST_NORMS:
        if all(hasattr(layer, name) for name in names):
            return layer.get_submodule(names[KINDS.index(kind)])
    return own


def attention_of(layer: nn.Module) -> nn.Module:
    """The child of `layer` that attends."""
    own = set(map(id, projection(layer, "attention").modules()))
    return next(child for child in layer.children() if own & set(map(id, child.modules())))


def check_sublayers(name: str, sublayers: Mapping[str, Sequence[int]], num_layers: int) -> dict[str, list[int]]:
    """The layers named under "attention" and "mlp", ascending. Raises `ValueError` for other keys and bad indices."""
    if set(sublayers) != set(KINDS):
        raise ValueError(f"{name} has the keys {sorted(sublayers)}; it names layers under 'attention' and 'mlp'")
    return {kind: check_indices(f"{name}[{kind!r}]", sublayers[kind], num_layers) for kind in KINDS}


@contextmanager
def silenced(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block the output of each of `modules` is 0, whatever it computes."""
    with hooked(modules, lambda index, output: torch.zeros_like(output)):
        yield


@contextmanager
def scaled(modules: Sequence[nn.Module], gates: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the output of module i is multiplied by `gates[i]`, a scalar or (B,), one for each sample."""

    def scale(index: int, output: Tensor) -> Tensor:
        gate = gates[index]
        aligned = gate.view(gate.shape + (1,) * (output.dim() - 1)) if gate.dim() else gate
        return e3kernels.gated_residual(torch.zeros_like(output), output, aligned.to(output.device))

    with hooked(modules, scale):
        yield


@contextmanager
def hooked(modules: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside the block module i gives `change(i, output)`, or its output where that is None."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):

            def hook(_: nn.Module, args: Any, output: Tensor, index: int = index) -> Tensor | None:
                return change(index, output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield
