"""The results of a run as one JSON file, which the report is built from.

Keys (all but `title` and `environment` may be missing; the report then leaves that part out):

- `title`, `summary`, `command`: str; `environment`: see `environment.py`; `config`: the resolved options;
  `seconds`: by stage.
- `layers`: int, of the dense model; `removed`: the removed layers' indices.
- `importance`: one mean KL per layer (nats a token), the cost of removing that layer alone.
- `mask_path`: `{"steps": [...], "removed": [[share of the step's masks without layer 0, 1, ...], ...]}`.
- `methods`: `[{"method", "removed", "cost", "seconds", ...the figures of a model}]`, the mask of each method on the
  held-out text, the one that was pruned first; `cost` in tokens times dense forward passes.
- `comparison`: the lines of `e3pruner.report.comparison.summary`; `matrix`: the comparison's settings.
- `curve`: `{method: [[layers removed, held-out KL], ...]}`.
- `recovery`: `{"train": [[step, loss], ...], "held_out": [[step, KL], ...],
  "perplexity": [[step, perplexity], ...]}`.
- `models`: `[{"name", "layers", "parameters", "kl", "perplexity", "top1_agreement", "decode_tokens_per_s", ...}]`.
- `tasks`: `{model name: {task: {metric: value}}}`, by the evaluation harness.
- `generations`: `[{"prompt": str, "answers": {model name: str}}]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from e3pruner.storage import write_json

RESULTS_FILE = "results.json"
SCHEMA = 1


def save_results(results: dict[str, Any], folder: Path) -> Path:
    """Writes `folder`/results.json (by a temporary name and a rename) and returns its path."""
    path = folder / RESULTS_FILE
    write_json(path, {"schema": SCHEMA, **results})
    return path


def load_results(folder: Path, name: str = RESULTS_FILE) -> dict[str, Any]:
    """Reads `folder`/`name`; raises FileNotFoundError when there is none, ValueError when it is not ours."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; e3 demo writes one")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no results file of this version (it must hold schema {SCHEMA})")
    if missing := [key for key in ("title", "environment") if key not in results]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return results
