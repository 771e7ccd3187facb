"""Does the search find more with more text? -> bench/results/search-growing.jsonl

python bench/search/growing.py [--tokens 4096 32768] [--drops 8] [--seeds 0 1 2]

On so many tokens of a text, drawn by the seed: the default search, the same with ten times its steps and no stop, and
where the text is short the method `greedy`; each with its KL on all of that text, that of SmolLM2's known mask
{12 … 18, 26}, and its cost, in dense forward passes times tokens. What was measured is kept in --work: cut short, the
same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import e3pruner
from e3pruner.models.loading import Dtype, load_model, load_tokenizer
from e3pruner.report import describe_environment
from e3pruner.storage import read_json_lines, write_json_lines
from e3pruner.text.kinds import kinds_of_text

RESULTS = Path(__file__).parents[1] / "results" / "search-growing.jsonl"
KNOWN = [12, 13, 14, 15, 16, 17, 18, 26]
GREEDY_TOKENS = 4096  # beyond, greedy takes hours


def searches(drop: int, tokens: int) -> dict[str, dict[str, Any]]:
    """The contestants by name: arguments of `e3pruner.search`."""
    found: dict[str, dict[str, Any]] = {"default": {}, "10 × budget": {"steps": 30 * drop, "tolerance": 0.0}}
    return found | ({"greedy": {"method": "greedy"}} if tokens <= GREEDY_TOKENS else {})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="manual")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--drops", type=int, nargs="+", default=[8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="contestants; all if not given")
    parser.add_argument("--work", type=Path, default=Path("growing-work"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    model = load_model(given.model, dtype=Dtype.FLOAT32)
    text = kinds_of_text(load_tokenizer(given.model), [given.text], length=given.length, held_out=1).training
    form = {"search": str, "drop": int, "tokens": int, "seed": int}
    rows = read_json_lines(given.out, form, "no search") if given.out.exists() else []
    done = {tuple(row[key] for key in form) for row in rows}
    for tokens in given.tokens:
        for seed in given.seeds:
            order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
            batches = text[order[: tokens // given.length]].split(4)
            checkpoint = given.work / f"{tokens}-{seed}.json"
            for drop in given.drops:
                for name, arguments in searches(drop, tokens).items():
                    if (name, drop, tokens, seed) in done or name not in (given.only or (name,)):
                        continue
                    plan = e3pruner.search(model, batches, drop, seed=seed, checkpoint=checkpoint, **arguments)
                    row = {"search": name, "drop": drop, "tokens": tokens, "seed": seed, "removed": plan.removed}
                    row |= {"kl": plan.metrics["kl"], "cost": plan.metrics["cost"], "steps": len(plan.history)}
                    if drop == len(KNOWN) and given.model == "smollm2":
                        others = [unit for unit in range(30) if unit not in KNOWN]
                        known = e3pruner.search(
                            model, batches, drop, "first-n", protect=others, checkpoint=checkpoint, progress=False
                        )
                        row["known"] = known.metrics["kl"]
                    rows.append(row | {"environment": describe_environment()})
                    write_json_lines(given.out, rows)
                    print({key: row[key] for key in row if key != "environment"}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
