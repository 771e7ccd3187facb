"""Distil a model whose weights, gradients and optimizer state are spread over the processes (FSDP2):

torchrun --nproc-per-node 2 examples/fsdp2.py pruned dense tokens.safetensors recovered

`tokens.safetensors` holds `input_ids` (sequences, length). A step is the same whatever the number of processes.
"""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from e3pruner import find_layers
from e3pruner.recovery.integrations.step import DistillStep
from e3pruner.text.batches import shuffled_batch

BATCH = 8

student_folder, teacher_folder, tokens, out = sys.argv[1:]
kind = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
student = AutoModelForCausalLM.from_pretrained(student_folder).to(device)
teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).to(device)
data = load_file(tokens)["input_ids"]

step = DistillStep(student, teacher)  # before sharding: it looks at the whole output head
for layer in find_layers(student):
    fully_shard(layer, mesh=mesh)
fully_shard(student, mesh=mesh)
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4)
share = BATCH // mesh.size()
for number in range(len(data) // BATCH):
    batch = shuffled_batch(data, number * BATCH + mesh.get_rank() * share, share, seed=0).to(device)
    loss, shown = step.backward_loss(student, batch)
    loss.backward()
    step.finish(student.parameters())
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if mesh.get_rank() == 0:
        print(f"step {number + 1}: loss {float(shown):.4f}")
weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if mesh.get_rank() == 0:
    whole = AutoModelForCausalLM.from_pretrained(student_folder)
    whole.load_state_dict(weights)
    whole.save_pretrained(out)
dist.barrier()  # gloo's threads let go of their tensors, for which they need the interpreter's lock
dist.destroy_process_group()
