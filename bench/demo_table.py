"""Writes the table of bench/results/demo.json (a results.json of `e3 demo`) into README.md.

python bench/demo_table.py            writes it
python bench/demo_table.py --check    exits with 1 when README.md says something else
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from e3pruner.report import load_results, model_table
from e3pruner.report.table import markdown_table
from e3pruner.storage import replacing_file

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo: begin -->\n", "<!-- demo: end -->"


def demo_markdown(results: dict[str, Any]) -> str:
    """The demo's table, and where and how it was measured."""
    table = markdown_table(*model_table(results))
    environment, minutes = results["environment"], sum(results["seconds"].values()) / 60
    machine, versions = environment["machine"], environment["versions"]
    return (
        f"{table}\n\n`{results['command']}` at commit {environment['commit'][:12]}: {minutes:.1f} minutes on "
        f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; all of it in [bench/results/demo.json](bench/results/demo.json).\n"
    )


def with_table(readme: str, markdown: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + markdown + END + rest.split(END)[1]


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = with_table(before, demo_markdown(load_results(ROOT / "bench" / "results", "demo.json")))
    if "--check" in sys.argv[1:]:
        return int(before != after)
    with replacing_file(path) as temporary:
        temporary.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
