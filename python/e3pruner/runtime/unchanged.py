"""Notices that a model is no longer the one that a runtime was built from, by a look at its modules."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as all_modules
from transformers import PreTrainedModel, modeling_utils

if TYPE_CHECKING:
    import e3kernels._runtime as _runtime

# The settings and the modules' own numbers that either the forward pass of a supported model or its description reads.
_SETTINGS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "hidden_activation"),
    *("layer_types", "sliding_window", "use_bidirectional_attention", "max_position_embeddings", "rope_parameters"),
    *("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "embedding_multiplier"),
    *("residual_multiplier", "original_max_position_embeddings", "rope_interleave", "hidden_size_per_layer_input"),
    *("num_kv_shared_layers", "enable_moe_block"),
)
_NUMBERS = (
    *("eps", "variance_epsilon", "scaling", "head_dim", "num_key_value_groups", "attn_logit_softcapping", "use_rope"),
    *("residual_multiplier", "embedding_multiplier", "attention_scaling", "is_causal"),
    *("full_attention_attention_scaling", "sliding_attention_attention_scaling"),
    *("logit_scale", "rotary_ndims", "qk_layernorm", "use_parallel_residual", "sliding_window", "conv_kernel_size"),
    *("top_k", "norm_topk_prob", "routed_scaling_factor", "num_group", "topk_group", "alpha", "limit", "is_transposed"),
    *(
        "is_concatenated",
        "is_kv_shared_layer",
        "per_layer_input_scale",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
    ),
)
_REBUILD = "build a new LayerSkipRuntime"


class CallGuard:
    """A forward pre-hook that changes no result: the runtime's own, which it lets pass."""


class Unchanged:
    """What `model` is made of when this is built, and that `description`, of its weights, is still right.

    Raises RuntimeError for a model whose forward pass is more than its classes say: training mode, hooks, patches.
    """

    def __init__(self, model: PreTrainedModel, description: _runtime.Model) -> None:
        self._model, self._description = model, description
        self._modules = _modules(model)
        self._classes = {name: type(module) for name, module in self._modules.items()}
        self._forwards = {kind: kind.forward for kind in self._classes.values()}
        self._parameters = _parameters(self._modules)
        self._numbers = [
            (_path(name, key), vars(module), key, vars(module)[key])
            for name, module in self._modules.items()
            for key in _NUMBERS
            if key in vars(module)
        ]
        self._buffers = [
            (_path(name, key), module._buffers, key, buffer.clone())
            for name, module in self._modules.items()
            for key, buffer in _fixed_buffers(module).items()
        ]
        self._settings = copy.deepcopy(_settings(model))
        self._check_forward_is_plain()

    def check(self) -> None:
        """Raises RuntimeError, which names what differs. It costs a look at each module, not at the weights."""
        self._check_modules()
        self._check_forward_is_plain()
        self._description.check_unchanged()
        self._check_numbers()

    def _check_modules(self) -> None:
        modules = _modules(self._model)
        if modules != self._modules:
            _raise_difference(self._modules, modules)
        for name, module in modules.items():
            if type(module) is not (before := self._classes[name]):
                kinds = f"was a {before.__name__} and is now another class, a {type(module).__name__}"
                raise RuntimeError(f"{name or 'model'} {kinds}; {_REBUILD}")
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:
                raise RuntimeError(f"the forward of {kind.__name__} was replaced; {_REBUILD}")
        parameters = _parameters(modules)
        if [*map(id, parameters.values())] != [*map(id, self._parameters.values())]:
            _raise_difference(self._parameters, parameters)

    def _check_forward_is_plain(self) -> None:
        if all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks:
            raise RuntimeError("there is a forward hook for all modules, which the runtime would not run; remove it")
        for name, module in self._modules.items():
            if module.training:
                raise RuntimeError(f"{name or 'model'} is in training mode; call model.eval() first")
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if not all(map(_is_harmless, hooks)):
                raise RuntimeError(f"{name or 'model'} has a forward hook, which the runtime would not run; remove it")
            if "forward" in vars(module):
                raise RuntimeError(f"{name or 'model'} has a forward of its own, which the runtime would not run")

    def _check_numbers(self) -> None:
        for name, owner, key, before in self._numbers:
            if (now := owner.get(key)) != before:
                raise RuntimeError(f"{name} was {before} when the runtime was built and is now {now}; {_REBUILD}")
        for name, now in _settings(self._model).items():
            if now != (before := self._settings[name]):
                raise RuntimeError(f"{name} was {before!r} when the runtime was built and is now {now!r}; {_REBUILD}")
        for name, owner, key, before in self._buffers:
            now = owner.get(key)
            if now is None or now.device != before.device or not torch.equal(now, before):
                raise RuntimeError(f"{name} has other values than when the runtime was built; {_REBUILD}")


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _parameters(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter | None]:
    return {
        _path(name, key): parameter for name, module in modules.items() for key, parameter in module._parameters.items()
    }


def _path(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """By name; the body of the model holds a reference of its own to what is usually one configuration."""
    bodies = {"model.config": model.config, "model.model.config": model.base_model.config}
    # Not by getattr: a configuration raises where its layers have several values, which are numbers of their modules.
    return {f"{name}.{key}": vars(config).get(key) for name, config in bodies.items() for key in _SETTINGS}


def _fixed_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """All but the rotary frequencies that the model's own forward pass replaces by the length of its input."""
    kinds = getattr(module, "rope_type", "")
    names = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    moving = any("dynamic" in name or name == "longrope" for name in names)
    buffers = {key: buffer for key, buffer in module._buffers.items() if buffer is not None}
    return {key: buffer for key, buffer in buffers.items() if "original" in key or not moving}


def _is_harmless(hook: Any) -> bool:
    """The runtime's own guard, and what transformers leaves on a model: recorders, and gradients for checkpointing."""
    module = getattr(hook, "__module__", "")
    return isinstance(hook, CallGuard) or module.startswith("transformers.utils.") or module == modeling_utils.__name__


def _raise_difference(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Names the first entry that differs: of a subtree, its root."""
    for name in {**before, **now}:
        if before.get(name) is not now.get(name):
            how = "added" if name not in before else "removed" if name not in now else "replaced"
            raise RuntimeError(f"{name} was {how} since the runtime was built; {_REBUILD}")
