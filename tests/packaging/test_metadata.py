"""What an index and a reader of the package see, before anything is built."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="description")
ADDRESS = "https://example.org/somebody/e3kernels"


def test_the_long_description_has_absolute_links_to_files_that_exist():
    text = SETUP["long_description"](ADDRESS, VERSION)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    of_version = re.compile(rf"{ADDRESS}/(?:blob|raw)/v{VERSION}/([^#]+)")
    ours = [found[1] for target in targets if (found := of_version.match(target))]
    assert len(ours) > 10
    assert [path for path in ours if not (ROOT / path).exists()] == []
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert re.search(r"!\[[^]]*\]\(\S+/raw/\S+\.png\)", text)


def test_without_an_address_the_long_description_names_files_and_links_to_none():
    text = SETUP["long_description"]("", VERSION)
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)]+)\)", text))
    assert "![" not in text
    assert "[docs/method.md]" not in text
    assert "`docs/method.md`" in text
    assert "Install (`docs/install.md`)" in text
    assert SETUP["urls"]("") == {}


def test_the_urls_are_of_the_one_address():
    assert SETUP["urls"](ADDRESS)["Repository"] == ADDRESS
    assert all(url.startswith(ADDRESS) for url in SETUP["urls"](ADDRESS).values())


def test_the_version_is_that_of_the_changelog():
    heads = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [(name, date) for name, date in heads if name != "Unreleased"]
    assert released[0][0] == VERSION
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
