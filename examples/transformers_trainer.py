"""Distil in `transformers.Trainer`: python examples/transformers_trainer.py pruned dense tokens.safetensors recovered

`tokens.safetensors` holds `input_ids` (sequences, length).
"""

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from e3pruner.recovery import DistillOptions
from e3pruner.recovery.integrations.trainer import DistillTrainer

student_folder, teacher_folder, tokens, out = sys.argv[1:]
trainer = DistillTrainer(
    AutoModelForCausalLM.from_pretrained(student_folder),
    TrainingArguments(
        out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=[{"input_ids": row} for row in load_file(tokens)["input_ids"]],
    teacher=AutoModelForCausalLM.from_pretrained(teacher_folder),
    distill=DistillOptions(weighting="entropy", kd_ratio=0.9),
)
trainer.train()
trainer.save_model()
