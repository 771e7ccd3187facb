import pytest
import torch
from tiny_models import of_one, tiny_model, tiny_tokens

import e3pruner
from e3pruner.models import find_layers, last_hidden
from e3pruner.models.device import rounded_dtype
from e3pruner.models.identity import model_identity
from e3pruner.models.loading import Dtype, Placement, load_model
from e3pruner.models.skipping_forward import SkippingForward
from e3pruner.models.streaming import computing_in, stream_of
from e3pruner.recovery.integrations.step import DistillStep
from e3pruner.recovery.teacher import narrowed

MASKS = [tuple(layer != gone for layer in range(6)) for gone in range(7)]
DTYPES = [Dtype.AUTO, Dtype.BFLOAT16]


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def folder(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path)
    return str(tmp_path)


def streamed(folder, dtype=Dtype.AUTO):
    return load_model(folder, "cpu", dtype, placement=Placement.STREAM)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_streamed_layers_compute_what_resident_ones_do(folder, dtype):
    whole, model, ids = load_model(folder, "cpu", dtype), streamed(folder, dtype), tiny_tokens()
    assert torch.equal(model(ids).logits, whole(ids).logits)
    masks = MASKS[1:]
    expected, found = (of_one(SkippingForward(each), {"input_ids": ids}, masks) for each in (whole, model))
    assert all(torch.equal(found[mask], expected[mask]) for mask in masks)


@torch.no_grad()
def test_a_walk_brings_each_layer_once(folder):
    model = streamed(folder, Dtype.BFLOAT16)
    batches = [{"input_ids": tiny_tokens(rows)} for rows in (2, 1, 3)]
    forward, stream = SkippingForward(model), stream_of(model)
    list(forward.last_hiddens(batches, MASKS))  # proven once by passes of the whole model
    before = list(stream.reads)
    list(forward.last_hiddens(batches, MASKS))
    assert [after - count for after, count in zip(stream.reads, before, strict=True)] == [1] * 6


@torch.no_grad()
def test_two_layers_have_a_copy_at_most(folder):
    model, most = streamed(folder, Dtype.BFLOAT16), []
    layers = find_layers(model)
    for layer in layers:
        next(layer.children()).register_forward_hook(
            lambda *_: most.append(sum(not next(each.parameters()).is_meta for each in layers))
        )
    last_hidden(model, tiny_tokens())
    assert set(most) == {1}  # and the next one, which nobody sees yet


@torch.no_grad()
def test_the_question_which_dtype_it_runs_in_copies_two_layers_at_most(folder):
    model, most = streamed(folder), []
    layers = find_layers(model)

    def narrow(*_):
        most.append(sum(next(each.parameters()).dtype == torch.bfloat16 for each in layers))

    for layer in layers:
        layer.register_forward_pre_hook(narrow)
        layer.register_forward_hook(narrow)
    assert rounded_dtype(model, "bf16") == torch.bfloat16
    assert max(most) <= 2


@torch.no_grad()
def test_a_layer_that_is_skipped_does_not_stay(folder):
    model = streamed(folder, Dtype.BFLOAT16)
    alternate = tuple(layer % 2 == 0 for layer in range(6))
    of_one(SkippingForward(model), {"input_ids": tiny_tokens()}, [alternate])
    assert len(stream_of(model)._coming) <= 1


def test_the_dtype_of_a_block_ends_with_it(folder):
    model, ids = streamed(folder), tiny_tokens()
    before = model(ids).logits
    with computing_in(model, torch.bfloat16):
        assert model(ids).logits.dtype == torch.bfloat16
        assert torch.equal(model(ids).logits, load_model(folder, "cpu", Dtype.BFLOAT16)(ids).logits)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe", "glm_moe_dsa", "gptj"])
@torch.no_grad()
def test_what_stays_in_fp32_beside_narrow_weights_does_so_when_streamed(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path)
    whole, ids = load_model(str(tmp_path), "cpu", Dtype.BFLOAT16), tiny_tokens()
    assert torch.equal(streamed(str(tmp_path), Dtype.BFLOAT16)(ids).logits, whole(ids).logits)


def test_a_checkpoint_in_another_dtype_is_read_in_the_models(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"bfloat16"', '"float32"')
    (tmp_path / "config.json").write_text(config)
    ids = tiny_tokens()
    assert torch.equal(streamed(str(tmp_path))(ids).logits, load_model(str(tmp_path), "cpu")(ids).logits)


def test_a_streamed_search_finds_the_same_and_sweeps_once_per_step(folder):
    tokens = torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(0))
    options = {"drop": 2, "method": "greedy", "progress": False, "precision": "bf16"}
    expected = e3pruner.search(load_model(folder, "cpu"), tokens.split(2), **options)
    model = streamed(folder)
    plan = e3pruner.search(model, tokens.split(2), **options)
    assert plan.removed == expected.removed
    assert plan.history == expected.history  # bit for bit
    # The head's check, whether it runs rounded, the route, what proves its ways; then the teacher, and once per step.
    assert max(stream_of(model).reads) <= len(plan.history) + 6


def test_a_streamed_model_is_evaluated_in_one_sweep(folder):
    batches = list(torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(0)).split(2))
    expected = e3pruner.evaluate(load_model(folder, "cpu"), batches, progress=False)
    model = streamed(folder)
    assert e3pruner.evaluate(model, batches, progress=False) == expected
    before = list(stream_of(model).reads)
    assert e3pruner.evaluate(model, batches, progress=False) == expected
    assert [now - then for now, then in zip(stream_of(model).reads, before, strict=True)] == [1] * 6


def test_a_streamed_evaluation_reads_three_times_at_most(folder):
    model = streamed(folder)
    batches = list(torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(0)).split(2))
    e3pruner.evaluate(model, batches, progress=False)
    assert stream_of(model).reads == [3] * 6  # the head's check, the route, and the text itself with the proof


def test_hidden_states_are_bounded(folder, monkeypatch):
    model, batches = streamed(folder), list(torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(0)))
    expected = e3pruner.evaluate(model, [each[None] for each in batches], progress=False)
    before = list(stream_of(model).reads)
    monkeypatch.setattr("e3pruner.models.skipping_forward.STATES_AT_ONCE", 2 * 2 * 16 * 32 * 4)  # of two batches
    assert e3pruner.evaluate(model, [each[None] for each in batches], progress=False) == expected
    assert [now - then for now, then in zip(stream_of(model).reads, before, strict=True)] == [3] * 6


@pytest.mark.parametrize(
    "wants",
    [
        lambda model, whole, ids: e3pruner.search(model, [ids], drop=2, method="taylor", precision="bf16"),
        lambda model, whole, ids: e3pruner.distill(model, teacher=whole, data=ids, steps=1),
        lambda model, whole, ids: DistillStep(model, whole),
        lambda model, whole, ids: e3pruner.compensate(model, whole, range(6), ids, method="scale"),
    ],
    ids=["taylor", "distill", "DistillStep", "compensate"],
)
def test_what_wants_the_weights_themselves_is_refused(tmp_path, wants):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is streamed from its files, which forward passes, search and evaluate take"):
        wants(streamed(str(tmp_path)), load_model(str(tmp_path), "cpu"), tiny_tokens(4))


def test_a_streamed_teacher_teaches_what_a_resident_one_does_and_is_not_copied(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    found = []
    for teacher in (load_model(str(tmp_path), "cpu"), streamed(str(tmp_path))):
        student = e3pruner.prune(load_model(str(tmp_path), "cpu"), [0, 1, 4, 5])
        e3pruner.distill(student, teacher=teacher, data=tiny_tokens(4), steps=1, precision="bf16")
        found.append(student.state_dict())
    with narrowed(teacher, torch.bfloat16):
        assert {p.dtype for p in find_layers(teacher).parameters()} == {torch.float32}
    assert all(torch.equal(weight, found[0][name]) for name, weight in found[1].items())


@torch.no_grad()
def test_weights_that_are_made_of_others_are_made_when_they_are_called(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)  # an expert's tensors each, which the model holds in one
    whole, model, ids = load_model(str(tmp_path), "cpu"), streamed(str(tmp_path)), tiny_tokens()
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_streamed_weights_are_known_by_their_bytes(folder):
    model, ids = streamed(folder), tiny_tokens()
    expected = model(ids).logits
    assert model_identity(model) == model_identity(load_model(folder, "cpu"))
    assert torch.equal(model(ids).logits, expected)
