"""Does it fit? An estimate of the memory that a run takes, before it is tried."""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedModel

from e3pruner.models import find_layers, output_head
from e3pruner.models.device import usable_device
from e3pruner.models.loading import Dtype, checked_folder, weights_dtype
from e3pruner.models.positions import position_limit


def check_loading_fits(name: str, device: str, dtype: Dtype, *, trust_remote_code: bool = False) -> None:
    """Raises ValueError, with both sizes, when the weights of checkpoint `name` are more than `device` has free."""
    files = list(checked_folder(name, trust_remote_code).glob("*.safetensors"))
    stored, wanted = (weights_dtype(name, d, trust_remote_code=trust_remote_code) for d in (Dtype.AUTO, dtype))
    size = sum(file.stat().st_size for file in files) * wanted.itemsize / stored.itemsize
    where = usable_device(device)
    if size > (free := available(where)):
        raise ValueError(
            f"--model {name} has {size / 2**30:.1f} GiB of weights in {str(wanted).removeprefix('torch.')}, {where} "
            f"has {free / 2**30:.1f} GiB free; choose a narrower --dtype, or another machine"
        )


def check_positions(model: PreTrainedModel, needed: int, what: str) -> None:
    """Raises ValueError when sequences of `needed` tokens are too long for `model`; `what` names the arguments."""
    limit = position_limit(model)
    if limit is not None and needed > limit:
        raise ValueError(
            f"{what} makes sequences of {needed} tokens; the model ({model.config.model_type}) has {limit} positions "
            "(max_position_embeddings)"
        )


def check_decoding_fits(model: PreTrainedModel, batch: int, prompt: int, tokens: int) -> None:
    """Raises ValueError, with the estimate, when reading `batch` prompts of `prompt` tokens would not fit in memory,
    and when the model has no positions for them and the `tokens` that follow.
    """
    check_positions(model, prompt + tokens, f"prompt={prompt} with tokens={tokens}")
    width, item = output_head(model).weight.shape[1], output_head(model).weight.element_size()
    cache = 2 * len(find_layers(model)) * batch * (prompt + tokens) * width * item
    need = cache + _layer_activations(model, batch, prompt) + 4 * batch * output_head(model).weight.shape[0]
    check_fits(need, model.device, f"batch={batch} with prompt={prompt}")


def check_training_fits(model: PreTrainedModel, batch: int, length: int) -> None:
    """Raises ValueError, with the estimate, when a recovery step on `batch` sequences of `length` would not fit,
    and when the model has no positions for them.
    """
    check_positions(model, length, f"length={length}")
    parameters = sum(p.numel() for p in model.parameters())
    # fp32 masters, gradients, two moments, and a narrow copy of student and teacher.
    states = parameters * (4 * 4 + 2 * 2)
    logits = batch * length * output_head(model).weight.shape[0]  # eager losses keep six of them in fp32
    need = states + len(find_layers(model)) * _layer_activations(model, batch, length) + 6 * 4 * logits
    check_fits(need, model.device, f"batch={batch} with length={length}")


def available(device: torch.device) -> int:
    """Free bytes on `device`."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return torch.accelerator.get_memory_info(device)[0]


def _layer_activations(model: PreTrainedModel, batch: int, length: int) -> int:
    """Bytes alive at once in one layer: a dozen hidden states, and the attention's scores where it forms them."""
    config = model.config.get_text_config(decoder=True)
    hidden = batch * length * output_head(model).weight.shape[1]
    scores = batch * config.num_attention_heads * length**2 if model.config._attn_implementation == "eager" else 0
    return 12 * hidden * output_head(model).weight.element_size() + 8 * scores


def check_fits(need: float, device: torch.device, what: str) -> None:
    """Raises ValueError when `need` bytes are more than `device` has free; `what` names the arguments."""
    free = available(device)
    if need > free:
        raise ValueError(
            f"{what} needs about {need / 2**30:.1f} GiB beside the model, {device} has {free / 2**30:.1f} GiB free; "
            "make the shape smaller"
        )
