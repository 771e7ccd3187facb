"""The text tower of an image-text model is cut exactly, with an image in the text."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NUM_LAYERS
from tiny_vision_models import TINY_VISION_CONFIGS, image_batch, tiny_vision_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

import e3pruner
from e3pruner.models import find_layers

KEPT, REMOVED = [0, 1, 3, 5], [2, 4]


@contextmanager
def bypassed(layers: nn.ModuleList, removed: list[int]) -> Iterator[None]:
    """A truth of its own: hooks that give back what a layer was given, whatever it computes."""

    def back(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [layers[index].register_forward_hook(back, with_kwargs=True) for index in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch, use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", TINY_VISION_CONFIGS)
def test_the_cut_model_is_exact_with_an_image(model_type: str, tmp_path: Path) -> None:
    model = tiny_vision_model(model_type)
    batch = image_batch(model)
    pruned = e3pruner.prune(model, KEPT)
    with bypassed(find_layers(model), REMOVED):
        expected = logits(model, batch)
    assert torch.equal(logits(pruned, batch), expected)
    assert not torch.allclose(expected, logits(model, batch), rtol=0.1)
    other = batch | {"pixel_values": -batch["pixel_values"]}
    assert not torch.allclose(logits(pruned, other), expected, rtol=0.1)

    pruned.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again, batch), expected)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe"])
def test_without_the_layer_that_is_given_features_the_image_would_be_misread(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused would be wrong: the features go by the index of the layer."""
    model = tiny_vision_model(model_type)
    with pytest.raises(ValueError, match="features of the image are added behind layers 0, 1, which must stay"):
        e3pruner.prune(model, [1, 2, 3])
    monkeypatch.setattr("e3pruner.surgery.config.check_kept", lambda config, kept: None)
    pruned = e3pruner.prune(model, [1, 2, 3])
    batch = image_batch(model)
    with bypassed(find_layers(model), [0, 4, 5]):
        assert not torch.allclose(logits(pruned, batch), logits(model, batch), rtol=0.1)
    assert len(find_layers(model)) == NUM_LAYERS
