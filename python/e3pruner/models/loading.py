"""Models and tokenizers from --model."""

from __future__ import annotations

import re
import shutil
import sys
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from e3pruner.models.device import AUTO, usable_device
from e3pruner.models.files.smollm2 import smollm2_folder
from e3pruner.models.streaming import streamed_model
from e3pruner.storage import read_json

BUILT_IN = "smollm2"
# What belongs to a tokenizer: of the fast kind, of the old kinds (vocabulary and merges, SentencePiece, tiktoken), its
# chat templates, and its own code.
TOKENIZER_FILES = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template*", "additional_chat_templates"),
    "tokenization_*.py",
)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?")
# Weights in the forms that are not read here.
OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "original/*"]
# Errors that speak of this machine or of the weights' file, not of what the folder describes.
_FAILURES = (OSError, SafetensorError, MemoryError, torch.OutOfMemoryError)


class Placement(StrEnum):
    WHOLE = "whole"
    STREAM = "stream"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def model_folder(name: str) -> Path:
    """The checkpoint folder that --model names: one on disk, the built-in one, or a Hub id's in the Hub's
    cache, which it is downloaded to unless HF_HUB_OFFLINE is set. A folder wins over an id.

    Raises FileNotFoundError, naming the command that downloads it, where there is none.
    """
    folder = smollm2_folder() if name == BUILT_IN else Path(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"--model {name} is neither a folder with a config.json, nor {BUILT_IN!r}, nor a Hub id"
        )
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, ignore_patterns=OTHER_WEIGHTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"--model {name} is no folder with a config.json, and as a Hub id it cannot be read: "
            f"{type(error).__name__}; `hf download {repository}` where the Hub can be reached, with the same HF_HOME"
        ) from error


def load_model(
    name: str,
    device: str = AUTO,
    dtype: Dtype = Dtype.AUTO,
    *,
    placement: Placement = Placement.WHOLE,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode, on `usable_device(device)`.

    placement: "whole", all of it there; "stream", a decoder layer is brought there when it is called, so that two of
    them exist at a time and the rest stays in the checkpoint's files (see `streaming`).

    Raises FileNotFoundError for no checkpoint folder, ValueError naming it where it describes no model, lacks weights
    of it, or brings its own code and `trust_remote_code` is not set; OSError or SafetensorError for damaged weights.
    """
    where = usable_device(device)
    folder = checked_folder(name, trust_remote_code)
    if device == AUTO:
        _say_device(str(where))
    if placement == Placement.STREAM:
        kept = None if dtype == Dtype.AUTO else getattr(torch, dtype)
        return streamed_model(folder, where, kept, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": str(dtype)}
    options |= {"local_files_only": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # to say which, below
    if quantised := bool(read_json(folder / "config.json").get("quantization_config")):
        options["device_map"] = {"": str(where)}  # quantised weights are made where they stay
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except _FAILURES:
        raise
    except Exception as error:
        raise ValueError(f"--model {name} cannot be loaded: {_said(error)}") from error
    model, found = loaded
    if wrong := sorted((*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"]))):
        raise ValueError(
            f"--model {name}: {len(wrong)} tensors that its config.json asks for are not in its weights, or have "
            f"another shape: {wrong[0]}{', ...' if wrong[1:] else ''}"
        )
    resident: PreTrainedModel = model.eval() if quantised else model.to(where).eval()
    if not quantised:
        return resident
    with torch.no_grad():  # some formats are unpacked by the first call of the model, and by none of its parts
        resident(input_ids=torch.zeros(1, 1, dtype=torch.long, device=where))
    return resident


@cache
def _say_device(chosen: str) -> None:
    """Once per process: what "auto" came to."""
    print(f"--device auto: {chosen}", file=sys.stderr)


def weights_dtype(name: str, dtype: Dtype = Dtype.AUTO, *, trust_remote_code: bool = False) -> torch.dtype:
    """What `load_model` of the same arguments loads the weights in, without reading them."""
    if dtype != Dtype.AUTO:
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "device_map": "meta"}
    folder = checked_folder(name, trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    return model.dtype


def checked_folder(name: str, trust_remote_code: bool) -> Path:
    """`model_folder`, whose config.json can be read. Raises ValueError naming the file where it cannot, or where only
    code that the checkpoint brings could, and `trust_remote_code` is not set.
    """
    folder = model_folder(name)
    file = folder / "config.json"
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(content).__name__}")
    if content.get("auto_map") and not trust_remote_code and content.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"--model {name} brings its own code (auto_map in its config.json), which runs with your rights: read it, "
            "then allow it by --trust-remote-code"
        )
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"{file} describes no model: {_said(error)}") from error
    return folder


def tokenizer_files(name: str) -> list[Path]:
    """The files and folders beside the model that belong to its tokenizer."""
    folder = model_folder(name)
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises ValueError when the folder has none, or a damaged one."""
    if not tokenizer_files(name):
        raise ValueError(f"--model {name} has no tokenizer beside it; save one with tokenizer.save_pretrained")
    folder = checked_folder(name, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"--model {name}: its tokenizer cannot be loaded: {_said(error)}") from error


def copy_tokenizer(name: str, folder: Path) -> bool:
    """Copies the files of the model's tokenizer into `folder`, byte for byte; whether there were any."""
    files = tokenizer_files(name)
    for file in files:
        (shutil.copytree if file.is_dir() else shutil.copy2)(file, folder / file.name)
    return bool(files)


def _said(error: BaseException) -> str:
    """The first sentence of an error, with its type where it has not many words."""
    message = " ".join(str(error).split()).partition(". ")[0]
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"
