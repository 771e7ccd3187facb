"""`python -m e3kernels.info`: print what this installation can do."""

import argparse
import json
from typing import Any

from e3kernels.info import info


def main() -> None:
    """Print `info()` as text, or as JSON with --json."""
    parser = argparse.ArgumentParser(prog="python -m e3kernels.info", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    report = info()
    print(json.dumps(report, indent=2) if parser.parse_args().json else "\n".join(_lines(report)))


def _lines(value: dict[str, Any], indent: int = 0) -> list[str]:
    lines = []
    for name, item in value.items():
        if isinstance(item, dict) and set(item) == {"backend", "reason"}:
            item = f"{item['backend']} ({item['reason']})"
        lines.append(f"{' ' * indent}{name}:" + ("" if isinstance(item, dict) else f" {item}"))
        if isinstance(item, dict):
            lines += _lines(item, indent + 2)
    return lines


main()
