"""Distil in TRL's `SFTTrainer`: python examples/trl_sft.py pruned dense tokens.safetensors recovered

The student's folder holds its tokenizer; `tokens.safetensors` holds `input_ids` (sequences, length).
"""

import sys

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from e3pruner.recovery.integrations.trainer import DistillMixin


class DistillSFTTrainer(DistillMixin, SFTTrainer):
    pass


student_folder, teacher_folder, tokens, out = sys.argv[1:]
trainer = DistillSFTTrainer(
    AutoModelForCausalLM.from_pretrained(student_folder),
    SFTConfig(
        out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=None,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_dict({"input_ids": load_file(tokens)["input_ids"].tolist()}),
    processing_class=AutoTokenizer.from_pretrained(student_folder),
    teacher=AutoModelForCausalLM.from_pretrained(teacher_folder),
)
trainer.train()
trainer.save_model()
