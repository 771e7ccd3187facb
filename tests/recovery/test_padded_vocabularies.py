"""Models that pad their vocabularies differently: what no token uses is cut, and the loss is that of sliced logits."""

import pytest
import torch
from recovery.test_integrations import _tokenizer as word_tokenizer
from recovery.test_integrations import arguments
from tiny_models import tiny_model, tiny_tokens
from torch.nn import functional as F
from transformers import TrainingArguments

import e3kernels as e3k
import e3pruner
from e3pruner.models import output_head
from e3pruner.models.vocabulary import tokenizer_size
from e3pruner.recovery import DistillOptions, TeacherCache, cache_teacher
from e3pruner.recovery.integrations import lightning
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.integrations.trainer import DistillTrainer

TOKENS = tiny_tokens(4, 9)
SIZE = tokenizer_size(word_tokenizer())
SIZES = [(SIZE + 5, SIZE + 13), (SIZE + 13, SIZE + 5), (SIZE, SIZE + 13)]  # of the model and of the teacher


def pair(model_type, sizes):
    return [tiny_model(model_type, seed, vocab_size=size) for seed, size in enumerate(sizes)]


def sliced(model, columns):
    return model(TOKENS).logits[:, :-1, :columns]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("model_type", ["llama", "phi"])  # without and with a bias of the head
def test_evaluate(model_type, sizes):
    model, teacher = pair(model_type, sizes)
    with torch.no_grad():
        logits, target = (sliced(each, min(sizes)).double().flatten(0, 1) for each in (model, teacher))
    labels = TOKENS[:, 1:].flatten()
    expected = {
        "kl": F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean").item(),
        "perplexity": F.cross_entropy(logits, labels).exp().item(),
        "top1_agreement": (logits.argmax(-1) == target.argmax(-1)).double().mean().item(),
    }
    for proof in ({"tokenizer": word_tokenizer()}, {"vocabulary": min(sizes)}):
        found = e3pruner.evaluate(model, [TOKENS], teacher, progress=False, **proof)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    fewer = e3pruner.evaluate(model, [TOKENS], progress=False, vocabulary=SIZE - 2)["perplexity"]
    assert fewer == pytest.approx(F.cross_entropy(logits[:, : SIZE - 2], labels).exp().item(), rel=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_a_distillation_step(model_type, sizes):
    student, teacher = pair(model_type, sizes)
    options = {"weighting": "entropy", "kd_ratio": 0.7}
    labels = TOKENS[:, 1:]
    expected = e3k.entropy_kl(sliced(student, min(sizes)), sliced(teacher, min(sizes)).detach(), labels, **options)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    for proof in ({"tokenizer": word_tokenizer()}, {}):
        student.zero_grad()
        chosen = DistillOptions(**options, vocabulary=None if proof else min(sizes))
        step = DistillStep(student, teacher, chosen, **proof)
        loss, shown = step.backward_loss(student, batch_of({"input_ids": TOKENS}))
        loss.backward()
        step.finish(student.parameters())
        torch.testing.assert_close(shown, expected.detach())
        actual = [parameter.grad for parameter in student.parameters()]
        torch.testing.assert_close(actual, gradients, rtol=1e-3, atol=1e-5)


def test_cutting_copies_nothing():
    head = output_head(tiny_model("phi"))
    narrow = head.narrowed(90)
    assert narrow.weight.data_ptr() == head.weight.data_ptr()
    assert narrow.bias.data_ptr() == head.bias.data_ptr()
    assert head.narrowed(99) is head


def test_a_cache_holds_the_predictions_of_the_tokens(tmp_path):
    """Normalised over the tokenizer's tokens; a student of any size learns from them as from sliced logits."""
    teacher = tiny_model("llama", 1, vocab_size=SIZE + 13)
    cache = cache_teacher(teacher, TOKENS, tmp_path / "cache", tokenizer=word_tokenizer(), k=5, precision="fp32")
    assert cache.vocabulary == SIZE
    batch = batch_of({"input_ids": TOKENS, "rows": torch.arange(4)})
    with torch.no_grad():
        logprobs, ids = sliced(teacher, SIZE).log_softmax(-1).topk(5)
    torch.testing.assert_close(cache.targets(batch)[0], logprobs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cache.targets(batch)[1], ids)
    for size in (SIZE, SIZE + 5, SIZE + 13):
        student = tiny_model("llama", vocab_size=size)
        shown = DistillStep(student, TeacherCache(tmp_path / "cache")).backward_loss(student, batch)[1]
        expected = e3k.topk_kl(sliced(student, SIZE), logprobs, ids, TOKENS[:, 1:], kd_ratio=0.9)
        torch.testing.assert_close(shown, expected.detach(), rtol=1e-3, atol=1e-3)
    whole = cache_teacher(teacher, TOKENS, tmp_path / "whole", k=5, precision="fp32")
    assert whole.vocabulary == SIZE + 13
    with pytest.raises(ValueError, match=f"whole holds predictions over {SIZE + 13} tokens.*vocabulary={SIZE + 5}"):
        DistillStep(tiny_model("llama", vocab_size=SIZE + 5), whole, tokenizer=word_tokenizer())


def test_distill_resumes_with_the_same_columns_only(tmp_path):
    def distill(**more):
        student, teacher = pair("llama", SIZES[0])
        options = {"data": TOKENS, "held_out": TOKENS, "steps": 2, "precision": "fp32", "output": tmp_path / "run"}
        return e3pruner.distill(student, teacher=teacher, **options, **more)

    first = distill(tokenizer=word_tokenizer())
    assert distill(vocabulary=SIZES[0][0], resume=True).curve == first.curve
    with pytest.raises(ValueError, match=f"resume: vocabulary was .* in the saved run and is {SIZE}"):
        distill(vocabulary=SIZE, resume=True)


def test_what_is_not_proven_is_refused(tmp_path):
    model, teacher = pair("llama", SIZES[0])
    small = tiny_model("llama", vocab_size=SIZE - 1)
    calls = [
        lambda model, **how: e3pruner.evaluate(model, [TOKENS], teacher, **how),
        lambda model, **how: e3pruner.distill(model, teacher=teacher, data=TOKENS, **how),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"of {SIZE + 13} tokens.* one of {SIZE + 5}; .*tokenizer.*vocabulary="):
            call(model)
        with pytest.raises(ValueError, match=rf"one of {SIZE - 1}, and the tokenizer's ids go up to {SIZE - 1}"):
            call(small, tokenizer=word_tokenizer())
        for wrong in (0, SIZE + 6):
            with pytest.raises(ValueError, match=f"vocabulary={wrong} must be"):
                call(model, vocabulary=wrong)
    with pytest.raises(ValueError, match=f"vocabulary={SIZE + 14} must be in 1 … {SIZE + 13}"):
        cache_teacher(teacher, TOKENS, tmp_path / "cache", vocabulary=SIZE + 14)
    assert not (tmp_path / "cache").exists()


def test_trainers_take_the_proof_from_their_tokenizer(tmp_path):
    student, teacher = pair("llama", SIZES[1])
    settings = arguments(TrainingArguments, tmp_path, 2, 1)
    data = [{"input_ids": TOKENS[0].tolist()}]
    trained = DistillTrainer(student, settings, train_dataset=data, processing_class=word_tokenizer(), teacher=teacher)
    assert trained.distill_step.loss.vocabulary == SIZE + 5
    with pytest.raises(ValueError, match="vocabulary="):
        DistillTrainer(student, settings, train_dataset=data, teacher=teacher)
    assert lightning.DistillMixin(student, teacher, tokenizer=word_tokenizer())._step[0].loss.vocabulary == SIZE + 5
