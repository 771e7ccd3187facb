"""Search layers on several processes, one share of every batch each:

torchrun --nproc-per-node 2 examples/distributed_search.py --model dense --tokens tokens.safetensors --out pruning.json

`tokens`: a safetensors file with `input_ids` (sequences, length); the number of processes divides every batch of them.
All processes find the same plan; a mask that differs between them raises.
"""

import argparse
import os

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import e3pruner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--tokens", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--drop", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a batch, over all processes")
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device)
    shares = [batch[rank::processes] for batch in load_file(arguments.tokens)["input_ids"].split(arguments.batch)]
    plan = e3pruner.search(model, shares, arguments.drop, checkpoint=f"{arguments.out}.measured")
    if rank == 0:
        plan.save(arguments.out)
        print(f"{arguments.out}: remove {plan.removed}, KL {plan.metrics['kl']:.3f}")
    dist.barrier()  # gloo's threads let go of their tensors, for which they need the interpreter's lock
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
