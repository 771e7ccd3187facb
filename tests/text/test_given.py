"""Token batches as users have them: one tensor, lists, dicts, BatchEncodings; padding counts in no figure."""

import importlib

import pytest
import torch
from tiny_models import NUM_LAYERS, POSITION_CONFIGS, TINY_CONFIGS, VOCAB_SIZE, tiny_model, tiny_tokens
from transformers import BatchEncoding

import e3pruner
from e3pruner.recovery.loss import DistillLoss, HeldOut
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher

LENGTHS = (12, 7, 9, 12)
ROWS = [tiny_tokens(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
ALONE = [row[None] for row in ROWS]
TYPES = ["llama", "gpt2", "gpt_neo", "bloom", "opt", "gemma2", "gptj", "falcon", *POSITION_CONFIGS]
SEARCH = {"drop": 2, "precision": "fp32", "progress": False}


def padded(side, width=14, pad=0):
    """The rows, padded to `width` on one side."""
    ids = torch.full((len(ROWS), width), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(ROWS):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, columns], mask[number, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def damaged(model_type):
    """A student that differs from `tiny_model(model_type)` everywhere."""
    student = tiny_model(model_type)
    with torch.no_grad():
        for index, parameter in enumerate(student.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.2 * parameter.std().nan_to_num() * noise)
    return student


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", TYPES)
def test_padding_changes_no_figure_of_an_evaluation(model_type, side):
    student, teacher = damaged(model_type), tiny_model(model_type)
    expected = e3pruner.evaluate(student, [{"input_ids": row, "attention_mask": row > 0} for row in ALONE], teacher)
    assert expected["tokens"] == sum(LENGTHS) - len(LENGTHS)
    found = e3pruner.evaluate(student, [padded(side)], teacher, progress=False)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["greedy", "bi", "leave-one-out-perplexity", "taylor", "clp", "gumbel-topk"])
def test_padding_changes_nothing_in_a_search(method, side):
    # All of one length, so that the same batches can be had without padding.
    ids = tiny_tokens(4, 10)
    wide = torch.nn.functional.pad(ids, (4, 0) if side == "left" else (0, 4))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0) if side == "left" else (0, 4))
    expected = e3pruner.search(tiny_model("gpt2"), [ids], method=method, **SEARCH)
    assert e3pruner.search(tiny_model("gpt2"), [(wide, mask)], method=method, **SEARCH) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_a_search_weighs_every_token_alike_and_padding_not_at_all(model_type, side):
    model = tiny_model(model_type)
    plans = [e3pruner.search(model, [row], method="leave-one-out", **SEARCH) for row in ALONE]
    importance = [
        sum(size * plan.history[0]["importance"][layer] for size, plan in zip(LENGTHS, plans, strict=True))
        / sum(LENGTHS)
        for layer in range(NUM_LAYERS)
    ]
    plan = e3pruner.search(model, padded(side), method="leave-one-out", **SEARCH)
    assert plan.history[0]["importance"] == pytest.approx(importance, rel=1e-4)
    assert plan.metrics["tokens"] == sum(LENGTHS)
    for method in ("bi", "leave-one-out-perplexity"):
        values = [e3pruner.search(model, [row], method=method, **SEARCH).history[0]["importance"] for row in ALONE]
        sizes = [size - (method != "bi") for size in LENGTHS]  # a row's last token predicts none
        expected = [sum(s * v[layer] for s, v in zip(sizes, values, strict=True)) / sum(sizes) for layer in range(6)]
        found = e3pruner.search(model, padded(side), method=method, **SEARCH).history[0]["importance"]
        assert found == pytest.approx(expected, rel=1e-4), method


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_padding_changes_no_recovery(model_type, side, tmp_path):
    teacher = tiny_model(model_type)
    data = padded(side)
    options = {"steps": 2, "batch_size": 4, "precision": "fp32", "lr": 1e-3}
    sides = [e3pruner.distill(damaged(model_type), teacher=teacher, data=padded(s), **options) for s in (side, "right")]
    assert sides[0].tokens == 2 * (sum(LENGTHS) - len(LENGTHS))
    for first, second in zip(*(result.curve for result in sides), strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    figures = e3pruner.evaluate(damaged(model_type), data, teacher)
    held_out = e3pruner.distill(damaged(model_type), teacher=teacher, data=data, held_out=[data], **options).held_out[0]
    assert held_out["kl"] == pytest.approx(figures["kl"], rel=1e-4)
    assert held_out["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-4)
    cache = e3pruner.cache_teacher(teacher, data, tmp_path / "cache", k=VOCAB_SIZE, precision="fp32")
    stored = e3pruner.distill(damaged(model_type), teacher=cache, data=data, **options | {"weighting": "none"})
    live = e3pruner.distill(damaged(model_type), teacher=teacher, data=data, **options | {"weighting": "none"})
    assert [p["loss"] for p in stored.curve] == pytest.approx([p["loss"] for p in live.curve], rel=1e-2)


@pytest.mark.parametrize("method", ["scale", "least-squares"])
def test_padding_changes_no_compensation(method):
    def compensated(data):
        teacher = tiny_model("gpt2") if method == "none" else tiny_model("llama")
        student = e3pruner.prune(teacher, [0, 1, 4, 5])
        found = e3pruner.compensate(student, teacher, [0, 1, 4, 5], data, method=method, precision="fp32")
        return found.kl[method], [p.detach() for p in student.parameters()]

    ids = tiny_tokens(8, 10)
    mask = torch.ones_like(ids)
    kl, weights = compensated(ids)
    for sides in ((5, 0), (0, 5)):
        wide, cover = (torch.nn.functional.pad(each, sides) for each in (ids, mask))
        found, others = compensated([(wide[:4], cover[:4]), (wide[4:], cover[4:])])
        assert found == pytest.approx(kl, rel=1e-5)
        torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-6)


def test_every_form_gives_the_same_figures():
    model, ids = tiny_model("llama"), tiny_tokens(4)
    expected = e3pruner.evaluate(model, list(ids.split(4)), progress=False)
    ones = torch.ones_like(ids)
    both = {"input_ids": ids, "attention_mask": ones}
    forms = (ids, ids.numpy(), [ids], both, BatchEncoding(both), [(ids, ones)], [ids.tolist()], [(ids, ones.bool())])
    lists = BatchEncoding({"input_ids": ids.tolist(), "attention_mask": ones.tolist(), "token_type_ids": ids.tolist()})
    for form in (*forms, lists, ids.to(torch.int32)):
        assert e3pruner.evaluate(model, form, progress=False) == expected
    plan = e3pruner.search(model, [ids], **SEARCH)
    for form in (ids, both, BatchEncoding(both), lists):
        assert e3pruner.search(model, form, **SEARCH) == plan


def test_one_tensor_of_many_rows_goes_through_the_model_in_parts(monkeypatch):
    model, ids = tiny_model("llama"), tiny_tokens(60, 12)
    sizes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(importlib.import_module("e3pruner.evaluation.evaluate"), "_PASS_TOKENS", 120)
    whole = e3pruner.evaluate(model, ids, progress=False)
    assert max(sizes) == 10
    assert whole == pytest.approx(e3pruner.evaluate(model, ids.split(20), progress=False), rel=1e-6)


def test_rows_of_different_width_are_one_data_set():
    teacher = tiny_model("llama")
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ALONE]
    options = {"steps": 1, "batch_size": 4, "precision": "fp32"}
    apart = e3pruner.distill(damaged("llama"), teacher=teacher, data=batches, **options)
    together = e3pruner.distill(damaged("llama"), teacher=teacher, data=padded("left"), **options)
    assert apart.curve[0] == pytest.approx(together.curve[0], rel=1e-4)


def test_what_stands_in_the_padding_does_not_matter():
    model = tiny_model("llama")
    expected = e3pruner.evaluate(model, padded("right"))
    assert e3pruner.evaluate(model, padded("right", pad=-1)) == expected
    assert e3pruner.evaluate(model, padded("right", pad=VOCAB_SIZE)) == expected


CALLS = {
    "search": lambda model, data: e3pruner.search(model, data, **SEARCH),
    "evaluate": lambda model, data: e3pruner.evaluate(model, data, progress=False),
    "distill": lambda model, data: e3pruner.distill(model, teacher=tiny_model("gpt2"), data=data, steps=1),
    "held_out": lambda model, data: e3pruner.distill(
        model, teacher=tiny_model("gpt2"), data=tiny_tokens(), held_out=data, steps=1
    ),
    "compensate": lambda model, data: e3pruner.compensate(
        model, tiny_model("gpt2"), [*range(NUM_LAYERS)], data, method="none"
    ),
    "cache": lambda model, data: e3pruner.cache_teacher(model, data, "never-made"),
}
IDS, ONES = tiny_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
PADDED = torch.nn.functional.pad(IDS, (0, 3))
TWOS = ONES.clone()
TWOS[1, 2] = 2


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([PADDED], r"row 0 .*ends? with 3 .*pad_token_id.*attention_mask"),
        ([PADDED.flip(1)], r"row 0 .*begins? with 3 .*attention_mask"),
        ([(IDS, TWOS)], r"attention_mask holds 2"),
        ([(IDS, ONES[:, :5])], r"attention_mask has shape \(3, 5\)"),
        ([(IDS, ONES / 2)], r"attention_mask holds 0.5"),
        ([IDS, IDS[:, :8]], r"has 8 tokens .*attention_mask"),
        (IDS[0], r"shape \(12,\)"),
        ({"attention_mask": ONES}, r"input_ids"),
        (
            BatchEncoding({"input_ids": [[3, 4, 5], [3, 4]], "attention_mask": [[1, 1, 1], [1, 1]]}),
            r"no rectangular.*padding=True",
        ),
        ((IDS, ONES), r"\[1\] holds nothing but 0 and 1"),
        (tiny_tokens(2, 65), r"65 tokens.*64 positions"),
        ([(IDS, torch.nn.functional.pad(ONES[:2], (0, 0, 0, 1)))], r"row 2 .*nothing to predict"),
        ({"input_ids": IDS, "labels": torch.full_like(IDS, -100)}, r"row 0 .*nothing to predict"),
        ({"input_ids": IDS, "labels": IDS + VOCAB_SIZE}, r"labels hold"),
        (
            {
                "input_ids": PADDED,
                "attention_mask": torch.nn.functional.pad(ONES, (0, 3)),
                "position_ids": torch.arange(15).expand(3, 15),
            },
            r"position_ids",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_before_any_work(call, data, message, monkeypatch):
    model = tiny_model("gpt2")
    CALLS["evaluate"](model, IDS)  # the heads are known
    monkeypatch.setattr(type(model.transformer), "forward", lambda *_, **__: pytest.fail("the model ran"))
    monkeypatch.setattr("e3pruner.models.head._factor", lambda *_: 1.0)
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, data)


def test_labels_are_what_is_judged():
    model = tiny_model("llama")
    labels = torch.full_like(IDS, -100)
    labels[:, 5:8] = IDS[:, 5:8]
    found = e3pruner.evaluate(model, {"input_ids": IDS, "labels": labels})
    with torch.no_grad():
        expected = model(IDS, labels=labels).loss.exp().item()
    assert found["tokens"] == 9
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model_type", [*TINY_CONFIGS, "gpt_neo", "jamba"])
def test_sequences_are_no_longer_than_the_positions_of_a_model(model_type):
    """A table ends there; rotary positions can be computed beyond, but no model has learnt them."""
    model, ids = tiny_model(model_type), tiny_tokens(2, 65)
    limit = getattr(model.config, "max_position_embeddings", None)
    assert model_type not in {"gpt2", "gpt_neo", "opt", "gptj", "llama"} or limit == 64
    if limit == 64:
        with pytest.raises(ValueError, match=rf"sequences of 65 tokens; model \({model_type}\) has 64 positions"):
            e3pruner.evaluate(model, ids, progress=False)
        ids = ids[:, :64]
    assert e3pruner.evaluate(model, ids, progress=False)["perplexity"] > 1  # it can


def test_padding_takes_no_position():
    ids, mask = (
        torch.nn.functional.pad(each[:, :60], (8, 0)) for each in (tiny_tokens(2, 64), torch.ones(2, 64).long())
    )
    assert e3pruner.evaluate(tiny_model("gpt2"), [(ids, mask)])["tokens"] == 118


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_every_model_type_takes_padded_rows(model_type):
    model = tiny_model(model_type)
    figures = [e3pruner.evaluate(model, padded(side), progress=False) for side in ("left", "right")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)


def test_a_model_that_reads_its_padding_is_refused():
    model = tiny_model("llama")
    own = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match=r"model \(llama\) reads padding"):
        e3pruner.evaluate(model, padded("left"))


def test_held_out_text_is_judged_as_an_evaluation_judges_it():
    student, teacher = damaged("llama"), tiny_model("llama")
    from e3pruner.text.given import sequences_of

    rows = sequences_of("data", padded("left"), VOCAB_SIZE)
    watched = HeldOut(DistillLoss(student, LiveTeacher(teacher), DistillOptions(), None), rows, 2).evaluate()
    figures = e3pruner.evaluate(student, padded("left"), teacher)
    assert watched == pytest.approx({name: figures[name] for name in watched}, rel=1e-5)
