"""Recoveries of one pruned model on equal tokens -> bench/results/recovery.jsonl and recovery.md

python bench/recovery/table.py bench/recovery/recoveries.yaml [--tokens 64000] [--only "LoRA" ...]

One JSON line a cell and seed. Cut short, even by a kill, the same command goes on: finished cells are not repeated, the
one in training goes on from its last state, all under --work. Once the cells "none" and "compensation" are there,
several processes may share --out and --work, with other cells in --only; tokens/s are then theirs side by side.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import e3pruner
from e3pruner import PruningPlan, TeacherCache
from e3pruner.evaluation import evaluate_tasks, write_text_tasks
from e3pruner.evaluation.paired import paired
from e3pruner.evaluation.text_tasks import telling
from e3pruner.models import find_layers
from e3pruner.models.loading import Dtype, load_model, load_tokenizer
from e3pruner.profiling.process_memory import peak_above_inputs
from e3pruner.recovery.state import going_on
from e3pruner.report import describe_environment
from e3pruner.report.table import markdown_table
from e3pruner.storage import new_folder, read_json_lines, replacing_file, write_json_lines
from e3pruner.text.batches import shuffled_batch
from e3pruner.text.kinds import KindsOfText, kinds_of_text
from e3pruner.text.sources import WRITTEN
from e3pruner.text.splits import take

RESULTS = Path(__file__).parents[1] / "results" / "recovery.jsonl"
_TEXT = ("length", "held_out", "balanced", "unseen")  # settings of `kinds_of_text`
CACHE, DENSE = "teacher cache", "dense"  # rows beside the cells
DEFAULT = "default"  # the cell that the others are compared with, sequence by sequence


@dataclass(frozen=True)
class Study:
    """The models, the text and the plan that all cells share; `settings` is the YAML file."""

    settings: dict[str, Any]
    work: Path

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return load_model(self.settings["model"], dtype=Dtype.FLOAT32)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings["model"])

    @cached_property
    def plan(self) -> PruningPlan:
        return PruningPlan.of_removed(self.settings["removed"], len(find_layers(self.teacher)))

    @cached_property
    def text(self) -> KindsOfText:
        """The same tokens on every machine, unless kinds that a model writes are named."""
        options = {key: self.settings[key] for key in _TEXT if key in self.settings}
        kinds = {*self.settings["text"], *options.get("unseen", [])}
        teacher = None if kinds.isdisjoint(WRITTEN) else self.teacher
        return kinds_of_text(self.tokenizer, self.settings["text"], teacher=teacher, **options)

    @property
    def steps(self) -> int:
        return self.settings["tokens"] // (self.settings["batch"] * self.settings["length"])

    def start(self, compensate: str) -> PreTrainedModel:
        """The pruned model, corrected by the method `compensate`, as all cells with that method find it."""
        folder = self.work / f"start-{compensate}"
        if not folder.exists():
            pruned = e3pruner.prune(self.teacher, self.plan)
            calibration = take(self.text.calibration, self.settings["calibration"], "calibration")
            e3pruner.compensate(pruned, self.teacher, self.plan, calibration, method=compensate)
            with new_folder(folder) as temporary:
                pruned.save_pretrained(temporary)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def cache(self, tail: str) -> TeacherCache:
        """The cache of the training text, made first where --work has none."""
        folder, k = self.work / "cache", self.settings["k"]
        e3pruner.cache_teacher(self.teacher, self.text.training, folder, tokenizer=self.tokenizer, k=k)
        return TeacherCache(folder, tokenizer=self.tokenizer, tail=tail)  # type: ignore[arg-type]

    def measure_cache(self) -> dict[str, Any]:
        """Makes the cache: tokens per second, teacher included; and those of reading an epoch of it in random order."""
        data = self.text.training
        began = time.perf_counter()
        cache = self.cache("bucket")
        made = time.perf_counter()
        size = self.settings["batch"]
        for batch in range(0, len(data) - size + 1, size):
            cache.targets(shuffled_batch(data, batch, size, seed=0))
        read = time.perf_counter()
        stored = sum(file.stat().st_size for file in cache.folder.iterdir())
        return {
            "bytes_per_token": stored / data.numel(),
            "write_tokens_per_s": data.numel() / (made - began),
            "read_tokens_per_s": len(data) // size * size * self.settings["length"] / (read - made),
        }

    def measure(self, name: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Recovers as `options` say; KL and perplexity by kind of held-out text, and what the training took."""
        if name == CACHE:
            return self.measure_cache()
        if name == DENSE:
            return {"held_out": self.evaluate(self.teacher), **self.tasks(self.teacher)}
        options = dict(options)
        source, tail = options.pop("teacher", "live"), options.pop("tail", "bucket")
        student = self.start(options.pop("compensate", self.settings["compensate"]))
        figures: dict[str, Any] = {}
        if source != "none":
            state = going_on(self.work / f"{name}-{seed}")
            results: list[e3pruner.recovery.DistillResult] = []
            # Made before the memory of the training is measured.
            teacher = self.teacher if source == "live" else self.cache(tail)
            arguments = {"data": self.text.training, "plan": self.plan, "save_every": 50} | state
            arguments |= {"steps": self.steps, "batch_size": self.settings["batch"], "seed": seed} | options

            def train() -> None:
                results.append(e3pruner.distill(student, teacher=teacher, **arguments))

            figures["peak_bytes"] = peak_above_inputs(train)
            (result,) = results
            figures |= {
                "tokens_per_s": result.tokens / result.seconds,
                "seconds": result.seconds,
                "skipped": result.skipped,
                "loss": [record["loss"] for record in result.curve],
            }
        return figures | {"held_out": self.evaluate(student), **self.tasks(student)}

    def evaluate(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        size, options = self.settings["batch"], {"precision": "auto", "by_sequence": True}
        return {
            kind: e3pruner.evaluate(model, rows.split(size), self.teacher, **options)
            for kind, rows in self.text.held_out.items()
        }

    def tasks(self, model: PreTrainedModel) -> dict[str, Any]:
        """Where the settings ask for `tasks`: scores of those made from held-out text, of unseen kinds if there are."""
        if not self.settings.get("tasks"):
            return {}
        folder = self.work / "tasks"
        kinds = self.settings.get("unseen") or list(self.text.held_out)
        passages = {kind: self.tokenizer.batch_decode(self.text.held_out[kind]) for kind in kinds}
        names = write_text_tasks(folder, passages)
        return {"tasks": evaluate_tasks(model, self.tokenizer, names, folder=folder)}


def read_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    rows = read_json_lines(path, {"cell": str, "seed": int, "settings": dict}, "no cell") if path.exists() else []
    if any(row["settings"] != settings for row in rows):
        raise SystemExit(f"{path} holds figures of other settings; choose another --out")
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], order: list[str]) -> None:
    write_json_lines(path, rows)
    if DENSE in {row["cell"] for row in rows}:
        with replacing_file(path.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(rows, [DENSE, *order]), encoding="utf-8")


def markdown(rows: list[dict[str, Any]], order: list[str]) -> str:
    """Means over the seeds; perplexity also relative to the dense model's."""
    found = {name: [row for row in rows if row["cell"] == name] for name in order}
    (dense,) = (row["held_out"] for row in rows if row["cell"] == DENSE)
    headings = ["recovery", "seeds"]
    headings += [f"{kind}: {figure}" for kind in dense for figure in ("KL", "perplexity", "× dense")]
    telling_tasks = telling(next((row["tasks"] for row in rows if row["cell"] == DENSE and "tasks" in row), {}))
    headings += [f"{task.replace('_', ' ')} %" for task in telling_tasks]
    headings += ["less than default", "tokens/s", "peak GiB"]
    judged = rows[-1]["settings"].get("unseen") or list(dense)
    lines = []
    for name, measured in found.items():
        if not measured:
            continue
        line = [name, str(len(measured))]
        for kind in dense:
            kl, perplexity = (fmean(row["held_out"][kind][key] for row in measured) for key in ("kl", "perplexity"))
            line += [f"{kl:.3f}", f"{perplexity:.2f}", f"{perplexity / dense[kind]['perplexity']:.2f}"]
        scores = [[row.get("tasks", {}).get(task, {}).get("acc") for row in measured] for task in telling_tasks]
        line += [f"{100 * fmean(each):.1f}" if None not in each else "–" for each in scores]
        line.append(_difference(measured, found.get(DEFAULT, []), judged))
        trained = [row for row in measured if "loss" in row]
        line.append(f"{fmean(row['tokens_per_s'] for row in trained):.0f}" if trained else "–")
        line.append(f"{max(row['peak_bytes'] for row in trained) / 2**30:.2f}" if trained else "–")
        lines.append(line)
    table = markdown_table(headings, lines)
    cache = [
        f"Teacher cache: {row['bytes_per_token']:.1f} bytes per token, made at {row['write_tokens_per_s']:.0f} and "
        f"read at {row['read_tokens_per_s']:.0f} tokens/s."
        for row in rows
        if row["cell"] == CACHE
    ]
    begin = (
        f"{rows[-1]['settings']['tokens']:,} tokens of training a cell. Less than default: KL of the same sequences "
        f"less that of the cell {DEFAULT!r}, ± its standard error, mean over {', '.join(judged)}."
    )
    return "\n\n".join([begin, table, *cache, "\n".join(dict.fromkeys(map(origin, rows)))]) + "\n"


def _difference(rows: list[dict[str, Any]], others: list[dict[str, Any]], kinds: list[str]) -> str:
    """KL of the cells `rows` less that of `others`, means over the seeds, in pairs of sequences of these `kinds`."""
    if not others or rows is others or any("sequences" not in row["held_out"][kinds[0]] for row in [*rows, *others]):
        return "–"
    these, those = ({kind: _of_sequences(cells, kind) for kind in kinds} for cells in (rows, others))
    return str(paired(these, those))


def _of_sequences(cells: list[dict[str, Any]], kind: str) -> list[float]:
    return [fmean(each) for each in zip(*(row["held_out"][kind]["sequences"]["kl"] for row in cells), strict=True)]


def origin(row: dict[str, Any]) -> str:
    """Where the row comes from: a line of Markdown."""
    where = row["environment"]
    return (
        f"- `{row['command']}` at commit {where['commit']} on {where['machine']['processor']}, "
        f"{where['machine']['threads']} of {where['machine']['cores']} cores, torch {where['versions']['torch']}."
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--tokens", type=int, help="training tokens of a cell, in place of the file's")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the file's")
    parser.add_argument("--only", nargs="+", help="cells to measure; all if not given")
    parser.add_argument("--work", type=Path, default=Path("recovery-work"), help="states and cache, kept between runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    settings = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    cells: dict[str, dict[str, Any]] = settings.pop("cells")
    of_file = settings.pop("seeds")
    seeds = given.seeds or of_file
    settings["tokens"] = given.tokens or settings["tokens"]
    if unknown := set(given.only or ()) - cells.keys():
        raise SystemExit(f"--only {sorted(unknown)} must be cells of {given.config}: {list(cells)}")
    rows = read_rows(given.out, settings)

    study = Study(settings, given.work / str(settings["tokens"]))
    wanted = {name: options for name, options in cells.items() if name in (given.only or cells)}
    cached = any(options.get("teacher") == "cache" for options in wanted.values())
    chosen: dict[tuple[str, int], dict[str, Any]] = {(CACHE, 0): {}} if cached else {}
    chosen |= {(DENSE, 0): {}} | {(name, seed): options for name, options in wanted.items() for seed in seeds}
    done = {(row["cell"], row["seed"]) for row in rows if row["options"] == chosen.get((row["cell"], row["seed"]))}
    todo = {key: options for key, options in chosen.items() if key not in done}
    command = shlex.join(["bench/recovery/table.py", *arguments])
    for number, ((name, seed), options) in enumerate(todo.items(), start=1):
        print(f"{number} of {len(todo)}: {name}, seed {seed}, {study.steps} steps", flush=True)
        figures = study.measure(name, options, seed)
        row = {"cell": name, "seed": seed, "options": options, **figures, "command": command}
        row |= {"environment": describe_environment(), "settings": settings}
        # Read anew: another process may have finished another cell meanwhile.
        others = [old for old in read_rows(given.out, settings) if (old["cell"], old["seed"]) != (name, seed)]
        write_rows(given.out, [*others, row], list(cells))


if __name__ == "__main__":
    main(sys.argv[1:])
