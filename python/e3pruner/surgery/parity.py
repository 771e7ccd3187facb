"""The proof that a pruned model is the dense one without the removed layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from e3pruner.compat import CACHE
from e3pruner.models.gates import skipped
from e3pruner.models.head import check_finite
from e3pruner.models.stack import evaluating, find_layers, returning_dicts

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
_STATE_NAMES = ("training", "gradient_checkpointing")
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
    the last `steps` tokens one by one with a cache gives the logits of one pass without, up to rounding.
    """
    assert_same_settings(find_layers(model), find_layers(pruned), kept)
    vocab_size = pruned.config.get_text_config(decoder=True).vocab_size
    tokens = torch.arange(_BATCH * _LENGTH, device=pruned.device) * 7919 + 5
    ids = (tokens % vocab_size).view(_BATCH, -1)
    removed = sorted(set(range(len(find_layers(model)))) - set(kept))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for each in (model, pruned):
            stack.enter_context(evaluating(each))
            stack.enter_context(returning_dicts(each))
        stack.enter_context(skipped(model, removed, sublayers))
        expected = model(input_ids=ids, use_cache=False).logits
        uncached = pruned(input_ids=ids, use_cache=False).logits
        cached = _decode(pruned, ids, steps)
    kind = model.config.model_type
    if not torch.equal(uncached, expected):
        check_finite(model, expected)
        error = (uncached - expected).abs().max()
        raise ValueError(
            f"model ({kind}) cannot be pruned: logits differ by {error:.3g} from those with layers skipped"
        )
    if not (error := _relative_error(cached, uncached)) <= _tolerance(uncached.dtype):
        raise ValueError(f"model ({kind}) cannot be pruned: decoding with a cache changes its logits by {error:.2%}")


def assert_same_settings(dense: nn.ModuleList, pruned: nn.ModuleList, kept: Sequence[int]) -> None:
    """Raises `ValueError` unless layer i of `pruned` has the settings of `dense[kept[i]]`, and its own index."""
    for new, old in enumerate(kept):
        theirs = dict(dense[old].named_modules())
        for name, module in pruned[new].named_modules():
            settings, expected = _settings(module), _settings(theirs[name])
            changed = [key for key in expected if settings.get(key) != expected[key]]
            if changed or type(module) is not type(theirs[name]):
                what = ", ".join(f"{key} from {expected[key]!r} to {settings.get(key)!r}" for key in changed)
                raise ValueError(
                    f"layer {old} cannot become layer {new}: its index decides more than its place, and would change "
                    f"{name or 'the layer'}: {what or type(module).__name__}"
                )
            if any(getattr(module, key, None) not in (None, new) for key in _INDEX_NAMES):
                raise ValueError(f"layer {new} ({name or type(module).__name__}) bears the index of another layer")


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | None)
        and not name.startswith("_")
        and name not in _INDEX_NAMES + _STATE_NAMES
    }


def _decode(model: PreTrainedModel, ids: Tensor, steps: int) -> Tensor:
    """Logits (B, T, V) of a prompt and then of the last `steps` tokens one by one through the model's own cache."""
    prompt = ids.shape[1] - steps
    output = model(input_ids=ids[:, :prompt], use_cache=True)
    if output.get(CACHE) is None:
        raise ValueError(f"model ({model.config.model_type}) cannot be pruned: it returns no {CACHE}")
    logits = [output.logits]
    for step in range(prompt, ids.shape[1]):
        token, cache = ids[:, step : step + 1], output[CACHE]
        output = model(input_ids=token, use_cache=True, **{CACHE: cache})
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖a − e‖ / ‖e‖ of logits centred over the vocabulary: a shift common to all of them means nothing."""
    actual, expected = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (actual, expected))
    return float((actual - expected).norm() / expected.norm())


def _tolerance(dtype: torch.dtype) -> float:
    """A wrong position or layer index changes logits by their own size, rounding by far less."""
    return 0.1 if torch.finfo(dtype).bits == 16 else 1e-3
