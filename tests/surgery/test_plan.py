import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3pruner.surgery import PruningPlan


def plan(**changes):
    values = {"kept": [0, 2, 3], "removed": [1, 4], "method": "bi", "seed": 3, "model_type": "llama"}
    return PruningPlan(**values | {"history": [{"step": 0, "kl": 0.5}], "metrics": {"kl": 0.25}} | changes)


def test_saves_and_loads_the_same_plan(tmp_path):
    plan().save(tmp_path / "pruning.json")
    assert PruningPlan.load(tmp_path / "pruning.json") == plan()
    assert [path.name for path in tmp_path.iterdir()] == ["pruning.json"]


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_of_removed_is_complete_disjoint_and_ascending(drawn):
    num_layers, removed = drawn
    made = PruningPlan.of_removed(removed, num_layers)
    assert made.removed == sorted(removed)
    assert sorted(made.kept + made.removed) == list(range(num_layers))
    assert made.kept == sorted(made.kept)
    assert made.num_layers == num_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": [0, 2, 5]}, "kept holds 5; a layer index is an integer from 0 to 4"),
        ({"kept": [0, 2, 2]}, "kept=.* names a layer twice"),
        ({"kept": [0, 1, 3]}, r"kept and removed both hold the layers \[1\]"),
        ({"removed": [1, -4]}, "removed holds -4"),
        ({"removed": [True, 4]}, "removed holds True"),
        ({"removed": [1.0, 4]}, "removed holds 1.0"),
        ({"kept": [], "removed": [0, 1]}, "kept=.* keeps no layer"),
        ({"kept": (0, 2, 3)}, "kept must be a list"),
        ({"seed": "3"}, "seed must be a int"),
    ],
)
def test_refuses_indices_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "Expecting|Unterminated|delimiter"),
        (lambda text: "", "Expecting value"),
        (lambda text: "[1, 2]", "it has no .format."),
        (lambda text: text.replace("e3pruner.PruningPlan", "other"), "it has no .format."),
        (lambda text: text.replace('"kept"', '"keep"'), r"its fields .*'keep'.* should be .*'kept'"),
        (lambda text: text.replace('"num_layers": 5', '"num_layers": 6'), "num_layers is 6, kept and removed hold 5"),
        (lambda text: json.dumps(json.loads(text) | {"removed": [1, 1]}), "removed=.* twice"),
        (lambda text: json.dumps(json.loads(text) | {"removed": None}), "removed must be a list"),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (lambda text: '{"a":' * 100_000, "nested too deeply"),
        (lambda text: text.replace('"kept": [', '"kept": [' + "[" * 200 + "]" * 200 + ","), "kept holds"),
        (lambda text: text.replace('"num_layers": 5', '"num_layers": null'), "num_layers is None"),
        *(
            (lambda text, name=name, value=value: json.dumps(json.loads(text) | {name: value}), name)
            for name in ("kept", "removed", "method", "seed", "model_type", "history", "metrics", "sublayers")
            for value in (None, {} if name in ("kept", "removed", "history") else [], 1.5, True)
        ),
        (lambda text: json.dumps(json.loads(text) | {"kept": [], "removed": [], "num_layers": 0}), "keeps no layer"),
        (lambda text: json.dumps(json.loads(text) | {"kept": [[0], 2, 3]}), r"kept holds \[0\]"),
        (lambda text: json.dumps(json.loads(text) | {"history": [1, None]}), r"history\[0\]"),
        (lambda text: json.dumps(json.loads(text) | {"sublayers": {"attention": None, "mlp": []}}), "sublayers"),
        (lambda text: json.dumps(json.loads(text) | {"sublayers": {"attention": {}, "mlp": [[1]]}}), "sublayers"),
        (lambda text: json.dumps(json.loads(text) | {"sublayers": {"attention": []}}), "sublayers"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, damage, message):
    path = tmp_path / "pruning.json"
    plan().save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"pruning\.json is not a pruning plan: .*({message})"):
        PruningPlan.load(path)


def test_bytes_that_are_no_text_are_a_damaged_file(tmp_path):
    path = tmp_path / "pruning.json"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"pruning\.json is not a pruning plan"):
        PruningPlan.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "pruning.json"
    plan().save(path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        plan(metrics={"kl": object()}).save(path)
    assert PruningPlan.load(path) == plan()
    assert [entry.name for entry in tmp_path.iterdir()] == ["pruning.json"]
