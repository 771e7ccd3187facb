"""What the models of a comparison write, and how fast, beside the dense model: a part of each row, and of the page."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.evaluation import fastest_writer, speeds, writing
from e3pruner.evaluation.writing import brief_writing
from e3pruner.models import find_layers
from e3pruner.pipelines.results import DENSE
from e3pruner.report.writing import request_speed
from e3pruner.storage import read_checked, write_checked
from e3pruner.surgery import prune

_KIND = "e3pruner.damage"
_FORM = {"prompts": int, "writing": {str: object}, "speeds": {str: {str: object}}, "timing": {"doubts": [str]}}
_ITSELF = (1.0, math.nan)  # the dense model's speed against itself
_SHOWN = 3  # models of each table whose answers are shown, the best first

Row = dict[str, Any]


@dataclass
class Damage:
    """Text from `prompts` prompts by the cut models of `dense`. What the dense one writes and how fast each depth is,
    measured once in turns, is kept in `path`.
    """

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: int
    path: Path

    @cached_property
    def options(self) -> dict[str, Any] | None:
        """Of every text; None where the model has no room for any."""
        return brief_writing(self.dense, self.tokenizer, self.prompts) if self.prompts else None

    def of(self, model: PreTrainedModel) -> Row:
        """What is added to the row of a cut model; nothing where none is to write."""
        return {"writing": writing(fastest_writer(model), self.tokenizer, **self.options)} if self.options else {}

    def of_cut(self, kept: Sequence[int]) -> Row:
        """The same for the dense model's own layers `kept`; nothing, as standard error says, where it cannot be cut."""
        if self.options is None:
            return {}
        try:
            return self.of(prune(self.dense, kept, copy_weights=False))
        except ValueError as error:
            print(f"nothing is written without layers: {error}", file=sys.stderr)
            return {}

    def about(self, lines: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
        """Parts of the results: `lines` with what their models write beside the dense one, their answers, and how far
        the speeds can be trusted. `rows` are the cells that the lines are of.
        """
        written = {(row["drop"], row["recovery"], row["method"]): row for row in reversed(rows) if "writing" in row}
        if not written:
            return {}
        dense = self._dense({row["drop"]: row["removed"] for row in written.values()})
        of_lines = [written.get((line["drop"], line["recovery"], line["method"])) for line in lines]
        return {
            "comparison": [
                line | ({} if row is None else {"writing": _figures(dense, row)})
                for line, row in zip(lines, of_lines, strict=True)
            ],
            "dense_writing": _figures(dense, {"writing": dense["writing"], "drop": 0}) | {"request_speed": _ITSELF},
            "generations": _answers(dense["writing"], [row for row in of_lines if row is not None]),
            "timing": dense["timing"],
        }

    def _dense(self, removed: dict[int, list[int]]) -> dict[str, Any]:
        """What the dense model writes, and the speeds of it and of models without so many layers, by their number."""
        if self.path.exists():
            kept = read_checked(self.path, _KIND, _FORM)
            if kept["prompts"] == self.prompts and {str(drop) for drop in removed} <= kept["speeds"].keys():
                return kept
        every = range(len(find_layers(self.dense)))
        cut = {
            str(drop): prune(self.dense, [layer for layer in every if layer not in gone], copy_weights=False)
            for drop, gone in removed.items()
        }
        found = speeds({"0": self.dense, **cut})
        content = {
            "prompts": self.prompts,
            "writing": self.of(self.dense)["writing"],
            "speeds": found.of,
            "timing": found.timing,
        }
        write_checked(self.path, _KIND, content)
        return read_checked(self.path, _KIND, _FORM)


def _figures(dense: dict[str, Any], row: Row) -> dict[str, Any]:
    """The figures of a row that a table has room for, each with its standard error."""
    found = row["writing"]
    rates = (dense["speeds"][str(drop)]["decode_tokens_per_s"] for drop in (0, row["drop"]))
    return {
        "loops": found["greedy"]["loops"],
        "tokens": found["greedy"]["tokens"],
        "right": found["tasks"]["all"]["pass@1"],
        "request_speed": request_speed(dense["writing"], found, *rates),
    }


def _answers(dense: dict[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A prompt for each table, with the answers of the dense model and of the table's best."""
    tables: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row["drop"], row["recovery"]), []).append(row)
    return [
        {
            "prompt": text["prompt"],
            "answers": {DENSE: text["answer"]}
            | {_name(row): row["writing"]["texts"][number % len(dense["texts"])]["answer"] for row in best[:_SHOWN]},
        }
        for number, best in enumerate(tables.values())
        for text in [dense["texts"][number % len(dense["texts"])]]
    ]


def _name(row: Row) -> str:
    recovered = "" if row["recovery"] == "none" else f", {row['recovery']}"
    return f"{row['method']}, {row['drop']} fewer{recovered}"
