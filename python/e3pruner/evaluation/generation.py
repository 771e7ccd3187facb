"""Text that a model goes on with from a prompt."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from e3pruner.models.stack import returning_dicts
from e3pruner.runtime import LayerSkipRuntime


def continue_prompt(
    model: PreTrainedModel | LayerSkipRuntime,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    chat: bool = True,
    temperature: float = 0.0,
    stream: bool = False,
    **options: Any,
) -> list[int]:
    """The new tokens' ids, end-of-text included if the model came to it; `options` go to the model's `generate`."""
    in_chat = chat and tokenizer.chat_template
    text = chat_text(tokenizer, prompt) if in_chat else prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not in_chat).to(model.device)
    network: Any = model
    with returning_dicts(model) if isinstance(model, PreTrainedModel) else nullcontext():
        ids = network.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            pad_token_id=tokenizer.eos_token_id,
            **options,
        )
    new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return new


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as a user's message, with the opening of the answer."""
    message = {"role": "user", "content": prompt}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
