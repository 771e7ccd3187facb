"""The results of a run as one JSON file, which the report is built from.

Keys (all but `title` and `environment` may be missing; the report then leaves that part out):

- `title`, `summary`, `command`: str; `environment`: see `environment.py`; `config`: the resolved options;
  `seconds`: by stage.
- `layers`: int, of the dense model; `removed`: the removed layers' indices.
- `importance`: one mean KL per layer (nats per token), the cost of removing that layer alone; null where it must stay.
- `mask_path`: `{"steps": [...], "removed": [[share of the step's masks without layer 0, 1, ...], ...]}`.
- `methods`: `[{"method", "removed", "cost", "seconds", ...the figures of a model}]`, the mask of each method on the
  held-out text, the one that was pruned first; `cost` in tokens times dense forward passes.
- `comparison`: the lines of `e3pruner.report.comparison.summary`, each with its "writing": `{"loops", "tokens",
  "right", "request_speed"}`, figures with standard errors, as `dense_writing` has them; `matrix`: the settings.
- `curve`: `{method: [[layers removed, held-out KL], ...]}`.
- `frontier`: `[{"drop", "ratio", "layers", "parameters", "decode_tokens_per_s"}]`, the dense model first; `ratio`: of
  perplexities to its own.
- `recovery`: `{"train": [[step, loss], ...], "held_out": [[step, KL], ...],
  "perplexity": [[step, perplexity], ...]}`.
- `models`: `[{"name", "layers", "parameters", "kl", "perplexity", "top1_agreement", "decode_tokens_per_s", ...}]`.
- `timing`: how far speeds can be trusted: `{"doubts": [why they cannot], ...the machine's state meanwhile}`.
- `writing`: `{model name: what e3pruner.evaluation.writing found, but its texts}`, the dense model first.
- `tasks`: `{model name: {task: {metric: value}}}`, by the evaluation harness.
- `generations`: `[{"prompt": str, "answers": {model name: str}}]`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from e3pruner.form import check_form, natural, positive
from e3pruner.report.table import COLUMNS
from e3pruner.storage import read_json, write_json

RESULTS_FILE = "results.json"
SCHEMA = 1
# Control characters but tab and line feed, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _table(value: Any, width: int | None = None) -> bool:
    """Whether it is a list of lists of numbers, all of this width (None: of one, whichever, but none empty)."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        return False
    numbers = all(type(item) in (int, float) for row in value for item in row)
    widths = {len(row) for row in value} - ({width} if width else set())
    return numbers and (not widths if width else 0 not in widths and len(widths) <= 1)


def pairs_of_numbers(value: Any) -> bool:
    """Whether it is a list of pairs of numbers."""
    return _table(value, 2)


def one_or_more_pairs_of_numbers(value: Any) -> bool:
    """Whether it is a list of pairs of numbers, at least one."""
    return pairs_of_numbers(value) and bool(value)


def steps_with_lists_of_shares(value: Any) -> bool:
    """Whether it holds "steps" and, for each of them, "removed", equally long lists of numbers from 0 to 1."""
    if not isinstance(value, dict) or not isinstance(steps := value.get("steps"), list) or not steps:
        return False
    table = value.get("removed", [])
    share = _table(table) and all(0 <= part <= 1 for row in table for part in row)
    return share and all(map(natural, steps)) and len(table) == len(steps)


def three_numbers(value: Any) -> bool:
    """Whether it is a mean, a least and a largest number."""
    return _table([value], 3)


def two_numbers(value: Any) -> bool:
    """Whether it is a figure and its standard error, or two quartiles."""
    return _table([value], 2)


def a_difference(value: Any) -> bool:
    """Whether it is a number and its standard error, which may be null."""
    return isinstance(value, list) and len(value) == 2 and _table([[each or 0.0 for each in value]], 2)


_FIGURES: dict[str, Any] = {f"{key}?": (float, None) for key in COLUMNS}
_FIGURES |= {f"{phase}_quartiles?": two_numbers for phase in ("decode", "prefill")}
_WRITTEN = dict.fromkeys(("loops", "distinct_bigrams", "tokens", "ends"), two_numbers)
_WRITING = {"greedy": _WRITTEN, "sampled": _WRITTEN, "tasks": {str: {str: two_numbers}}}
_METHOD = {"method": str, "removed": [natural], "cost": float, "seconds": float, "kl": float, "perplexity": float}
_BRIEF: dict[str, Any] = dict.fromkeys(("loops", "tokens", "right"), two_numbers)
_BRIEF |= {"request_speed": (two_numbers, None)}
_LINE = {
    "writing?": _BRIEF,
    "drop": natural,
    "recovery": str,
    "method": str,
    "kl": three_numbers,
    "cost": float,
    "seconds": float,
}
_ENVIRONMENT = {"machine": {str: object}, "versions": {str: object}, "backends": {str: object}}
FORM = {
    "title": str,
    "environment": _ENVIRONMENT | {"commit": (str, None), "date": str},
    "summary?": (str, None),
    "command?": (str, None),
    "config?": {str: object},
    "seconds?": {str: float},
    "layers?": positive,
    "removed?": [natural],
    "importance?": [(float, None)],
    "mask_path?": steps_with_lists_of_shares,
    "methods?": [_FIGURES | _METHOD],
    "comparison?": [
        _LINE
        | {"paired?": (a_difference, None), "agreement?": (float, None)}
        | {"kinds": {str: {"kl": three_numbers, "perplexity": three_numbers}}}
    ],
    "dense_writing?": _BRIEF,
    "frontier?": [{"drop": natural, "ratio": float, "parameters": float, "decode_tokens_per_s?": (float, None)}],
    "curve?": {str: one_or_more_pairs_of_numbers},
    "recovery?": {"train": pairs_of_numbers, "held_out": pairs_of_numbers, "perplexity?": pairs_of_numbers},
    "models?": [_FIGURES | {"name": str}],
    "timing?": {"doubts": [str]},
    "writing?": {str: _WRITING},
    "tasks?": {str: {str: {str: object}}},
    "generations?": [{"prompt": str, "answers": {str: str}}],
}


def save_results(results: dict[str, Any], folder: Path) -> Path:
    """Writes `folder`/results.json (by a temporary name and a rename) and returns its path."""
    path = folder / RESULTS_FILE
    write_json(path, {"schema": SCHEMA, **results})
    return path


def load_results(folder: Path, name: str = RESULTS_FILE) -> dict[str, Any]:
    """Reads `folder`/`name`. What cannot be shown of a text, as a control character, is U+FFFD in it.

    Raises FileNotFoundError when there is none, ValueError when it is not ours or naming the part that lacks its form.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; e3 demo writes one")
    results = read_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no results file of this version (it must hold schema {SCHEMA})")
    check_form(path, results, FORM)
    return cast(dict[str, Any], _printable(results))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value
