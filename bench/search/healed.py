"""What the healed objective gains after a longer recovery -> bench/results/search-healed.jsonl and .md

python bench/search/healed.py [--drops 8 12] [--seeds 0 1 2] [--tokens 65536]

Per depth and seed the masks of the raw and of the healed objective, each then recovered on the same tokens in the same
order, and judged on kinds of text that no step saw; their difference in pairs of sequences. Finished rows are not
repeated, and what a search has measured or recovered is kept in --work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import e3pruner
from e3pruner.evaluation.paired import paired
from e3pruner.models.loading import Dtype, load_model, load_tokenizer
from e3pruner.recovery.state import going_on
from e3pruner.report import describe_environment
from e3pruner.report.table import markdown_table
from e3pruner.storage import read_json_lines, replacing_file, write_json_lines
from e3pruner.text.kinds import kinds_of_text

RESULTS = Path(__file__).parents[1] / "results" / "search-healed.jsonl"
SEEN, UNSEEN = ["manual", "code", "prose"], ["library", "graphs", "mathematics"]
HEADINGS = ["objective", "removed", "seed", "layers", "cost", "KL of the cut", "KL recovered", "difference"]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        kl, cut = (fmean(figures["kl"] for figures in row[part].values()) for part in ("held_out", "cut"))
        raw = [r for r in rows if (r["drop"], r["seed"], r["objective"]) == (row["drop"], row["seed"], "raw")]
        difference = "–"
        if raw and row["objective"] != "raw":
            difference = str(paired(*({k: f["sequences"] for k, f in r["held_out"].items()} for r in (row, raw[0]))))
        about = [row["objective"], str(row["drop"]), str(row["seed"]), " ".join(map(str, row["removed"]))]
        lines.append([*about, f"{row['cost']:,.0f}", f"{cut:.3f}", f"{kl:.3f}", difference])
    return markdown_table(HEADINGS, lines) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", nargs="+", default=SEEN)
    parser.add_argument("--unseen", nargs="+", default=UNSEEN)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--drops", type=int, nargs="+", default=[8, 12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--rungs", default="16x4096,8x8192,4x16384")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("healed-work"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    model = load_model(given.model, dtype=Dtype.FLOAT32)
    sizes = {"length": given.length, "held_out": given.held_out}
    text = kinds_of_text(load_tokenizer(given.model), given.text, unseen=given.unseen, teacher=model, **sizes)
    form = {"objective": str, "drop": int, "seed": int}
    rows = read_json_lines(given.out, form, "no search") if given.out.exists() else []
    done = {tuple(row[key] for key in form) for row in rows}

    def judged(student: Any) -> dict[str, Any]:
        found = {}
        for kind in given.unseen:
            batches = text.held_out[kind].split(4)
            figures = e3pruner.evaluate(student, batches, model, precision="auto", by_sequence=True, progress=False)
            found[kind] = {name: figures[name] for name in ("kl", "perplexity")}
            found[kind]["sequences"] = figures["sequences"]["kl"]
        return found

    for drop in given.drops:
        for seed in given.seeds:
            calibration = text.calibration_of(seed, given.sequences).split(4)
            healed = {"objective": "healed", "training": text.training, "rungs": given.rungs}
            for objective, options in (("raw", {}), ("healed", healed)):
                if (objective, drop, seed) in done:
                    continue
                checkpoint = given.work / f"{drop}-{seed}.json"
                plan = e3pruner.search(model, calibration, drop, seed=seed, checkpoint=checkpoint, **options)
                student = e3pruner.prune(model, plan)
                cut = judged(student)
                state = going_on(given.work / f"{objective}-{drop}-{seed}")
                steps = given.tokens // (4 * given.length)
                e3pruner.distill(student, teacher=model, data=text.training, plan=plan, steps=steps, seed=seed, **state)
                row = {"objective": objective, "drop": drop, "seed": seed, "removed": plan.removed, **plan.metrics}
                rows.append(row | {"cut": cut, "held_out": judged(student), "environment": describe_environment()})
                write_json_lines(given.out, rows)
                with replacing_file(given.out.with_suffix(".md")) as temporary:
                    temporary.write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
