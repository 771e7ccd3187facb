"""Distil with Accelerate on any number of processes:

accelerate launch examples/accelerate_loop.py pruned dense tokens.safetensors recovered

`tokens.safetensors` holds `input_ids` (sequences, length).
"""

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from e3pruner.recovery.integrations.step import DistillStep, batch_of

BATCH, ACCUMULATION = 8, 2

student_folder, teacher_folder, tokens, out = sys.argv[1:]
accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATION)
student = AutoModelForCausalLM.from_pretrained(student_folder)
teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).to(accelerator.device)
share = BATCH // ACCUMULATION // accelerator.num_processes
batches = DataLoader(load_file(tokens)["input_ids"], batch_size=share)
wrapped, optimizer, batches = accelerator.prepare(student, torch.optim.AdamW(student.parameters(), lr=2e-4), batches)
step = DistillStep(student, teacher)
for input_ids in batches:
    with accelerator.accumulate(wrapped):
        loss, shown = step.backward_loss(wrapped, batch_of({"input_ids": input_ids}))
        # Accelerate divides by the number of batches; the mean over their tokens is taken in one go instead.
        accelerator.backward(loss * ACCUMULATION)
        if accelerator.sync_gradients:
            step.finish(student.parameters())
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            accelerator.print(f"loss {float(shown):.4f}")
        optimizer.step()
        optimizer.zero_grad()
if accelerator.is_main_process:
    student.save_pretrained(out)
accelerator.end_training()
