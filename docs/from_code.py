"""Writes the pages that say what the code declares, search-options.md and engine-rules.md: python docs/from_code.py"""

import inspect
from pathlib import Path

from e3pruner.mask_search import METHODS
from e3pruner.mask_search.method import Method
from e3pruner.surgery.engines import FACTS

_METHODS = """# Search methods and their options

This page is written by `python docs/from_code.py`, and a test holds it to the code. An option is given as
`e3pruner.search(..., method=NAME, OPTION=VALUE)`, as `e3 search --method NAME --option OPTION=VALUE`, or under
`search:` in YAML. [Which one to take](choosing.md) is another page. K is the number of layers that stay, `drop` of
those that go."""
_ENGINES = """# Engines that fix a layer's kind by its number

This page is written by `python docs/from_code.py`, and a test holds it to the code. The engine, at the commit, takes
layer i for the entry i of the cycle, over and over, whatever the setting in `config.json` says. `prune` warns by name
where a cut breaks such a rule, and `search(..., quota=ENGINE)` keeps to it. A type that is not listed has no rule that
we know of."""


def table(*rows: tuple[object, ...]) -> str:
    """The first of `rows` is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def section(method: Method) -> str:
    can = [
        f"{what}: {'yes' if it else 'no'}."
        for what, it in {"Sub-layers": method.sublayers, "Quotas": method.quotas}.items()
    ]
    options = [(f"`{name}`", f"`{default!r}`") for name, default in method.options.items()]
    parts = [f"## {method.name}", inspect.getdoc(method) or "", " ".join(can)]
    return "\n\n".join(parts + ([table(("option", "default"), *options)] if options else []))


def pages() -> dict[str, str]:
    """The text of each page by its name."""
    methods = [section(METHODS[name]) for name in sorted(METHODS)]
    head = ("engine", "commit", "file", "model type", "setting", "cycle")
    facts = [
        (f.engine, f.version, f"`{f.file}`", f"`{f.model_type}`", f"`{f.setting}`", ", ".join(map(str, f.cycle)))
        for f in FACTS
    ]
    return {
        "search-options.md": "\n\n".join([_METHODS, *methods]) + "\n",
        "engine-rules.md": "\n\n".join([_ENGINES, table(head, *facts)]) + "\n",
    }


if __name__ == "__main__":
    for name, text in pages().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
