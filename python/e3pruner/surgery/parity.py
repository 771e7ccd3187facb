"""The proof that a pruned model is the dense one without the removed layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from e3pruner.compat import CACHE
from e3pruner.models.gates import skipped
from e3pruner.models.head import check_finite
from e3pruner.models.stack import evaluating, find_layers, returning_dicts, speaker_of
from e3pruner.surgery.config import renumbered_inside

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
_SOURCE = "kv_shared_layer_index"  # of older transformers: whose keys and values a layer reads
# What forward passes change (BigBird's attention_type among it), what only the logits show the use of, what is kept for
# other models (a Gemma assistant reads keys and values; those that later layers read are a demand), how many layers
# share a block (Zamba 2), and the seed of random attention in training, which is the layer's index (BigBird).
_STATE_NAMES = (
    *("training", "gradient_checkpointing", "attention_type", "num_hidden_layers"),
    *("store_full_length_kv", "num_fwd_mem_blocks", "seed"),
)
_BATCH, _LENGTH = 2, 12


def assert_parity(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    kept: Sequence[int],
    sublayers: Mapping[str, Sequence[int]] | None = None,
    *,
    steps: int = 6,
) -> None:
    """Prove on a few tokens that `pruned` is `model` with the layers `kept` only, and of these without `sublayers` (see
    `skipped`); raises `ValueError` if it is not.

    Every layer has the settings of the layer it was, which reaches further than any short probe can: a window of 4096
    shows here. Without a cache the logits equal, bit for bit, those of `model` with the other layers skipped. Decoding
    the last `steps` tokens one by one with a cache, or with whatever state the model hands from call to call, gives the
    logits of one pass without, up to rounding; where it does not for `model` itself either, a warning says so.
    """
    assert_same_settings(model, pruned, kept)
    model, pruned = speaker_of(model), speaker_of(pruned)
    ids = _probe(pruned, 5)
    removed = sorted(set(range(len(find_layers(model)))) - set(kept))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for each in (model, pruned):
            stack.enter_context(evaluating(each))
            stack.enter_context(returning_dicts(each))
        stack.enter_context(skipped(model, removed, sublayers))
        expected = model(input_ids=ids, use_cache=False).logits
        uncached = pruned(input_ids=ids, use_cache=False).logits
        error = _decoding_error(pruned, ids, uncached, steps)
    kind = model.config.model_type
    if not torch.equal(uncached, expected):
        check_finite(model, expected)
        difference = (uncached - expected).abs().max()
        raise ValueError(
            f"model ({kind}) cannot be pruned: logits differ by {difference:.3g} from those with layers skipped"
        )
    if not isinstance(error, Exception) and error <= _tolerance(uncached.dtype):
        return
    own = _own_decoding_error(model, steps)
    if not isinstance(own, Exception) and own <= _tolerance(uncached.dtype):
        raise ValueError(f"model ({kind}) cannot be pruned: decoding with a cache {_effect(error)}")
    warnings.warn(
        f"model ({kind}): decoding with a cache {_effect(own)}; of the pruned one it {_effect(error)}; generate with "
        "use_cache=False",
        stacklevel=3,
    )


def _probe(model: PreTrainedModel, first: int) -> Tensor:
    """Token ids (B, T) from `first` on, none of them the padding's: some models count positions by it."""
    config = model.config.get_text_config(decoder=True)
    ids = (torch.arange(_BATCH * _LENGTH, device=model.device) * 7919 + first) % config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    return torch.where(ids == (-1 if pad is None else pad), (ids + 1) % config.vocab_size, ids).view(_BATCH, -1)


def _decoding_error(model: PreTrainedModel, ids: Tensor, uncached: Tensor, steps: int) -> float | Exception:
    """How far decoding with a cache moves the logits of `model`, or what it raises: some caches of transformers do."""
    try:
        cached = _decode(model, ids, steps)
        return 0.0 if cached is None else _relative_error(cached, uncached)  # RWKV mixes the rows of a batch up
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error


@torch.no_grad()
def _own_decoding_error(model: PreTrainedModel, steps: int) -> float | Exception:
    """The same of the dense model: the first error that it raises, else the most of a few probes."""
    with evaluating(model), returning_dicts(model):
        probes = [_probe(model, first) for first in range(8)]
        errors = [_decoding_error(model, ids, model(input_ids=ids, use_cache=False).logits, steps) for ids in probes]
    raised = [error for error in errors if isinstance(error, Exception)]
    return raised[0] if raised else max(error for error in errors if not isinstance(error, Exception))


def _effect(error: float | Exception) -> str:
    if isinstance(error, Exception):
        return f"fails ({type(error).__name__}: {' '.join(str(error).split())})"
    return f"changes its logits by {error:.2%}"


def assert_same_settings(model: PreTrainedModel, smaller: PreTrainedModel, kept: Sequence[int]) -> None:
    """Raises `ValueError` unless layer i of `smaller` has the settings of layer kept[i] of `model`, and its index."""
    dense, pruned = find_layers(model), find_layers(smaller)
    per_layer = _indices_per_layer(dense)
    for new, old in enumerate(kept):
        ours, theirs = dict(pruned[new].named_modules()), {}
        for name, module in dense[old].named_modules():
            if (now := renumbered_inside(model.config, kept, name)) is not None:
                theirs[now] = module
        if other := sorted(ours.keys() ^ theirs.keys()):
            raise ValueError(
                f"layer {old} cannot become layer {new}: its index decides more than its place, and would change "
                f"which modules it has: {', '.join(other)}"
            )
        for name, module in ours.items():
            settings, expected = _settings(module), _settings(theirs[name])
            if (source := expected.get(_SOURCE)) in kept:
                expected[_SOURCE] = kept.index(source)
            changed = [key for key in expected if settings.get(key) != expected[key]]
            if changed or type(module) is not type(theirs[name]):
                what = ", ".join(f"{key} from {expected[key]!r} to {settings.get(key)!r}" for key in changed)
                raise ValueError(
                    f"layer {old} cannot become layer {new}: its index decides more than its place, and would change "
                    f"{name or 'the layer'}: {what or type(module).__name__}"
                )
            for key in _INDEX_NAMES:
                if (index := getattr(theirs[name], key, None)) in (None, -1):  # it has none, or is told when called
                    continue
                if getattr(module, key, None) != (new if index == old else index + (new - old) * per_layer):
                    raise ValueError(f"layer {new} ({name or type(module).__name__}) bears the index of another layer")


def _indices_per_layer(layers: nn.ModuleList) -> int:
    """How many indices a layer has: one, or one for each of its attentions (LongCat Flash has two)."""
    modules = layers[0].modules()
    return len({index for m in modules for key in _INDEX_NAMES if (index := getattr(m, key, None)) is not None}) or 1


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | None)
        and not name.startswith("_")
        and name not in _INDEX_NAMES + _STATE_NAMES
    }


def _decode(model: PreTrainedModel, ids: Tensor, steps: int) -> Tensor | None:
    """Logits (B, T, V) of a prompt and then of the last `steps` tokens one by one through what the model hands from
    call to call: its cache or, by other names, its state. None for a model that hands nothing on and takes no cache.
    """
    takes = inspect.signature(type(model).forward).parameters
    carried: dict[str, Any] = {}
    prompt = ids[:, :-steps]
    output = model(input_ids=prompt, use_cache=True)
    if not (names := [name for name in output if name in takes]):
        if CACHE not in takes:
            return None
        carried = {CACHE: DynamicCache(config=model.config.get_text_config(decoder=True))}
        output = model(input_ids=prompt, use_cache=True, **carried)
    logits = [output.logits]
    for step in range(prompt.shape[1], ids.shape[1]):
        carried |= {name: output[name] for name in names}
        output = model(input_ids=ids[:, step : step + 1], use_cache=True, **carried)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖a − e‖ / ‖e‖ of logits centred over the vocabulary: a shift common to all of them means nothing."""
    actual, expected = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (actual, expected))
    return float((actual - expected).norm() / expected.norm())


def _tolerance(dtype: torch.dtype) -> float:
    """A wrong position or layer index changes logits by their own size, rounding by far less."""
    return 0.1 if torch.finfo(dtype).bits == 16 else 1e-3
