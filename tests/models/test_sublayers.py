"""Attention and MLP removed one by one: in gates, in surgery and in the runtime the same model."""

import warnings

import pytest
import torch
from tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from e3pruner import PruningPlan, prune
from e3pruner.models import gated, skipped
from e3pruner.runtime import LayerSkipRuntime
from e3pruner.runtime.decoder_description import SUPPORTED

MIXTURES = {"qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"}
DENSE = sorted(set(TINY_CONFIGS) - MIXTURES)
SUBLAYERS = {"attention": [1, 4], "mlp": [2, 5]}


def plan(removed=(3,), **sublayers):
    return PruningPlan.of_removed(removed, NUM_LAYERS, sublayers=SUBLAYERS | sublayers)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def gates(kind):
    return torch.tensor([float(layer not in SUBLAYERS[kind]) for layer in range(NUM_LAYERS)])


@pytest.mark.parametrize("model_type", DENSE)
def test_gates_of_zero_and_one_skip_and_keep(model_type):
    model, ids = tiny_model(model_type), tiny_tokens()
    dense = logits(model, ids)
    with skipped(model, [], SUBLAYERS):
        expected = logits(model, ids)
    with gated(model, {kind: gates(kind) for kind in SUBLAYERS}):
        assert torch.equal(logits(model, ids), expected)
    with gated(model, {kind: torch.ones(NUM_LAYERS) for kind in SUBLAYERS}):
        assert torch.equal(logits(model, ids), dense)
    assert not torch.equal(expected, dense)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("model_type", DENSE)
def test_both_sublayers_are_the_layer(model_type):
    model, ids = tiny_model(model_type), tiny_tokens()
    if model_type == "bloom":  # its residual leaves the layer through the norm
        model.config.apply_residual_connection_post_layernorm = False
        for layer in model.transformer.h:
            layer.apply_residual_connection_post_layernorm = False
    with skipped(model, [2]):
        expected = logits(model, ids)
    with skipped(model, [], {"attention": [2], "mlp": [2]}):
        torch.testing.assert_close(logits(model, ids), expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox"])
def test_gates_carry_the_gradient_of_what_a_sublayer_adds(model_type):
    model, ids = tiny_model(model_type).double(), tiny_tokens()
    m = {kind: torch.full((NUM_LAYERS,), 0.7, dtype=torch.float64, requires_grad=True) for kind in SUBLAYERS}

    def loss(values):
        with gated(model, values):
            return model(ids, use_cache=False).logits.square().mean()

    slopes = torch.autograd.grad(loss(m), list(m.values()))
    for kind, slope in zip(m, slopes, strict=True):
        shifted = {name: value.detach().clone() for name, value in m.items()}
        shifted[kind][1] += 1e-3
        up = loss(shifted)
        shifted[kind][1] -= 2e-3
        assert ((up - loss(shifted)) / 2e-3).item() == pytest.approx(
            slope[1].item(), rel=1e-2
        )  # norms and softmax are fp32


@pytest.mark.parametrize("model_type", DENSE)
def test_export_zeroes_the_projections_and_says_so(model_type, tmp_path):
    model, ids = tiny_model(model_type), tiny_tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="projections of 4 sub-layers are set to 0: .* as large and as slow"):
        pruned = prune(model, plan(), copy_weights=False)
    with skipped(model, [3], SUBLAYERS):
        expected = logits(model, ids)
    assert torch.equal(logits(pruned, ids), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = prune(model, plan(attention=[], mlp=[]))
    assert sum(p.numel() for p in pruned.parameters()) == sum(p.numel() for p in whole.parameters())
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", attn_implementation="eager").eval()
    torch.testing.assert_close(logits(loaded, ids), expected)


@pytest.mark.parametrize("model_type", sorted(set(SUPPORTED) & set(DENSE)))
def test_the_runtime_skips_what_the_export_zeroes(model_type):
    pytest.importorskip("e3kernels._runtime", reason="e3kernels._runtime is not built")
    model, ids = tiny_model(model_type), tiny_tokens()
    assert plan().keep == {"attention": [0, 2, 5], "mlp": [0, 1, 4]}
    runtime = LayerSkipRuntime(model, keep=plan().keep)
    found = runtime.append(runtime.new_cache(len(ids)), ids, ids.shape[1])
    with skipped(model, [3], SUBLAYERS):
        torch.testing.assert_close(found, logits(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_a_mixture_of_experts_has_no_one_projection(model_type):
    with pytest.raises(ValueError, match="has no mlp that ends in one projection; it goes as a whole layer"):
        gated(tiny_model(model_type), {kind: torch.ones(NUM_LAYERS) for kind in SUBLAYERS}).__enter__()


@pytest.mark.parametrize(
    ("sublayers", "message"),
    [
        ({"attention": [1]}, r"sublayers has the keys \['attention'\]"),
        ({"attention": [1], "mlp": [9]}, r"sublayers\['mlp'\] holds 9"),
        ({"attention": [1], "mlp": [1]}, r"sublayers names the layers \[1\], of which nothing is kept"),
        ({"attention": [3], "mlp": []}, r"sublayers names the layers \[3\], of which nothing is kept"),
    ],
)
def test_a_plan_refuses_sublayers_that_do_not_fit(sublayers, message):
    with pytest.raises(ValueError, match=message):
        PruningPlan.of_removed([3], NUM_LAYERS, sublayers=sublayers)


def test_plans_keep_their_sublayers_and_older_ones_have_none(tmp_path):
    plan().save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan()
    text = (tmp_path / "plan.json").read_text()
    start = text.index(',\n "sublayers"')
    (tmp_path / "plan.json").write_text(text[:start] + "\n}")
    assert PruningPlan.load(tmp_path / "plan.json") == PruningPlan.of_removed([3], NUM_LAYERS)
    assert PruningPlan.load(tmp_path / "plan.json").keep == [0, 1, 2, 4, 5]
