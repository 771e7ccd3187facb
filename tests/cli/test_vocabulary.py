"""One vocabulary: a command has every option of what it does, under one name, with one default and one help text."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from e3pruner.cli import app

WEIGHTS = ["demo", "run", "search", "prune", "cache-teacher", "distill", "eval", "generate"]
PROFILES = ["profile model", "profile step", "profile ops"]
WRITERS = ["demo", "run", "search", "prune", "cache-teacher", "distill", "eval", *PROFILES]
READERS = ["demo", "run", "search", "cache-teacher", "distill", "eval", "profile step"]
SEARCHES = ["demo", "run", "search", "profile step"]

# By option: the commands that do what it is about, and of these the ones that lack it, with the reason.
TABLE: dict[str, tuple[list[str], dict[str, str]]] = {
    "drop": (SEARCHES, {}),
    "fraction": (SEARCHES, {}),
    "protect": (SEARCHES, {}),
    "method": (SEARCHES, {"demo": "it shows one", "profile step": "it takes the default's step apart"}),
    "search": (SEARCHES, {"demo": "it shows one", "profile step": "it takes the default's step apart"}),
    "recover": (["run", "search", "distill"], {}),
    "track": (["run", "distill"], {}),
    "text": (READERS, {}),
    "length": (READERS, {}),
    "batch": ([*READERS, "profile model"], {}),
    "sequences": (["demo", "run", "search"], {}),
    "held_out": (["demo", "run", "distill", "eval"], {}),
    "model": ([*WEIGHTS, "profile model", "profile step", "plan"], {"cache-teacher": "its model is the --teacher"}),
    "out": ([*WRITERS, "compare", "bench"], {}),
    "force": (WRITERS, {}),
    "config": ([*WRITERS, "generate"], {}),
    "seed": ([*WRITERS, "generate"], {"prune": "nothing is random"}),
    "device": ([*WEIGHTS, "compare", *PROFILES], {"prune": "it copies files"}),
    "dtype": ([*WEIGHTS, *PROFILES], {}),
    "placement": (["search", "cache-teacher", "eval"], {}),  # forward passes alone
    "trust_remote_code": ([*WEIGHTS, "compare", "profile model", "profile step", "plan"], {}),
    "vocabulary": (["cache-teacher", "distill", "eval", "profile ops"], {}),
}
# Where one name means another thing, or stands for a set.
OWN_DEFAULTS = {
    ("cache-teacher", "batch"): "nothing but one forward pass",
    ("profile model", "batch"): "decoding is one sequence",
    ("demo", "sequences"): "fewer with --quick",
    ("demo", "held_out"): "fewer with --quick",
    ("profile ops", "dtype"): "several",
    ("profile ops", "vocabulary"): "a size",
    ("demo", "out"): "demo-out",
    ("demo", "model"): "smollm2",
}


def commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found |= {f"{name} {part}": each for part, each in below.items()} if below else {name: command}
    return found


def parameters(name: str) -> dict[str, Any]:
    return {each.name.rstrip("_"): each for each in commands()[name].params} | {
        alias.removeprefix("--").replace("-", "_"): each
        for each in commands()[name].params
        for alias in each.opts
        if alias.startswith("--")
    }


@pytest.mark.parametrize("option", TABLE)
def test_a_command_has_every_option_of_what_it_does(option: str) -> None:
    asked, lacks = TABLE[option]
    having = {name for name in commands() if option in parameters(name)}
    assert set(asked) - set(lacks) <= having
    assert not set(lacks) & having, "the reason is no longer one"


@pytest.mark.parametrize("option", TABLE)
def test_an_option_has_one_default_everywhere(option: str) -> None:
    names = [name for name in TABLE[option][0] if option in parameters(name) and (name, option) not in OWN_DEFAULTS]
    defaults = {name: str(parameters(name)[option].default) for name in names}
    if option not in ("model", "out"):  # which have none
        assert len(set(defaults.values())) == 1, defaults


def test_the_table_speaks_of_every_command() -> None:
    spoken = {name for asked, _ in TABLE.values() for name in asked}
    assert set(commands()) - spoken == {"info", "report", "profile trace"}  # of finished things


@pytest.mark.parametrize("name", [name for name in SEARCHES if name != "run"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--drop", "2", "--fraction", "0.5"), "drop=2 is one target, fraction=0.5 another"),
        (("--fraction", "1.5"), "fraction=1.5 must be between 0 and 1"),
        (("--drop", "0"), "drop=0 must be an integer from 1"),
    ],
)
def test_a_bad_number_of_layers_is_wrong_usage_before_anything_is_written(
    name: str, given: tuple[str, ...], message: str, tmp_path: Any
) -> None:
    place = ["smollm2"] if name == "profile step" else ["--model", "smollm2"]
    call = [*name.split(), *place, "--out", str(tmp_path / "out"), *given]
    result = CliRunner().invoke(app, call)
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert message in " ".join(result.stderr.split())


def test_speculation_is_called_experimental() -> None:
    (option,) = [each for each in commands()["generate"].params if each.name == "speculative"]
    assert option.help.startswith("Experimental")
