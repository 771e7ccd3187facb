"""Second real models for the comparison: a GPT-2 and a GPT-NeoX of 12 layers, trained here on real text.

python bench/search/small_models.py [--out small-models] [--steps 500]

Both read the training documents of the Python manual and of Python's standard library, which no calibration and no
held-out text of `e3 compare` shares; bench/search/gpt2.yaml and gpt_neox.yaml compare the methods on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from e3pruner.models.loading import load_tokenizer
from e3pruner.text.built_in import deal, manual_documents
from e3pruner.text.kinds import kinds_of_text
from e3pruner.text.sources import module_documents

KINDS = ("manual", "code")
LENGTH, VOCABULARY, LAYERS, WIDTH, HEADS = 256, 4096, 12, 256, 4


def trained_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's kind of tokenizer with a vocabulary that fits a small model, learnt from the training documents."""
    texts = []
    for documents in (manual_documents(), module_documents()):
        texts += [documents[name] for name in deal({name: len(text) for name, text in documents.items()})["training"]]
    return load_tokenizer("smollm2").train_new_from_iterator(texts, VOCABULARY)


def configurations(tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedConfig]:
    """By folder name. No dropout: a search runs in evaluation mode, and the models see little text."""
    ends = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return {
        "gpt2": GPT2Config(
            **ends, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=LENGTH, attn_pdrop=0, embd_pdrop=0,
            resid_pdrop=0,
        ),
        "gpt_neox": GPTNeoXConfig(
            **ends, num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
            max_position_embeddings=LENGTH,
        ),
    }  # fmt: skip


def train(config: PreTrainedConfig, rows: list[dict[str, Any]], steps: int, folder: Path) -> float:
    """Saves the model in `folder`; returns the loss of the last steps, in nats per token."""
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
    )
    trainer = Trainer(model=AutoModelForCausalLM.from_config(config), args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder))
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("small-models"))
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    tokenizer = trained_tokenizer()
    training = kinds_of_text(tokenizer, KINDS, length=LENGTH, held_out=1).training
    rows = [{"input_ids": row, "labels": row} for row in training]
    for name, config in configurations(tokenizer).items():
        folder = arguments.out / name
        loss = train(config, rows, arguments.steps, folder)
        tokenizer.save_pretrained(folder)
        print(f"{folder}: {loss:.2f} nats per token after {arguments.steps} steps on {training.numel():,} tokens")


if __name__ == "__main__":
    main()
