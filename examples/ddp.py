"""Distil a pruned model on several processes, one share of every batch each:

torchrun --nproc-per-node 2 examples/ddp.py --student pruned --teacher dense --tokens tokens.safetensors --out recovered

`tokens`: a safetensors file with `input_ids` (sequences, length). A step is the same whatever the number of processes
that divide `--batch` between them.
"""

import argparse
import os

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from e3pruner.recovery.integrations.step import DistillStep
from e3pruner.text.batches import shuffled_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--student", "--teacher", "--tokens", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, over all processes")
    parser.add_argument("--lr", type=float, default=2e-4)
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    student = AutoModelForCausalLM.from_pretrained(arguments.student).to(device)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher).to(device)
    data = load_file(arguments.tokens)["input_ids"]

    wrapped = DistributedDataParallel(student)
    step = DistillStep(student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.lr)
    share = arguments.batch // processes
    for number in range(arguments.steps):
        start = number * arguments.batch + rank * share
        loss, shown = step.backward_loss(wrapped, shuffled_batch(data, start, share, seed=0).to(device))
        loss.backward()
        step.finish(student.parameters())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {number + 1}: loss {float(shown):.4f}")
    if rank == 0:
        student.save_pretrained(arguments.out)
    dist.barrier()  # gloo's threads let go of their tensors, for which they need the interpreter's lock
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
