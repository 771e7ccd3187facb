"""A search on documents and chats sees what recovery sees: documents apart, only what is to be learnt."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model

import e3pruner
from e3pruner import PruningPlan
from e3pruner.models import skipped
from e3pruner.text.documents import Marked, pack_documents

SIZES = (7, 9, 5, 11)


def documents():
    """Chats of which the second half is learnt."""
    ids = torch.randint(3, VOCAB_SIZE, (sum(SIZES),), generator=torch.Generator().manual_seed(0))
    return [Marked(part.tolist(), [i >= len(part) // 2 for i in range(len(part))]) for part in ids.split(list(SIZES))]


def alone(model, removed, what):
    """The mean of KL or of −log p over the learnt tokens, each document in a row of its own, in fp64."""
    values = []
    for tokens, learnt in documents():
        ids = torch.tensor([tokens])
        with torch.no_grad():
            teacher = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            with skipped(model, removed):
                student = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        kl = (teacher.exp() * (teacher - student)).sum(-1)
        nll = -student.gather(-1, ids[0, 1:, None])[:, 0]
        values.append({"kl": kl, "nll": nll}[what][torch.tensor(learnt[1:])])
    return torch.cat(values).mean().item()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_documents_are_apart_and_only_what_is_learnt_counts(model_type):
    model, packed = tiny_model(model_type), pack_documents(documents(), 16)
    arguments = {"drop": 2, "precision": "fp32", "progress": False}
    for method, what in (("leave-one-out", "kl"), ("leave-one-out-perplexity", "nll")):
        plan = e3pruner.search(model, packed, method=method, **arguments)
        expected = [alone(model, [layer], what) for layer in range(NUM_LAYERS)]
        assert plan.history[0]["importance"] == pytest.approx(expected, rel=1e-4)
    assert plan.metrics["kl"] == pytest.approx(alone(model, plan.removed, "kl"), rel=1e-4)
    assert plan.metrics["tokens"] == sum(sum(document.learnt[1:]) for document in documents())
    figures = e3pruner.evaluate(e3pruner.prune(model, plan), [packed], model, progress=False)
    assert figures["kl"] == pytest.approx(plan.metrics["kl"], rel=1e-4)
    assert figures["tokens"] == plan.metrics["tokens"]


def test_ranks_count_by_what_they_hold(tmp_path):
    ids, mask = (
        torch.randint(3, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(0)),
        torch.ones(4, 12).long(),
    )
    mask[1, 5:] = mask[2, :7] = 0  # of the first batch the second rank holds less, of the second the first
    arguments = {"drop": 3, "precision": "fp32", "progress": False}
    methods = ("greedy", "leave-one-out-perplexity", "bi", "taylor")

    def plans(share):
        batches = [(ids[:2][share], mask[:2][share]), (ids[2:][share], mask[2:][share])]
        return {m: e3pruner.search(tiny_model("llama"), batches, method=m, **arguments) for m in methods}

    def on_a_rank():
        rank = dist.get_rank()
        for method, plan in plans(slice(rank, rank + 1)).items():
            plan.save(tmp_path / f"{method}-{rank}.json")

    expected = plans(slice(None))
    on_ranks(2, on_a_rank, tmp_path)
    for method in methods[:3]:
        for rank in range(2):
            plan = PruningPlan.load(tmp_path / f"{method}-{rank}.json")
            assert plan.removed == expected[method].removed
            assert plan.metrics == pytest.approx(expected[method].metrics, rel=1e-5)
            for key in ("importance", "score"):
                if key in plan.history[0]:
                    assert plan.history[0][key] == pytest.approx(expected[method].history[0][key], rel=1e-5)
    first, second = (PruningPlan.load(tmp_path / f"taylor-{rank}.json") for rank in range(2))
    assert first == second


def test_a_model_that_cannot_keep_documents_apart_is_refused():
    packed = pack_documents(documents(), 16)
    with pytest.raises(ValueError, match=r"model \(bloom\) attends across documents"):
        e3pruner.search(tiny_model("bloom"), packed, 2, progress=False)
    with pytest.raises(ValueError, match=r"model \(bloom\) attends across documents"):
        e3pruner.evaluate(tiny_model("bloom"), packed, progress=False)


@pytest.mark.parametrize("method", ["gumbel-topk", "taylor", "clp", "straight-through", "angular", "greedy"])
def test_every_kind_of_measurement_serves_documents(method, tmp_path):
    model, packed = tiny_model("llama"), pack_documents(documents(), 16)
    arguments = {"method": method, "drop": 2, "precision": "fp32", "progress": False}
    plan = e3pruner.search(model, packed, **arguments)
    # What is not learnt, and another document, decide nothing: other user turns of the same length, attended alike.
    assert plan.metrics["kl"] == pytest.approx(alone(model, plan.removed, "kl"), rel=1e-4)
    other = e3pruner.search(model, packed.input_ids, **arguments)
    assert other.history != plan.history
    stored = tmp_path / "search.json"
    assert e3pruner.search(model, packed, checkpoint=stored, **arguments) == plan
    with pytest.raises(ValueError, match="it differs in tokens"):
        e3pruner.search(model, packed.input_ids, checkpoint=stored, **arguments)
