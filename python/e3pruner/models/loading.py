"""Models and tokenizers from --model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.models.smollm2 import smollm2_folder

BUILT_IN = "smollm2"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def model_folder(name: str) -> Path:
    """The checkpoint folder that --model names; nothing is ever downloaded.

    Raises FileNotFoundError when it is no folder with a config.json.
    """
    folder = smollm2_folder() if name == BUILT_IN else Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--model {name} is neither a folder with a config.json nor {BUILT_IN!r}")
    return folder


def load_model(name: str, device: str = "cpu", dtype: Dtype = Dtype.AUTO) -> PreTrainedModel:
    """The model in evaluation mode. Raises what `model_folder` and `from_pretrained` raise."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=str(dtype), local_files_only=True)
    return model.to(device).eval()


def weights_dtype(name: str, dtype: Dtype = Dtype.AUTO) -> torch.dtype:
    """What `load_model` of the same arguments loads the weights in, without reading them."""
    if dtype != Dtype.AUTO:
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(name), dtype="auto", local_files_only=True, device_map="meta"
    )
    return model.dtype


def has_tokenizer(name: str) -> bool:
    return any(model_folder(name).glob("tokenizer*"))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises ValueError when the folder has none."""
    if not has_tokenizer(name):
        raise ValueError(f"--model {name} has no tokenizer beside it; save one with tokenizer.save_pretrained")
    return AutoTokenizer.from_pretrained(model_folder(name), local_files_only=True)


def copy_tokenizer(name: str, folder: Path) -> None:
    """Saves the model's tokenizer, if it has one, into `folder`: what is exported can be used as it is."""
    if has_tokenizer(name):
        load_tokenizer(name).save_pretrained(folder)
