"""Both native modules, in place, with all cores and the standard library alone: `python -m bench.gpu.build`."""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from bench.gpu import rows

ROOT = Path(__file__).parents[2]


def main() -> None:
    # By its path: importing the package would load what is about to be built.
    spec = importlib.util.spec_from_file_location("building", ROOT / "e3kernels" / "building.py")
    assert spec is not None
    assert spec.loader is not None
    building = sys.modules["building"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(building)
    origin = getattr(importlib.util.find_spec("torch"), "origin", None)
    if origin is None:
        sys.exit("bench.gpu.build: torch is not installed in this Python")
    package, report = ROOT / "e3kernels", {}
    for module in (building.OPS, building.RUNTIME):
        with tempfile.TemporaryDirectory() as folder:
            facts = building.build_module(module, building.Torch(Path(origin).parent), package, Path(folder))
        report[module.name] = facts
        rows.append(module=module.name, **facts)
    (package / "_build.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
