"""`e3 run`: the whole way from one YAML file, in rounds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.conftest import Command, pipeline_file
from huggingface_hub import HfApi
from recovery.test_tracking import curves
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from e3pruner import PruningPlan, prune


@pytest.fixture(scope="module")
def settings(model_folder: Path, text_file: Path) -> dict[str, Any]:
    return {"model": str(model_folder), "text": str(text_file)}


def test_two_rounds_leave_one_model(tmp_path: Path, settings: dict[str, Any], e3: Command) -> None:
    out = tmp_path / "out"
    result = e3("run", pipeline_file(tmp_path, **settings, out=str(out)))
    assert result.exit_code == 0, result.output
    files = {"recovered", "pruned", "pruning.json", "results.json", "report.html", "e3.yaml"}
    assert {path.name for path in out.iterdir() if path.suffix != ".png"} == files
    results = json.loads((out / "results.json").read_text())
    names = ["dense", *(f"{kind}, round {number}" for number in (1, 2) for kind in ("pruned", "recovered"))]
    assert [(model["name"], model["layers"]) for model in results["models"]] == list(
        zip(names, [6, 5, 5, 3, 3], strict=True)
    )
    for number in (1, 3):
        assert results["models"][number + 1]["kl"] < results["models"][number]["kl"]
    plan = PruningPlan.load(out / "pruning.json")
    assert (plan.removed, len(plan.kept)) == (results["removed"], 3)
    assert [len(curve["train"]) for curve in results["rounds"]] == [3, 3]
    assert AutoModelForCausalLM.from_pretrained(out / "recovered").config.num_hidden_layers == 3
    assert str(out / "recovered") in result.stdout
    check_card(out / "recovered" / "README.md", out / "e3.yaml")

    again = e3("run", out / "e3.yaml", "--out", tmp_path / "again", "--track", "tensorboard")
    assert again.exit_code == 0, again.output
    weights = "recovered/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
    for number, curve in enumerate(results["rounds"], start=1):
        tracked = curves(tmp_path / "again" / "tensorboard" / f"round-{number}")
        assert tracked["train/loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in curve["train"]]


def check_card(card: Path, settings: Path) -> None:
    """It holds the options of the run, paths by their last names, and the steps that were made: 3 in each round."""
    text = card.read_text()
    said = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    given = {name: value for name, value in yaml.safe_load(settings.read_text()).items() if value is not None}
    given.pop("files")
    assert said == given | {name: Path(given[name]).name for name in ("model", "text", "out")}
    assert "in 6 steps, on" in text
    assert str(card.parents[1]) not in text


@pytest.mark.parametrize("name", ["recover", "steps"])
def test_a_card_counts_the_steps_that_were_made(
    name: str, tmp_path: Path, settings: dict[str, Any], e3: Command
) -> None:
    """`recover: {steps: 2}` wins over `steps: 3`."""
    changes = {"recover": {"steps": 2}} if name == "recover" else {"steps": 2, "recover": {}}
    given = pipeline_file(tmp_path, **settings | {"rounds": 1, "drop": 1} | changes)
    result = e3("run", given, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "in 2 steps, on" in (tmp_path / "out" / "recovered" / "README.md").read_text()


def test_the_recovered_model_is_pushed(
    tmp_path: Path, settings: dict[str, Any], e3: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(HfApi, "whoami", lambda _: {"name": "owner"})
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **given: pushed.append(given))
    pipeline = pipeline_file(tmp_path, **settings | {"rounds": 1, "drop": 1, "steps": 1})
    result = e3("run", pipeline, "--out", tmp_path / "out", "--push-to-hub", "owner/name")
    assert result.exit_code == 0, result.output
    assert [(each["repo_id"], each["folder_path"]) for each in pushed] == [
        ("owner/name", tmp_path / "out" / "recovered")
    ]


def dtypes(folder: Path) -> set[torch.dtype]:
    """Of the weights in a checkpoint, and of what its configuration promises."""
    promised = AutoConfig.from_pretrained(folder).dtype
    return {promised, *(tensor.dtype for tensor in load_file(folder / "model.safetensors").values())}


@pytest.mark.parametrize(("asked", "given"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_what_comes_out_has_the_dtype_that_came_in(
    asked: str | None, given: torch.dtype, tmp_path: Path, settings: dict[str, Any], e3: Command
) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(settings["model"]).save_pretrained(tmp_path / "narrow")
    arguments = ("--dtype", asked) if asked else ()
    pipeline = pipeline_file(tmp_path, **settings | {"model": str(tmp_path / "narrow"), "out": str(tmp_path / "out")})
    result = e3("run", pipeline, *arguments)
    assert result.exit_code == 0, result.output
    assert [dtypes(tmp_path / "out" / name) for name in ("pruned", "recovered")] == [{given}, {given}]


def test_compensation_is_off_unless_asked_for(tmp_path: Path, settings: dict[str, Any], e3: Command) -> None:
    assert e3("run", pipeline_file(tmp_path, **settings, rounds=1), "--out", tmp_path / "out").exit_code == 0
    plan = PruningPlan.load(tmp_path / "out" / "pruning.json")
    dense = AutoModelForCausalLM.from_pretrained(settings["model"])
    expected = prune(dense, plan).state_dict()
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned").state_dict(), expected, rtol=0, atol=0
    )


def test_auto_compensation_is_judged_on_another_text(tmp_path: Path, settings: dict[str, Any], e3: Command) -> None:
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(3000))))
    changes = {"compensate": "auto", "judge": str(tmp_path / "numbers.txt"), "rounds": 1}
    result = e3("run", pipeline_file(tmp_path, **settings | changes), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": 6}, "drop=6"),
        ({"rounds": 4}, "--rounds 4 must not exceed --drop 3"),
        ({"method": "magic"}, "method='magic' must be one of"),
        ({"compensate": "magic"}, "compensate='magic' must be one of"),
        ({"compensate": "auto"}, "--compensate auto needs --judge, text of another kind"),
        ({"recover": {"weighting": "magic"}}, "weighting='magic' must be one of"),
        ({"sequences": 9999}, "--sequences 9999"),
        ({"track": "paper"}, "track='paper' must be one of"),
        ({"recovery": {}}, "unknown keys: recovery"),
    ],
)
def test_run_refuses(
    changes: dict[str, Any], message: str, tmp_path: Path, settings: dict[str, Any], e3: Command
) -> None:
    result = e3("run", pipeline_file(tmp_path, **settings | changes), "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]
