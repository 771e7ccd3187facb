"""What an index and a reader of the package see, before anything is built."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_long_description_has_absolute_links_to_files_that_exist():
    text = runpy.run_path(str(ROOT / "setup.py"), run_name="description")["long_description"]()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 10
    ours = f"{PROJECT['urls']['Homepage']}/(?:blob|raw)/v{re.escape(PROJECT['version'])}/([^#]+)"
    for target in targets:
        assert target.startswith(("https://", "#"))
        if found := re.match(ours, target):
            assert (ROOT / found[1]).exists(), target
    assert re.search(r"!\[[^]]*\]\(\S+/raw/\S+\.png\)", text)


def test_the_version_is_that_of_the_changelog():
    heads = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [(name, date) for name, date in heads if name != "Unreleased"]
    assert released[0][0] == PROJECT["version"]
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in released)


def _packages(extra):
    """What an extra installs, by name, with the extras that it names itself."""
    for wanted in PROJECT["optional-dependencies"][extra]:
        name, _, others = re.match(r"([\w-]+)(\[([\w,-]+)\])?", wanted).groups()
        yield from (each for other in (others or "").split(",") if other for each in _packages(other))
        yield name.replace("-", "_").lower()


def test_what_a_test_skips_without_is_installed_by_the_test_extra():
    """Else it never runs in CI. Triton comes with torch, or by the Makefile; datasets with TRL."""
    sources = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    wanted = {name.partition(".")[0] for name in re.findall(r"importorskip\(\"([\w.]+)\"", sources)}
    assert {"torchao", "compressed_tensors", "bitsandbytes"} <= wanted
    assert wanted - {*_packages("test"), *sys.stdlib_module_names, "e3kernels", "triton", "datasets"} == set()
