"""Tasks made from any text by rule, for the evaluation harness: a passage's last word, and how a passage goes on."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CHOICES = 4
CHANCE = {"last_word": 0.0, "continuation": 1 / CHOICES}
_MARGIN = 0.1  # above chance: what the dense model must reach for a task to tell models apart
_LAST_WORD = re.compile(r"^(.*\S)(\s)([A-Za-z]{4,})\W*$", re.DOTALL)
_LEAST_CONTEXT, _CONTINUED = 60, 12  # characters before what is asked for; words that a passage goes on with


def write_text_tasks(folder: str | Path, passages: Mapping[str, Sequence[str]], *, seed: int = 0) -> list[str]:
    """Writes tasks of each kind of text into `folder`, as YAML and JSON lines that `evaluate_tasks` takes; their names.

    "last_word_KIND": the greedy continuation must be the word of four letters or more that ends the passage (as
    LAMBADA asks, arXiv 1606.06031). "continuation_KIND": of four continuations of the first half of a passage, its own
    and those of three others, drawn by `seed`, the likeliest must be its own.

    passages: text by kind, five passages or more, that no model has been trained on. Raises ValueError where a kind has
    fewer passages that a task can be made of.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for kind, texts in passages.items():
        documents = {"last_word": _last_words(texts), "continuation": _continuations(texts, random.Random(seed))}
        for task, rows in documents.items():
            if len(rows) <= CHOICES:
                raise ValueError(f"passages of {kind!r} make {len(rows)} documents of {task}; give more than {CHOICES}")
            name = f"{task}_{re.sub(r'[^0-9A-Za-z]+', '_', kind)}"
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(_task(name, task, data)), encoding="utf-8")
            names.append(name)
    return names


def telling(dense: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Of the tasks that `evaluate_tasks` has scored the dense model on, those at which it is by 10 points or more above
    chance: at the others models of any quality come out alike.
    """
    chances = {name: next(CHANCE[task] for task in CHANCE if name.startswith(task)) for name in dense}
    return [name for name, scores in dense.items() if scores["acc"] >= chances[name] + _MARGIN]


def _last_words(texts: Sequence[str]) -> list[dict[str, Any]]:
    found = [match for text in texts if (match := _LAST_WORD.match(_whole_words(text)))]
    return [
        {"context": match[1], "word": f" {match[3]}"}
        for match in found
        if len(match[1]) >= _LEAST_CONTEXT and match[2] == " "
    ]


def _continuations(texts: Sequence[str], draw: random.Random) -> list[dict[str, Any]]:
    halves = [half for text in texts if (half := _halves(_whole_words(text))) is not None]
    rows = []
    for number, (context, own) in enumerate(halves):
        others = [end for place, (_, end) in enumerate(halves) if place != number and end != own]
        if len(others) < CHOICES - 1:
            break
        choices = [own, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        rows.append({"context": context, "choices": choices, "label": choices.index(own)})
    return rows


def _halves(text: str) -> tuple[str, str] | None:
    """The first half of a passage, and the words that it goes on with."""
    words = text.split(" ")
    middle = len(words) // 2
    context, end = " ".join(words[:middle]), " ".join(words[middle : middle + _CONTINUED])
    return (context, f" {end}") if len(context) >= _LEAST_CONTEXT and end.strip() else None


def _whole_words(text: str) -> str:
    """`text` without what stands before its first space and behind its last, which may be parts of words."""
    return text.partition(" ")[2].rpartition(" ")[0]


def _task(name: str, task: str, data: Path) -> dict[str, Any]:
    of_task: dict[str, Any] = {"output_type": "loglikelihood", "doc_to_target": "{{word}}"}
    if task == "continuation":
        of_task = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    files = {"data_files": {"test": str(data)}, "cache_dir": str(data.parent / "cache")}
    return of_task | {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
