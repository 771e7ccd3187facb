"""Distil in Lightning: python examples/lightning_module.py pruned dense tokens.safetensors recovered

`tokens.safetensors` holds `input_ids` (sequences, length).
"""

import sys

import torch
from lightning import Trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from e3pruner.recovery.integrations.lightning import DistillMixin


class Distilled(DistillMixin):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=2e-4)


student_folder, teacher_folder, tokens, out = sys.argv[1:]
student = AutoModelForCausalLM.from_pretrained(student_folder)
teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
trainer = Trainer(
    max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, enable_checkpointing=False
)
examples = [{"input_ids": row} for row in load_file(tokens)["input_ids"]]
trainer.fit(Distilled(student, teacher), DataLoader(examples, batch_size=4))
student.save_pretrained(out)
