"""Which short recovery ranks masks as a long one does -> bench/results/healing-ranks.jsonl and healing-ranks.md

python bench/search/healing_ranks.py bench/search/healing_ranks.yaml [--only "all, 4096" ...]

Each mask is cut, and recovered by each way on its tokens; the last way is what the others are compared with. One JSON
line per mask and way; cut short, the same command goes on. All figures are of kinds of text that no step sees.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

import e3pruner
from e3pruner import PruningPlan
from e3pruner.models import find_layers
from e3pruner.models.loading import Dtype, load_model, load_tokenizer
from e3pruner.precision import autocast_dtype
from e3pruner.recovery.teacher import RememberingTeacher
from e3pruner.report import describe_environment
from e3pruner.report.table import markdown_table
from e3pruner.storage import read_json_lines, replacing_file, write_json_lines
from e3pruner.text.kinds import kinds_of_text
from e3pruner.text.sources import WRITTEN

RESULTS = Path(__file__).parents[1] / "results" / "healing-ranks.jsonl"


def mean_kl(model: Any, teacher: Any, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        kind: e3pruner.evaluate(model, rows.split(4), teacher, precision="auto", progress=False)["kl"]
        for kind, rows in held_out.items()
    }


def markdown(rows: list[dict[str, Any]], ways: list[str], masks: list[list[int]]) -> str:
    """A line per mask, and below them each way's rank correlation with the last one and its seconds per mask."""
    found = {(tuple(row["removed"]), row["way"]): row for row in rows}
    table = [[found.get((tuple(mask), way)) for way in ways] for mask in masks]
    whole = [line for line in table if all(line)]
    kl = [[fmean(row["kl"].values()) for row in line if row] for line in whole]
    order = torch.tensor(kl, dtype=torch.float64).argsort(0).argsort(0).double()
    ranks = torch.corrcoef(order.T)[:, -1].tolist() if len(whole) > 2 and len(ways) > 1 else [float("nan")] * len(ways)
    lines = [
        [" ".join(map(str, mask)), *(f"{fmean(row['kl'].values()):.3f}" if row else "–" for row in line)]
        for mask, line in zip(masks, table, strict=True)
    ]
    lines.append(["rank correlation with the last", *(f"{rank:.2f}" for rank in ranks)])
    seconds = [fmean(row["seconds"] for row in rows if row["way"] == way) for way in ways]
    lines.append(["seconds per mask", *(f"{each:.1f}" for each in seconds)])
    where = rows[-1]["environment"]
    about = f"At commit {where['commit']} on {where['machine']['processor']}; KL, mean over unseen kinds of text."
    return "\n\n".join([markdown_table(["removed", *ways], lines), about]) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--only", nargs="+", help="ways to measure; all if not given")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    settings: dict[str, Any] = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    ways: dict[str, dict[str, Any]] = settings["ways"]
    model = load_model(settings["model"], dtype=Dtype.FLOAT32)
    kinds = {*settings["text"], *settings["unseen"]}
    text = kinds_of_text(
        load_tokenizer(settings["model"]),
        settings["text"],
        length=settings["length"],
        held_out=settings["held_out"],
        unseen=settings["unseen"],
        teacher=None if kinds.isdisjoint(WRITTEN) else model,
    )
    held_out = {kind: text.held_out[kind] for kind in settings["unseen"]}
    teacher = RememberingTeacher(model, autocast_dtype("auto", model.device))
    rows = read_json_lines(given.out, {"removed": list, "way": str}, "no mask") if given.out.exists() else []
    done = {(tuple(row["removed"]), row["way"]) for row in rows}
    for way, options in ways.items():
        for removed in settings["masks"]:
            if (tuple(removed), way) in done or way not in (given.only or ways):
                continue
            plan = PruningPlan.of_removed(removed, len(find_layers(model)))
            student, began = e3pruner.prune(model, plan), time.perf_counter()
            if tokens := options.get("tokens", 0):
                others = {name: value for name, value in options.items() if name != "tokens"}
                steps = tokens // (settings["length"] * others.get("batch_size", 1))
                e3pruner.distill(
                    student, teacher=teacher, data=text.training, plan=plan, progress=False,
                    **{"steps": steps, "batch_size": 1, **others},
                )  # fmt: skip
            took = time.perf_counter() - began
            row = {"removed": removed, "way": way, "kl": mean_kl(student, model, held_out), "seconds": took}
            rows.append(row | {"environment": describe_environment()})
            write_json_lines(given.out, rows)
            print(way, removed, f"{fmean(row['kl'].values()):.3f}", flush=True)
    with replacing_file(given.out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(rows, [w for w in ways if any(r["way"] == w for r in rows)], settings["masks"]))


if __name__ == "__main__":
    main(sys.argv[1:])
