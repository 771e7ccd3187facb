"""docs/models.md, what each model type can do, from the record of the sweep: `python -m tests.sweep.page`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checks import OUTCOMES

_ROOT = Path(__file__).parents[2]
RECORDS = [_ROOT / "bench/results/models.json", _ROOT / "bench/results/models-image-text.json"]
PAGE = _ROOT / "docs/models.md"
_COLUMNS = ("prune", "reload", "generate", "search", "distill")
_MEANING = {
    "exact": "Everything asked agrees with the truth.",
    "refused": "What cannot be done is refused with the reason, before anything is measured or written.",
    "late": "The search finds a plan that surgery then refuses, with the reason.",
    "raw": "An error of another library comes out.",
    "wrong": "Figures differ from the truth.",
    "not built": "No small model of the type runs here, or no image is known that it reads.",
}
_KIND = re.compile("(ok|refused|late|raw|wrong|not built|not asked)(: |$)")


def page(*records: dict[str, Any]) -> str:
    """The page of `records`, one per mapping: what is asked, then of each the counts and a table per outcome."""
    first = records[0]
    lines = [
        "# What each model type can do",
        "",
        f"Every type of transformers {first['transformers']} that generates text, as a random model of six layers,",
        "held to the dense model whose removed layers hand on what they are given; image-text types with an image in",
        "every row, and on text alone where they run on it.",
        "",
        "`prune`: three random plans, logits equal bit for bit, padded ones too; `reload`: the checkpoint, written",
        "and read again; `generate`: every step of greedy decoding with the model's own cache; `search`: a plan of two",
        "layers, its KL, the model cut by it; `distill`: loss and gradients. Random weights say nothing of quality.",
        "",
        "`python -m tests.sweep --out bench/results/models.json` measures (types may be named; `--mapping image-text",
        "--out bench/results/models-image-text.json` the others), `python -m tests.sweep.page` writes this page.",
    ]
    return "\n".join([*lines, *(line for record in records for line in _section(record))]) + "\n"


def _section(record: dict[str, Any]) -> Iterator[str]:
    """One mapping: counts, versions and commits, then a table per outcome with one row per type."""
    types, kind = record["types"], record["mapping"]
    outcomes = Counter(each["outcome"] for each in types.values())
    commits = Counter(each.get("commit", record.get("commit")) for each in types.values())
    said = ", ".join(f"{number} at {commit}" for commit, number in commits.most_common())
    figures = ", ".join(f"**{outcomes[outcome]} {outcome}**" for outcome in OUTCOMES if outcomes[outcome])
    yield from ("", f"## {kind.capitalize()} types", "")
    yield f"Of {len(types)} types: {figures}. Measured with torch {record['torch']} and Python {record['python']};"
    yield f"types by commit: {said}."
    for outcome in OUTCOMES:
        if members := {name: each["checks"] for name, each in types.items() if each["outcome"] == outcome}:
            yield from ("", f"### {kind.capitalize()}, {outcome}: {len(members)}", "", _MEANING[outcome], "")
            yield f"| type | {' | '.join(_COLUMNS)} | why |"
            yield "|---" * (len(_COLUMNS) + 2) + "|"
            yield from (_row(name, members[name]) for name in sorted(members))


def _row(name: str, checks: dict[str, str]) -> str:
    kinds = [checks.get(column, "not asked").partition(":")[0] for column in _COLUMNS]
    cells = [{"ok": "yes", "not asked": "–"}.get(kind, kind) for kind in kinds]
    reasons = dict.fromkeys(_KIND.sub("", said) for said in checks.values())
    return f"| `{name}` | {' | '.join(cells)} | {_escaped('; '.join(filter(None, reasons)))} |"


def _escaped(text: str) -> str:
    """`text` as one cell of a Markdown table."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(*(json.loads(record.read_text(encoding="utf-8")) for record in RECORDS)), encoding="utf-8")
