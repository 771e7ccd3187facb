"""What an index and a reader of the package see, before anything is built."""

import re
import runpy
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
