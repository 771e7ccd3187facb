"""e3 compare on a tiny real model: every cell once, on the same tokens, whatever interrupts it."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.conftest import Command, byte_tokenizer
from tiny_models import NUM_LAYERS, tiny_model
from transformers import AutoModelForCausalLM

import e3pruner
from e3pruner.pipelines import Matrix
from e3pruner.pipelines.comparison import CELLS_FILE, Comparison, read_rows, texts_of
from e3pruner.surgery import PruningPlan
from e3pruner.text.kinds import KindsOfText, kinds_of_text, windows

latency = importlib.import_module("e3pruner.evaluation.latency")  # which the function of its name hides

MATRIX = {
    "methods": ["greedy", "last-n", {"method": "gumbel-topk", "name": "short", "search": {"steps": 2, "samples": 3}}],
    "drop": [1, 3],
    "seeds": [0, 1],
    "sequences": 4,
    "held_out": 3,
    "length": 32,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def settings(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    other = tmp_path_factory.mktemp("kinds") / "numbers.txt"
    other.write_text(" ".join(str(number**3) for number in range(1500)), encoding="utf-8")
    return MATRIX | {"model": str(model_folder), "text": [str(text_file), str(other)]}


@pytest.fixture
def matrix_file(settings: dict[str, Any], tmp_path: Path) -> Path:
    return written(tmp_path / "matrix.yaml", settings)


def written(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, e3: Command) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    result = e3("compare", written(folder / "matrix.yaml", settings), "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return folder / "out"


def comparison(settings: dict[str, Any], folder: Path) -> Comparison:
    folder.mkdir(exist_ok=True)
    matrix = Matrix.from_yaml(written(folder / "matrix.yaml", settings))
    texts = texts_of(matrix, byte_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(matrix.model, dtype=torch.float32).eval()
    return Comparison(matrix, model, texts, folder)


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def test_every_cell_has_one_row(compared: Path) -> None:
    rows = read_rows(compared / CELLS_FILE)
    assert len(rows) == len({row["key"] for row in rows}) == 3 * 2 * 2
    for row in rows:
        assert len(row["removed"]) == row["drop"]
        assert row["seconds"] > 0
        assert len(row["held_out"]) == 2
    assert {"results.json", "comparison.md", "report.html", "quality.png", "price.png", "depth.png"} <= {
        path.name for path in compared.iterdir()
    }


def test_the_table_shows_mean_and_spread_over_the_seeds(compared: Path) -> None:
    rows = [row for row in read_rows(compared / CELLS_FILE) if (row["method"], row["drop"]) == ("greedy", 3)]
    overall = [sum(kind["kl"] for kind in row["held_out"].values()) / 2 for row in rows]
    lines = json.loads((compared / "results.json").read_text())["comparison"]
    (line,) = [line for line in lines if (line["method"], line["drop"]) == ("greedy", 3)]
    assert line["kl"] == pytest.approx([sum(overall) / 2, min(overall), max(overall)])
    assert line["seeds"] == 2
    table = (compared / "comparison.md").read_text()
    assert f"| greedy | {line['kl'][0]:.3f}" in table
    assert "## 1 layer removed" in table
    assert "greedy" in (compared / "report.html").read_text()
    for drop in (1, 3):
        means = [line["kl"][0] for line in lines if line["drop"] == drop]
        assert means == sorted(means)


def test_a_cell_is_the_search_and_the_evaluation_by_themselves(settings: dict[str, Any], tmp_path: Path) -> None:
    one = comparison(settings | {"drop": [3], "seeds": [1]}, tmp_path / "one")
    rows = one.run()
    calibration = one.texts[""].calibration_of(1, 4)
    plan = e3pruner.search(one.model, [calibration], 3, "greedy", 1, precision="fp32", progress=False)
    assert rows[0]["removed"] == plan.removed
    assert rows[0]["cost"] == pytest.approx(plan.metrics["cost"])
    assert rows[0]["calibration_kl"] == pytest.approx(plan.metrics["kl"])
    pruned = e3pruner.prune(one.model, plan)
    for kind, sequences in one.texts[""].held_out.items():
        expected = e3pruner.evaluate(pruned, [sequences], one.model, progress=False)
        for name in ("kl", "perplexity", "top1_agreement"):
            assert rows[0]["held_out"][kind][name] == pytest.approx(expected[name], rel=1e-4), name


def test_an_interrupted_comparison_goes_on_with_the_cell_it_was_at(
    settings: dict[str, Any], compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def interrupting(self: Comparison, cell: Any) -> dict[str, Any]:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(cell)
        return real(self, cell)

    real = Comparison.measure
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "measure", interrupting)
        with pytest.raises(KeyboardInterrupt):
            comparison(settings, tmp_path / "out").run()
    assert len(read_rows(tmp_path / "out" / CELLS_FILE)) == 5
    rows = comparison(settings, tmp_path / "out").run()
    assert figures(rows) == figures(read_rows(compared / CELLS_FILE))
    measured[:] = range(5)  # from here on, a cell that is measured again interrupts
    monkeypatch.setattr(Comparison, "measure", interrupting)
    assert comparison(settings, tmp_path / "out").run() == rows
    with pytest.raises(KeyboardInterrupt):
        comparison(settings | {"seeds": [0, 1, 2]}, tmp_path / "out").run()


@pytest.mark.parametrize("name", ["key", "drop", "removed", "cost", "seconds", "held_out"])
def test_a_damaged_cell_is_named(compared: Path, tmp_path: Path, name: str) -> None:
    lines = (compared / CELLS_FILE).read_text(encoding="utf-8").splitlines()
    for wrong in (None, True, [None], {"manual": None}):
        lines[1] = json.dumps(json.loads(lines[1]) | {name: wrong})
        (tmp_path / CELLS_FILE).write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"cells\.jsonl, line 2 is damaged: {name}"):
            read_rows(tmp_path / CELLS_FILE)


def test_cells_share_what_they_measure_and_pay_for_it_all_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    alone = comparison(settings | {"methods": ["greedy"], "drop": [3], "seeds": [0]}, tmp_path / "alone").run()
    both = comparison(settings | {"methods": ["leave-one-out", "greedy"], "seeds": [0]}, tmp_path / "both")
    shared = next(row for row in both.run() if (row["method"], row["drop"]) == ("greedy", 3))
    for key in ("removed", "cost", "held_out"):
        assert shared[key] == alone[0][key], key
    masks = [key for key in both.calibration(next(both.matrix.cells())).store.measured if key.startswith("kl 0 ")]
    assert len(masks) == NUM_LAYERS + (NUM_LAYERS - 1) + (NUM_LAYERS - 2)  # greedy's first round is leave-one-out


def test_the_models_of_the_first_seed_write(
    settings: dict[str, Any], tmp_path: Path, e3: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison used to say nothing of free-running text, which a cut damages most."""
    monkeypatch.setattr(latency, "_MOST_ROUNDS", 5)
    tokenizer = byte_tokenizer()
    network = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=150)
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "model")
    recover = {"name": "healed", "recover": {"steps": 1}}
    few = {"methods": ["last-n"], "drop": [2], "seeds": [0, 1], "writing": 1, "recoveries": ["none", recover]}
    matrix = settings | few | {"model": str(tmp_path / "model")}
    out = tmp_path / "out"
    result = e3("compare", written(tmp_path / "matrix.yaml", matrix), "--out", out)
    assert result.exit_code == 0, result.output
    rows = read_rows(out / CELLS_FILE)
    assert [("writing" in row) for row in rows] == [row["seed"] == 0 for row in rows]
    results = json.loads((out / "results.json").read_text())
    for line in results["comparison"]:
        assert line["writing"].keys() == {"loops", "tokens", "right", "request_speed"}
    assert results["dense_writing"]["request_speed"][0] == 1
    names = sorted(list(item["answers"]) for item in results["generations"])
    assert names == [["dense", "last-n, 2 fewer"], ["dense", "last-n, 2 fewer, healed"]]
    assert "end in a loop" in (out / "report.html").read_text()
    before = (out / "measured" / "dense.json").read_bytes()
    assert e3("compare", tmp_path / "matrix.yaml", "--out", out).exit_code == 0
    assert (out / "measured" / "dense.json").read_bytes() == before


def test_recoveries_heal_what_was_cut(settings: dict[str, Any], tmp_path: Path) -> None:
    recoveries = ["none", "compensate", {"recover": {"steps": 12, "lr": 1e-3}, "name": "trained"}]
    changes = {"methods": ["last-n"], "drop": [3], "seeds": [0], "recoveries": recoveries}
    rows = comparison(settings | changes, tmp_path / "recovered").run()
    assert [row["recovery"] for row in rows] == ["none", "compensate", "trained"]
    kl = [sum(kind["kl"] for kind in row["held_out"].values()) for row in rows]
    assert kl[1] <= kl[0] * 1.05
    assert kl[2] < kl[0]


def test_a_compensation_is_judged_on_a_kind_that_it_is_not_fitted_to(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {"methods": ["last-n"], "drop": [3], "seeds": [0], "recoveries": ["compensate"]}
    prepared = comparison(settings | changes, tmp_path / "judged")
    fitted, judge = prepared._compensation(prepared.texts[""])
    by_kind = {
        kind: kinds_of_text(byte_tokenizer(), [kind], length=32, held_out=3).training for kind in settings["text"]
    }
    first, last = ({tuple(row) for row in rows.tolist()} for rows in by_kind.values())
    assert {tuple(row) for row in fitted.tolist()} <= first
    assert {tuple(row) for row in judge.tolist()} <= last
    assert len(fitted) == len(judge) > 0
    # Other text to fit to is another cell.
    (cell,) = prepared.matrix.cells()
    key = prepared.key(cell)
    prepared.texts[""].training[0, 0] += 1
    assert prepared.key(cell) != key


def test_of_unseen_kinds_nothing_is_calibrated_or_trained_on(settings: dict[str, Any], tmp_path: Path) -> None:
    seen, unseen = settings["text"]
    changes = {"methods": ["bi", "last-n"], "drop": [3], "seeds": [0], "text": [seen], "unseen": [unseen]}
    prepared = comparison(settings | changes, tmp_path / "unseen")
    alone = kinds_of_text(byte_tokenizer(), [seen], length=32, held_out=3)
    assert torch.equal(prepared.texts[""].training, alone.training)
    assert torch.equal(prepared.texts[""].calibration, alone.calibration)
    assert set(prepared.run()[0]["held_out"]) == {seen, unseen}
    prepared.save(prepared.run())
    assert f"No step saw text of the kinds {unseen}." in (tmp_path / "unseen" / "comparison.md").read_text()


def test_each_kind_is_left_out_once_and_judged_then(settings: dict[str, Any], tmp_path: Path) -> None:
    recoveries = ["none", {"recover": {"steps": 3, "lr": 1e-3}, "name": "trained"}]
    changes = {"methods": ["bi", "last-n"], "drop": [2], "seeds": [0, 1], "recoveries": recoveries}
    prepared = comparison(settings | changes | {"leave_one_out": True}, tmp_path / "folds")
    rows = prepared.run()
    assert len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        assert list(row["held_out"]) == [row["left_out"]]
    other = {kind: kinds_of_text(byte_tokenizer(), [kind], length=32, held_out=3) for kind in settings["text"]}
    for left_out, text in prepared.texts.items():
        (seen,) = (other[kind] for kind in settings["text"] if kind != left_out)
        assert torch.equal(text.training, seen.training)
    lines = prepared.save(rows)["comparison"]
    assert len(lines) == 4
    for line in lines:
        assert line["seeds"] == 2
        assert set(line["kinds"]) == set(settings["text"])
        assert (line["paired"] is None) == (line["method"] == "bi")
        assert len(line["removed"]) == 4
    (same,) = {line["agreement"] for line in lines if line["method"] == "last-n"}
    assert same == 1.0
    assert "Each kind of text was left out once" in (tmp_path / "folds" / "comparison.md").read_text()


def test_methods_are_compared_sequence_by_sequence(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {"methods": ["greedy", "last-n"], "drop": [3], "seeds": [1]}
    prepared = comparison(settings | changes, tmp_path / "paired")
    rows = prepared.run()
    by_hand = []
    for kind, tokens in prepared.texts[""].held_out.items():
        of_each = [[], []]
        for row, found in zip(rows, of_each, strict=True):
            pruned = e3pruner.prune(prepared.model, PruningPlan.of_removed(row["removed"], NUM_LAYERS))
            for sequence in tokens.split(1):
                found.append(e3pruner.evaluate(pruned, [sequence], prepared.model, progress=False)["kl"])
            assert row["held_out"][kind]["sequences"]["kl"] == pytest.approx(found, rel=1e-4)
        by_hand.append(torch.tensor(of_each[1]) - torch.tensor(of_each[0]))
    (line,) = (line for line in prepared.save(rows)["comparison"] if line["method"] == "last-n")
    mean, error = line["paired"]
    assert mean == pytest.approx(sum(float(each.mean()) for each in by_hand) / 2, rel=1e-3)
    variances = [float(each.var()) / len(each) for each in by_hand]
    assert error == pytest.approx(sum(variances) ** 0.5 / 2, rel=1e-3)


def test_a_recovery_may_train_the_layers_beside_the_cuts(settings: dict[str, Any], tmp_path: Path) -> None:
    options = {"steps": 2, "lr": 1e-3}
    recoveries = [{"recover": options | {"trainable": kind}, "name": kind} for kind in ("cuts", "all")]
    changes = {"methods": ["last-n"], "drop": [1], "seeds": [0], "recoveries": recoveries}
    cuts, whole = figures(comparison(settings | changes, tmp_path / "beside").run())
    assert cuts["held_out"] != whole["held_out"]


def test_held_out_text_shares_no_passage_with_what_was_seen(text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_text(encoding="utf-8")
    copied = tmp_path / "copied.txt"
    copied.write_text(text + text[:2000] + "x" + text[2000:], encoding="utf-8")  # the end repeats the beginning
    plain = kinds_of_text(byte_tokenizer(), [str(text_file)], length=64, held_out=4)
    assert_disjoint(plain)
    with pytest.raises(ValueError, match=r"held_out=4: .*copied\.txt' has [0-3] sequences of 64 unseen tokens"):
        kinds_of_text(byte_tokenizer(), [str(copied)], length=64, held_out=4)


def assert_disjoint(text: KindsOfText) -> None:
    seen = {
        tuple(w) for part in (text.calibration, text.training) for w in part.unfold(1, 32, 1).flatten(0, 1).tolist()
    }
    for sequences in text.held_out.values():
        assert seen.isdisjoint(map(tuple, sequences.unfold(1, 32, 1).flatten(0, 1).tolist()))


def test_equal_passages_have_equal_hashes_and_others_not() -> None:
    tokens = torch.randint(50, (2, 100), generator=torch.Generator().manual_seed(0))
    tokens[1, 40:80] = tokens[0, 10:50]
    hashes = windows(tokens)
    assert hashes.shape == (2, 69)
    assert torch.equal(hashes[1, 40:49], hashes[0, 10:19])
    assert len(hashes.unique()) == 2 * 69 - 9


def test_built_in_kinds_are_manual_and_code() -> None:
    text = kinds_of_text(byte_tokenizer(), ["manual", "code"], length=256, held_out=32)
    assert {kind: tuple(tokens.shape) for kind, tokens in text.held_out.items()} == {
        "manual": (32, 256), "code": (32, 256)
    }  # fmt: skip
    decoded = byte_tokenizer().decode(text.held_out["code"].flatten())
    assert "import " in decoded
    assert "self." in decoded
    first, second = text.calibration_of(0, 8), text.calibration_of(1, 8)
    assert not torch.equal(first, second)
    assert torch.equal(first, text.calibration_of(0, 8))


def test_what_is_left_of_the_longer_kinds_follows_unless_balanced(tmp_path: Path) -> None:
    for name, numbers in (("short", range(1000)), ("long", range(1000, 3000))):
        (tmp_path / name).write_text(" ".join(map(str, numbers)), encoding="utf-8")
    kinds = [str(tmp_path / name) for name in ("short", "long")]
    balanced, whole = (
        kinds_of_text(byte_tokenizer(), kinds, length=64, held_out=4, balanced=balanced) for balanced in (True, False)
    )
    assert_disjoint(whole)
    assert torch.equal(whole.calibration, balanced.calibration)
    assert torch.equal(whole.training[: len(balanced.training)], balanced.training)
    rest = byte_tokenizer().decode(whole.training[len(balanced.training) :].flatten())
    assert len(rest) > balanced.training.numel() // 4
    assert all(int(number) >= 1000 for number in rest.split()[1:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["magic"]}, r"method='magic' is not known"),
        ({"methods": [{"method": "greedy", "search": {"steps": 3}}]}, r"steps is no option of method='greedy'"),
        ({"methods": ["greedy", "greedy"]}, r"methods holds a name twice"),
        ({"methods": []}, r"lacks methods"),
        ({"drop": [0]}, r"drop=0"),
        ({"drop": [6]}, r"drop=6 must be from 1 to 5"),
        ({"seeds": [-1]}, r"seeds=-1"),
        ({"colour": "red"}, r"has unknown keys: colour; it may have drop, fraction"),
        ({"leave_one_out": True, "unseen": ["code"]}, r"leave_one_out judges on each kind of text=.* and no unseen"),
        ({"leave_one_out": True, "text": ["code"]}, r"leave_one_out judges on each kind of text=.*two or more"),
        ({"leave_one_out": True, "recoveries": ["compensate"]}, r"must name two or more, beside one that is left out"),
        ({"recoveries": ["pray"]}, r"recoveries='pray' must be one of none, compensate"),
        ({"recoveries": [{"recover": {"stepz": 3}}]}, r"stepz"),
        ({"recoveries": [{"name": "hope"}]}, r"recoveries: .* does nothing"),
        ({"recoveries": ["compensate"], "text": ["manual"]}, r"text=\['manual'\] must name two or more"),
        ({"precision": "fp8"}, r"precision='fp8'"),
        ({"text": ["nowhere.txt"]}, r"text: nowhere.txt is neither a file nor one of manual, code"),
        ({"held_out": 10**6}, r"held_out=1000000: .* unseen tokens"),
    ],
)
def test_a_bad_matrix_is_refused_before_anything_is_measured(
    change: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path, e3: Command
) -> None:
    result = e3("compare", written(tmp_path / "bad.yaml", settings | change), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))
    assert not (tmp_path / "out" / CELLS_FILE).exists()


def test_a_folder_of_something_else_is_left_alone(matrix_file: Path, tmp_path: Path, e3: Command) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    result = e3("compare", matrix_file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no comparison goes on there" in " ".join(result.stderr.split())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
