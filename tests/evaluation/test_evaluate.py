import importlib

import pytest
import torch
from tiny_models import NUM_LAYERS, TINY_CONFIGS, VOCAB_SIZE, tiny_model, tiny_tokens
from torch.nn import functional as F

import e3pruner

BATCHES = [tiny_tokens(3, seed=1), tiny_tokens(2, seed=2)]


def naive(model, teacher):
    """The same figures from materialised fp64 logits."""
    losses, divergences, agreements = [], [], []
    for ids in BATCHES:
        with torch.no_grad():
            student = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            other = teacher(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        losses.append(F.nll_loss(student.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
        divergences.append((other.exp() * (other - student)).sum(-1).flatten())
        agreements.append((student.argmax(-1) == other.argmax(-1)).flatten())
    return {
        "perplexity": torch.cat(losses).mean().exp().item(),
        "kl": torch.cat(divergences).mean().item(),
        "top1_agreement": torch.cat(agreements).double().mean().item(),
    }


@pytest.mark.parametrize("tile_values", [VOCAB_SIZE, 7 * VOCAB_SIZE, 2**23])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere2", "granite", "gptj"])
def test_figures_equal_those_of_materialised_logits(model_type, tile_values, monkeypatch):
    monkeypatch.setattr(importlib.import_module("e3pruner.models.head"), "_TILE_LOGITS", tile_values)
    teacher = tiny_model(model_type)
    student = tiny_model(model_type)
    with torch.no_grad():
        for index, parameter in enumerate(student.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.3 * parameter.std().nan_to_num() * noise)
    expected = naive(student, teacher)
    assert 0 < expected["top1_agreement"] < 1
    found = e3pruner.evaluate(student, BATCHES, teacher, progress=False)
    assert found == pytest.approx(
        expected | {"tokens": 5 * 11, "layers": NUM_LAYERS, "parameters": student.num_parameters()}, rel=1e-4
    )
    alone = e3pruner.evaluate(student, BATCHES, progress=False)
    assert alone.keys() == {"perplexity", "tokens", "layers", "parameters"}
    assert alone["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)


def test_a_model_agrees_with_itself():
    model = tiny_model("llama").train()
    found = e3pruner.evaluate(model, BATCHES, model, progress=False)
    assert (found["kl"], found["top1_agreement"]) == (0, 1)
    assert model.training


def test_precision_bf16_computes_in_bf16():
    model = tiny_model("llama")
    full = e3pruner.evaluate(model, BATCHES, progress=False, precision="fp32")["perplexity"]
    half = e3pruner.evaluate(model, BATCHES, progress=False, precision="bf16")["perplexity"]
    assert half != full
    assert half == pytest.approx(full, rel=0.1)


def test_tied_parameters_count_once():
    model = tiny_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    assert e3pruner.evaluate(model, BATCHES, progress=False)["parameters"] == sum(sizes.values())


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"teacher has a vocabulary of 120 tokens, model one of 99"):
        e3pruner.evaluate(tiny_model("llama"), BATCHES, tiny_model("llama", vocab_size=120), progress=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "is empty"), ([tiny_tokens() + VOCAB_SIZE], "holds token"), ([torch.zeros(2, 1, dtype=torch.long)], "shape")],
)
def test_bad_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=f"token_batches.*{message}"):
        e3pruner.evaluate(tiny_model("llama"), batches, progress=False)


def test_nan_names_the_batch():
    model = tiny_model("llama")
    e3pruner.evaluate(model, BATCHES, progress=False)
    (token, *_) = set(BATCHES[1].flatten().tolist()) - set(BATCHES[0].flatten().tolist())
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _, args, out: out.masked_fill((args[0] == token)[..., None], torch.nan))
    with pytest.raises(FloatingPointError, match=r"token_batches\[1\]"):
        e3pruner.evaluate(model, BATCHES, progress=False)


def test_every_tiny_model_can_be_evaluated():
    for model_type in TINY_CONFIGS:
        assert e3pruner.evaluate(tiny_model(model_type), BATCHES[:1], progress=False)["perplexity"] > 1


@pytest.mark.parametrize("padded", [False, True])
def test_figures_by_position_are_those_of_the_positions(padded):
    teacher, student, ids = tiny_model("llama"), tiny_model("llama", seed=1), tiny_tokens(3, seed=1)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        own, other = (
            each(ids, attention_mask=mask, position_ids=positions).logits[:, :-1].double().log_softmax(-1)
            for each in (student, teacher)
        )
    kl = (other.exp() * (other - own)).sum(-1)
    seen, real = mask.cumsum(-1)[:, :-1], mask[:, :-1] * mask[:, 1:] == 1
    found = e3pruner.evaluate(student, [batch], teacher, by_position=True, progress=False)
    rows = found.pop("positions")
    assert [row["seen"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        some = real & (seen >= row["seen"]) & (seen < 2 * row["seen"])
        assert row["tokens"] == some.sum()
        assert row["kl"] == pytest.approx(kl[some].mean().item(), rel=1e-4)
    assert found == pytest.approx(e3pruner.evaluate(student, [batch], teacher, progress=False), rel=1e-5)
