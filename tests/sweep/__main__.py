"""Sweep every model type of transformers: `python -m tests.sweep --out bench/results/models.json`.

Each type runs in a bounded time in a process of its own kind: what crashes or hangs ends only itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from .checks import OUTCOMES, examine

MAPPINGS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    "image-text": (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        transformers.AutoModelForImageTextToText,
    ),
}
_CHUNK, _SECONDS = 8, 90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mapping", choices=MAPPINGS, default="causal")
    parser.add_argument("--here", action="store_true", help="in this process, a JSON line per type")
    parser.add_argument("types", nargs="*", help="all of the mapping unless named")
    asked = parser.parse_args()
    types = asked.types or list(MAPPINGS[asked.mapping][0])
    if asked.here:
        for model_type in types:
            print(json.dumps({"type": model_type, **examine(model_type, MAPPINGS[asked.mapping][1])}), flush=True)
        return
    found = sweep(asked.mapping, types)
    print(table(found))
    if asked.out:
        asked.out.write_text(json.dumps(_record(asked.mapping, found, asked.out), indent=1) + "\n", encoding="utf-8")


def _record(mapping: str, found: dict[str, dict[str, Any]], old: Path) -> dict[str, Any]:
    """`found` with its commit and versions, over what the record `old` of the same versions says of other types."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    head = {"mapping": mapping, **versions, "python": platform.python_version()}
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    known = json.loads(old.read_text(encoding="utf-8")) if old.exists() else {}
    same = all(known.get(name) == value for name, value in head.items())
    types = {name: {"commit": known.get("commit")} | each for name, each in known["types"].items()} if same else {}
    types |= {name: each | {"commit": commit} for name, each in found.items()}
    return head | {"types": {name: types[name] for name in sorted(types)}}


def sweep(mapping: str, types: list[str]) -> dict[str, dict[str, Any]]:
    """What `examine` says of each of `types`."""
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(types), _CHUNK):
        found |= _apart(mapping, types[start : start + _CHUNK])
        print(f"{len(found)} of {len(types)}", file=sys.stderr, flush=True)
    return found


def _apart(mapping: str, types: list[str]) -> dict[str, dict[str, Any]]:
    """The same in a process of its own; what that did not live to say is asked of each type alone."""
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--here", "--mapping", mapping, *types]
    try:
        said = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_SECONDS * len(types), check=False
        ).stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
    lines = [json.loads(line) for line in said.decode().splitlines() if line.startswith('{"type"') and line[-1] == "}"]
    found = {line.pop("type"): line for line in lines}
    missing = [model_type for model_type in types if model_type not in found]
    if len(types) == 1 and missing:
        return {types[0]: {"outcome": "raw", "checks": {"all": f"raw: the process ended or took over {_SECONDS} s"}}}
    for model_type in missing:
        found |= _apart(mapping, [model_type])
    return {model_type: found[model_type] for model_type in types}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Outcomes with their numbers, and what is not exact with its reason."""
    counts = Counter(each["outcome"] for each in found.values())
    lines = [f"{outcome}: {counts[outcome]} of {len(found)}" for outcome in OUTCOMES]
    for model_type, each in found.items():
        if each["outcome"] != "exact":
            said = {name: text for name, text in each["checks"].items() if not text.startswith("ok")}
            lines.append(f"{each['outcome']:9} {model_type}: {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
