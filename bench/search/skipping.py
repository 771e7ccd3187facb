"""What one search on SmolLM2 costs: seconds, peak memory, and how often each layer's weights are read.

    python bench/search/skipping.py [--drop 8] [--passes 32] [--masks-at-once N] [--prefixes-per-call N]

A read is a layer that is entered anew: calls that follow one another without another layer between them are one read.
Prints one line of JSON. It imports nothing but public names, so it measures older commits too.
"""

import argparse
import json
import resource
import time
from pydoc_data.topics import topics

import torch

import e3pruner
from e3pruner.models import load_smollm2


def count(layers: torch.nn.ModuleList) -> list[int]:
    """A list to which every layer that runs (hooks of the layer itself see the skipped ones too) adds its index."""
    runs: list[int] = []
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.append(index))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--drop", type=int, default=8)
    parser.add_argument("--passes", type=int, default=32, help="of 512 tokens, the calibration text")
    parser.add_argument("--masks-at-once", type=int)
    parser.add_argument("--prefixes-per-call", type=int)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    drop, passes = given.pop("drop"), given.pop("passes")
    model, tokenizer = load_smollm2()
    tokens = tokenizer("\n\n".join(topics.values()), return_tensors="pt")["input_ids"][0]
    batches = list(tokens[: passes * 512].view(-1, 256).split(2))
    runs = count(e3pruner.find_layers(model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    plan = e3pruner.search(model, batches, drop=drop, progress=False, **given)
    seconds = time.perf_counter() - began
    reads = sum(a != b for a, b in zip([-1, *runs], runs, strict=False))
    result = {
        "options": given,
        "removed": plan.removed,
        "kl": plan.metrics["kl"],
        "cost": plan.metrics["cost"],
        "seconds": round(seconds, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mib_before": before / 1024,
        "calls": len(runs),
        "reads": reads,
        "reads_per_layer_and_step": round(reads / len(e3pruner.find_layers(model)) / len(plan.history), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
