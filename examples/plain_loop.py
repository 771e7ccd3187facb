"""Distil a pruned model in a loop of your own: python examples/plain_loop.py pruned dense tokens.safetensors recovered

`tokens.safetensors` holds `input_ids` (sequences, length).
"""

import sys

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from e3pruner.recovery import DistillOptions
from e3pruner.recovery.integrations.step import DistillStep, batch_of

student_folder, teacher_folder, tokens, out = sys.argv[1:]
student = AutoModelForCausalLM.from_pretrained(student_folder)
teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
step = DistillStep(student, teacher, DistillOptions(weighting="entropy", kd_ratio=0.9))
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4)

accumulation = 2
for number, input_ids in enumerate(DataLoader(load_file(tokens)["input_ids"], batch_size=4), start=1):
    loss, shown = step.backward_loss(student, batch_of({"input_ids": input_ids}))
    loss.backward()
    print(f"batch {number}: loss {float(shown):.4f}")
    if number % accumulation == 0:
        step.finish(student.parameters())  # the mean over all tokens of the step
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
student.save_pretrained(out)
