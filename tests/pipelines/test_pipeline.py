"""`Pipeline` and `Comparison` as a notebook uses them, on a tiny real model."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.conftest import byte_tokenizer
from tiny_models import tiny_model

from e3pruner import PruningPlan
from e3pruner.cli.commands.run import run
from e3pruner.pipelines import Comparison, Pipeline

SMALL: dict[str, Any] = {"length": 32, "sequences": 4, "held_out": 4, "steps": 2, "method": "greedy"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SMALL | {"model": str(folder), "text": str(text_file)}


def test_a_pipeline_from_yaml_is_that_of_python(settings: dict[str, Any], tmp_path: Path) -> None:
    options = settings | {"fraction": 0.5, "protect": [5], "rounds": 2, "recover": {"lr": 3e-4}}
    made = Pipeline(out=tmp_path / "python", **options).run()
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(options).replace("0.0003", "3e-4"))
    read = Pipeline.from_yaml(tmp_path / "pipeline.yaml", out=tmp_path / "yaml").run()
    assert read["models"] == made["models"]
    plan = PruningPlan.load(tmp_path / "python" / "pruning.json")
    assert len(plan.removed) == 3
    assert 5 in plan.kept
    again = Pipeline.from_yaml(tmp_path / "python" / "e3.yaml", out=tmp_path / "again")
    assert again.settings() | {"out": None} == Pipeline(out=tmp_path, **options).settings() | {"out": None}


def test_the_command_has_every_option_of_the_pipeline_and_its_default() -> None:
    command = {name: p.default for name, p in inspect.signature(run).parameters.items()}
    for field in dataclasses.fields(Pipeline):
        assert field.name in command
        if field.default not in (dataclasses.MISSING, None) and field.default != []:
            assert command[field.name] == field.default, field.name
    of_the_command = {"ctx", "config", "force", "push_to_hub"}
    assert set(command) - {field.name for field in dataclasses.fields(Pipeline)} == of_the_command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": 2.5}, "drop=2.5 is no integer or null"),
        ({"drop": True}, "drop=True is no integer"),
        ({"drop": 0}, "drop=0 must be an integer from 1"),
        ({"drop": 2, "fraction": 0.5}, "drop=2 is one target, fraction=0.5 another"),
        ({"fraction": float("nan")}, "fraction=nan must be between 0 and 1"),
        ({"method": "gredy"}, "did you mean 'greedy'"),
        ({"search": {"step": 3}, "method": "gumbel-topk"}, "did you mean 'steps'"),
        ({"search": {"steps": "many"}, "method": "gumbel-topk"}, "steps='many' is no integer"),
        ({"recover": {"weightin": "none"}}, "did you mean 'weighting'"),
        ({"recover": {"lr": "fast"}}, "lr='fast' is no number"),
        ({"recover": [1]}, r"recover=\[1\] is no mapping"),
        ({"protect": ["a"]}, "is no list of integer"),
        ({"rivals": ["greedy"]}, "must be methods other than greedy"),
        ({"rounds": 2, "curve": 3}, "of a run with one round"),
        ({"compensate": "auto"}, "--compensate auto needs --judge"),
        ({"device": "abacus"}, "device='abacus' cannot be used here"),
        ({"dtype": "fp8"}, "dtype='fp8' must be one of"),
        ({"steps": 0}, "steps=0 must be an integer from 1"),
        ({"written": True}, "written=True adds to the built-in text"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_written(
    change: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Pipeline(out=tmp_path / "out", **settings | change)
    assert list(tmp_path.iterdir()) == []


def test_rivals_and_prompts_are_of_any_pipeline(settings: dict[str, Any], tmp_path: Path) -> None:
    extra = {"rivals": ["last-n", "bi"], "curve": 2, "prompts": ["def"], "new_tokens": 3}
    results = Pipeline(out=tmp_path / "out", drop=2, **settings | extra).run()
    assert [method["method"] for method in results["methods"]] == ["greedy", "last-n", "bi"]
    assert results["methods"][1]["removed"] == [4, 5]
    assert set(results["curve"]) == {"greedy", "last-n", "bi"}
    assert set(results["generations"][0]["answers"]) == {"dense", "pruned", "recovered"}


def test_a_comparison_takes_shares_of_the_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    matrix = {name: settings[name] for name in ("model", "length")} | {"text": [settings["text"]]}
    matrix |= {"methods": ["last-n"], "seeds": [0], "fraction": [0.17, 0.5], "sequences": 2, "held_out": 2}
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(matrix))
    comparison = Comparison.from_yaml(tmp_path / "matrix.yaml", tmp_path / "out")
    rows = comparison.run()
    assert [row["removed"] for row in rows] == [[5], [3, 4, 5]]
    comparison.save(rows)
    assert {"comparison.md", "results.json", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}
