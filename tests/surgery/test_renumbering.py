"""Rules by which quantisers and adapters name modules, under new numbers of layers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3pruner.surgery.renumbering import Renumbering, matches, matches_glob

KEPT = [0, 3, 10, 12]
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate", "mlp.gate_proj", "mlp.experts.3.up_proj")
MODULES = [f"model.layers.{i}.{part}" for i in range(13) for part in PARTS] + ["lm_head", "vision.layers.3.fc"]


def renumbering(kept=KEPT):
    return Renumbering(["model.layers."], {old: new for new, old in enumerate(kept)}, MODULES)


def moved(name, kept=KEPT):
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    return name if found is None else f"model.layers.{kept.index(int(found[1]))}.{found[2]}"


def stays(name, kept=KEPT):
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is None or int(found[1]) in kept


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.3.mlp.gate", ["model.layers.1.mlp.gate"]),
        ("layers.12.mlp", ["layers.3.mlp"]),
        ("model.layers.10", ["model.layers.2"]),
        ("model.layers.4.mlp.gate", []),
        ("model.layers.10.mlp.experts.3.up_proj", ["model.layers.2.mlp.experts.3.up_proj"]),
        ("vision.layers.3.fc", ["vision.layers.3.fc"]),
        ("mlp.experts.3.up_proj", ["mlp.experts.3.up_proj"]),
        ("re:.*lm_head", ["re:.*lm_head"]),
        (r"re:.*mlp\.gate$", [r"re:.*mlp\.gate$"]),
        ("model.layers.*.mlp.gate", ["model.layers.*.mlp.gate"]),
        (r"-:model\.layers\.10\..*gate.*", [r"-:model\.layers\.2\..*gate.*"]),
        (r"+:.*\.4\..*gate.*", []),
        ("W8A8 (int)", ["W8A8 (int)"]),
        ("4.57.1", ["4.57.1"]),
    ],
)
def test_a_rule_under_new_numbers(rule, expected):
    assert renumbering().rule(rule) == expected


@pytest.mark.parametrize("kept", [KEPT, [1, 2, 3], [12], list(range(13))])
@pytest.mark.parametrize(
    "rule",
    [
        r"re:.*\.18\..*gate.*",
        r"-:.*\.3\..*gate.*",
        r"re:model\.layers\.(1|2|3|10)\.mlp.*",
        r"re:.*layers\.[0-4]\..*",
        r"re:model\.layers\.1.*",
        r"re:(?!.*\.1\d\.).*q_proj",
        r"re:.*layers\.\d\.self_attn.*",
    ],
)
def test_a_pattern_speaks_of_the_same_modules(rule, kept):
    body = rule.partition(":")[2]
    before = {moved(name, kept) for name in MODULES if stays(name, kept) and matches(body, name)}
    after = renumbering(kept).rule(rule)
    new = {moved(name, kept) for name in MODULES if stays(name, kept)}
    found = {name for name in new for each in after if matches(each.partition(":")[2], name)}
    assert found == before


@given(
    st.sets(st.integers(0, 12), min_size=1),
    st.sampled_from([r"model\.layers\.[{}]\..*", r".*\.({}|11)\.mlp.*", r".*layers\.{}.*"]),
    st.integers(0, 9),
)
def test_any_pattern_and_any_layers(kept, pattern, number):
    kept, body = sorted(kept), pattern.format(number)
    before = {moved(name, kept) for name in MODULES if stays(name, kept) and matches(body, name)}
    after = renumbering(kept).rule(body)
    new = {moved(name, kept) for name in MODULES if stays(name, kept)}
    assert {name for name in new if any(matches(each, name) for each in after)} == before


@pytest.mark.parametrize("rule", ["*lm_head*", "model.layers.1*", "*.3.mlp*", "model.layers.12.*"])
def test_a_glob_speaks_of_the_same_modules(rule):
    before = {moved(name) for name in MODULES if stays(name) and matches_glob(rule, name)}
    after = renumbering().rule(rule, matches_glob)
    found = {name for name in map(moved, filter(stays, MODULES)) if any(matches_glob(each, name) for each in after)}
    assert found == before


def test_settings_keep_their_form():
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.2.mlp", "model.layers.3.mlp"],
        "dynamic": {r"-:model\.layers\.3\..*": {}, r"+:.*\.10\..*": {"bits": 8}, r"-:.*\.5\..*": {}},
        "groups": [{"targets": ["Linear"], "weights": {"num_bits": 4}}],
        "shapes": {"model.layers.12.mlp.gate.weight": [4, 4], "model.layers.11.mlp.gate.weight": [4, 4]},
    }
    found = renumbering().settings(settings)
    assert found["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp"]
    assert found["shapes"] == {"model.layers.3.mlp.gate.weight": [4, 4]}
    assert list(found["dynamic"].values()) == [{}, {"bits": 8}]
    assert next(iter(found["dynamic"])) == r"-:model\.layers\.1\..*"
    assert {key: found[key] for key in ("quant_method", "bits", "groups")} == {
        key: settings[key] for key in ("quant_method", "bits", "groups")
    }
