"""The profile of a decoder, on every model type."""

import pytest
import torch
from tiny_models import EXTRA_CONFIGS, NUM_LAYERS, TINY_CONFIGS, tiny_model

from e3kernels.profiling import RangeRecorder
from e3pruner.models import output_head
from e3pruner.profiling import fit
from e3pruner.profiling.ceilings import Ceilings
from e3pruner.profiling.model.engines import Eager, Speed, run, speed_of
from e3pruner.profiling.model.page import decoder_page
from e3pruner.profiling.model.parts import ranged_parts
from e3pruner.profiling.model.profile import PHASES, DecoderProfile, middle, profile_decoder
from e3pruner.profiling.page import write_page
from e3pruner.profiling.work import WorkCounter
from e3pruner.report import describe_environment

CEILINGS = Ceilings(read=2e10, copy=2e10, gemm={"float32": 1e11}, dispatch=1e-6)


# transformers 5.23 cannot keep the last logits only of a gemma4_text without per-layer inputs.
MODEL_TYPES = [name for name in (*TINY_CONFIGS, *EXTRA_CONFIGS) if name != "gemma4_text"]
FAST = ("llama", "gemma2", "gpt2", "opt", "jamba")


@pytest.mark.parametrize(
    "model_type",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_TYPES],
)
def test_every_model_type_has_its_parts(model_type):
    model = tiny_model(model_type)
    profile = profile_decoder(model, prompt=6, tokens=2, rounds=1, removed=(2,))
    for phase in PHASES:
        parts = {(layer, part) for its_phase, layer, part in profile.parts if its_phase == phase}
        for part in ("attention", "ffn", "norm"):
            assert {layer for layer, its_part in parts if its_part == part} >= set(range(NUM_LAYERS)), part
        assert {(None, "head"), (None, "embedding"), (None, "rest")} <= parts
        matrices = [profile.parts[phase, layer, "ffn"] for layer in range(NUM_LAYERS)]
        assert all(row["flops"] > 0 and row["bytes"] > 0 and 0 <= row["python"] <= row["seconds"] for row in matrices)
    assert (profile.runtime_refusal is None) == bool(profile.runtime)
    assert profile.removal_refusal is not None or set(profile.removed) == {2}
    assert sum(profile.weights.values()) == sum(p.nbytes for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_disturbed_round_does_not_count():
    """Each phase keeps its own faster half: 1 and 2 of 1, 9, 2; 3 and 5 of 7, 3, 5."""
    estimates = speed_of([Speed(1, 7), Speed(9, 3), Speed(2, 5)])
    assert {phase: estimate.value for phase, estimate in estimates.items()} == {"prefill": 1.5, "decode": 4}


def test_work_is_that_of_the_shapes():
    """One llama layer's FFN multiplies three matrices of 32 x 48 with each of 2 x 6 tokens."""
    model = tiny_model("llama")
    with torch.no_grad(), ranged_parts(model), RangeRecorder() as recorder, WorkCounter(recorder) as counter:
        run(Eager(model), torch.ones(2, 6, dtype=torch.int64), 1)
    assert counter.work["prefill", "layer 3", "ffn"].flops == 2 * 12 * 3 * 32 * 48
    head = counter.work["prefill", "head"]
    assert head.flops == 2 * 2 * 32 * 99
    assert head.bytes == 4 * (2 * 32 + 32 * 99 + 2 * 99)
    assert counter.work["prefill", "layer 3", "attention", "cache"].flops == 0


def synthetic(layer: float = 2.0) -> DecoderProfile:
    speed = Speed(prefill=10 + NUM_LAYERS * layer, decode=10 + NUM_LAYERS * layer)
    parts = {(phase, index, "ffn"): {"seconds": layer} for phase in PHASES for index in range(NUM_LAYERS)}
    return DecoderProfile(NUM_LAYERS, parts, {"eager": speed}, {}, None, {}, None, {}, None, None, None)


def test_prediction_takes_away_the_layers_own_time():
    profile = synthetic()
    assert profile.predicted("eager", "decode", middle(NUM_LAYERS, 2)) == pytest.approx(22 - 4)
    assert profile.sum_of_parts("eager", "decode") == pytest.approx(12)


@pytest.mark.parametrize(("speedup", "layers"), [(22 / 20, 1), (1.3, 3), (22 / 12, 5), (3, None)])
def test_how_many_layers_must_go(speedup, layers):
    assert synthetic().layers_for("eager", "decode", speedup) == layers


def test_middle_is_in_the_middle():
    assert middle(6, 2) == [2, 3]
    assert middle(5, 2) == [1, 2]


@pytest.mark.parametrize("wrong", ["batch", "prompt", "tokens", "rounds"])
def test_counts_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{wrong}=0 must be at least 1"):
        profile_decoder(tiny_model("llama"), **{wrong: 0})


def test_what_does_not_fit_is_said_before_it_is_tried(monkeypatch):
    model = tiny_model("llama")
    output_head(model)  # looks at a few tokens, once a model
    model.register_forward_pre_hook(lambda *_: pytest.fail("it was tried"))
    monkeypatch.setattr(fit, "available", lambda device: 1 << 20)
    with pytest.raises(ValueError, match=r"batch=4096 with prompt=40 needs about .* GiB"):
        profile_decoder(model, batch=4096, prompt=40)


def test_the_page_shows_every_section(tmp_path):
    profile = profile_decoder(tiny_model("llama"), prompt=6, tokens=2, rounds=1, removed=(2,), folder=tmp_path)
    profile.ceilings = CEILINGS
    page = decoder_page(profile, "tiny & small", "float32", 1.3)
    text = write_page(page, tmp_path, describe_environment(), "e3 profile model tiny").read_text()
    assert "tiny &amp; small" in text
    assert text.count("<svg") == 5
    assert "<script" not in text
    names = {path.name for path in tmp_path.iterdir()}
    assert {"removal.png", "layers-prefill.png", "layers-decode.png", "roofline.png", "memory.png"} <= names
    assert {"trace.json", "ranges.jsonl", "profile.jsonl", "profile.html"} <= names
    kinds = {row["kind"] for row in page.rows}
    assert kinds == {"part", "parts", "whole", "speedup", "removal", "memory", "ceilings"}
