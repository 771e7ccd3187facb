"""A tiny real model with a real tokenizer on disk, a text file, and the `e3` command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from e3pruner.cli import app

END = "<|end|>"
Command = Callable[..., Result]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of six layers over bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def e3() -> Command:
    """`e3("search", "--drop", 2)` runs the command in this process."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def pipeline_file(folder: Path, **settings: Any) -> Path:
    """A file for `e3 run`: three layers in two rounds, a few steps each; `settings` replace its values."""
    pipeline = {"drop": 3, "rounds": 2, "method": "greedy", "steps": 3, "sequences": 4, "held_out": 4, "length": 32}
    pipeline |= {"batch": 4, "recover": {"save_every": 1, "lr": 3e-4}}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline | settings), encoding="utf-8")
    return path
