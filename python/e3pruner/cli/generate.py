"""e3 generate: text from a model, with its speed."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from e3pruner.cli import options
from e3pruner.cli.command import stderr
from e3pruner.cli.models import load_model, load_tokenizer


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.0,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")] = True,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    config: options.Config = None,
) -> None:
    """Stream a continuation of a prompt to stdout and its tokens/s to stderr.

    Example: `e3 generate --model recovered --prompt "What is a hash table?"`
    """
    tokenizer = load_tokenizer(model)
    network = load_model(model, device, dtype)
    torch.manual_seed(seed)
    began = time.perf_counter()
    new_tokens = continue_prompt(network, tokenizer, prompt, max_new_tokens, chat, temperature, stream=True)
    seconds = time.perf_counter() - began
    stderr.print(f"{len(new_tokens)} tokens in {seconds:.2f} s: {len(new_tokens) / seconds:.1f} tokens/s", style="dim")


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    chat: bool = True,
    temperature: float = 0.0,
    stream: bool = False,
) -> list[int]:
    """The new tokens' ids, end-of-text included if the model came to it."""
    in_chat = chat and tokenizer.chat_template
    text = chat_text(tokenizer, prompt) if in_chat else prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not in_chat).to(model.device)
    network: Any = model
    ids = network.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        pad_token_id=tokenizer.eos_token_id,
    )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as a user's message, with the opening of the answer."""
    message = {"role": "user", "content": prompt}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
