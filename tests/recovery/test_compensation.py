import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

from e3pruner import PruningPlan, evaluate, prune
from e3pruner.models import last_hidden
from e3pruner.recovery import compensate
from e3pruner.recovery.compensation import Cut, find_cuts

EXACT = {"precision": "fp32"}


def sequences(count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (count, 16), generator=torch.Generator().manual_seed(0))


def test_cuts_lie_where_layers_are_missing():
    assert find_cuts([0, 1, 2], 3) == []
    assert find_cuts([0, 3, 4, 6], 8) == [Cut(1, 3), Cut(3, 6), Cut(4, 8)]
    assert find_cuts([2, 3], 4) == []


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "granite", "bloom", "gpt_neox"])
def test_least_squares_brings_the_student_nearer_and_stays_vanilla(model_type, tmp_path):
    teacher = tiny_model(model_type)
    kept = [0, 2, 3, 5]
    student = prune(teacher, kept)
    result = compensate(student, teacher, kept, sequences(96), method="least-squares", **EXACT)
    none = compensate(prune(teacher, kept), teacher, kept, sequences(96), method="none", **EXACT)
    assert result.kl["least-squares"] < 0.9 * none.kl["none"]
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(reloaded(sequences(2)).logits, student(sequences(2)).logits, rtol=0, atol=0)


def test_least_squares_is_exact_where_the_removed_layer_is_linear_in_what_is_there(monkeypatch):
    # A removed layer that writes nothing but a copy of what the layer before it wrote by its last projection: with
    # this, y = x + W·a, and M = W but for the ridge.
    monkeypatch.setattr("e3pruner.recovery.compensation.RIDGE", 1e-9)
    teacher = tiny_model("llama", mlp_bias=False)
    student = prune(teacher, [0, 1, 3, 4, 5])
    ids, written = sequences(2), []
    teacher.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, output: written.append(output))
    teacher.model.layers[2].register_forward_hook(lambda _, args, output: args[0] + written.pop())
    expected, uncorrected = last_hidden(teacher, ids), last_hidden(student, ids)
    compensate(student, teacher, [0, 1, 3, 4, 5], sequences(64), method="least-squares", **EXACT)
    assert (last_hidden(student, ids) - expected).norm() < 0.05 * (uncorrected - expected).norm()


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "starcoder2"])
def test_scaling_what_is_written_is_scaling_the_stream(model_type):
    teacher = tiny_model(model_type)
    kept = [0, 1, 4, 5]
    student, hooked = prune(teacher, kept), prune(teacher, kept)
    compensate(student, teacher, kept, sequences(8), method="scale", **EXACT)
    before, after = (dict(m.named_parameters()) for m in (hooked, student))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    ratios = torch.stack([(before[n] / after[n]).nanmedian() for n in changed])
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    stack = next(m for m in hooked.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    stack[1].register_forward_hook(
        lambda _, args, output: (
            (ratios[0] * output[0], *output[1:]) if isinstance(output, tuple) else ratios[0] * output
        )
    )
    ids = sequences(2)
    torch.testing.assert_close(last_hidden(student, ids), last_hidden(hooked, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(last_hidden(student, ids), last_hidden(prune(teacher, kept), ids), rtol=1e-2, atol=1e-2)


def test_auto_takes_the_best_on_the_text_that_judges():
    teacher = tiny_model("llama")
    kept = PruningPlan.of_removed([2, 3], 6)
    chosen, judge = prune(teacher, kept), sequences(64)[:8]
    result = compensate(chosen, teacher, kept, sequences(64)[8:], judge=judge, **EXACT)
    assert list(result.kl) == ["none", "scale", "least-squares"]
    assert result.kl[result.method] == min(result.kl.values())
    alone = prune(teacher, kept)
    by_name = compensate(alone, teacher, kept, sequences(64)[8:], judge=judge, method=result.method, **EXACT)
    assert by_name.kl == {result.method: min(result.kl.values())}
    torch.testing.assert_close(chosen.state_dict(), alone.state_dict(), rtol=0, atol=0)


def narrow(count: int) -> torch.Tensor:
    """Text of another kind than `sequences`: two words only."""
    return torch.randint(3, 5, (count, 16), generator=torch.Generator().manual_seed(0))


def test_auto_never_makes_text_of_the_kind_that_judges_worse():
    # Least squares fits two words very well and makes text of other words worse; so does scaling.
    teacher, kept = tiny_model("phi"), [0, 2, 3, 5]
    student, dense = prune(teacher, kept), prune(teacher, kept)
    other = torch.randint(60, VOCAB_SIZE, (16, 16), generator=torch.Generator().manual_seed(1))
    result = compensate(student, teacher, kept, narrow(6), judge=other, **EXACT)
    own = compensate(prune(teacher, kept), teacher, kept, narrow(8), method="least-squares", **EXACT)
    assert own.kl["least-squares"] < 0.1 * evaluate(dense, [narrow(8)], teacher, progress=False)["kl"]
    assert result.kl["least-squares"] > 1.05 * result.kl["none"]
    assert result.method == "none"
    assert result.kl["none"] == pytest.approx(evaluate(dense, [other], teacher, progress=False)["kl"], rel=1e-4)
    torch.testing.assert_close(student.state_dict(), dense.state_dict(), rtol=0, atol=0)


def test_auto_needs_text_of_another_kind():
    teacher = tiny_model("llama")
    student = prune(teacher, [0, 1, 4])
    with pytest.raises(ValueError, match=r"judge=None: method='auto' is judged on text of another kind than data"):
        compensate(student, teacher, [0, 1, 4], sequences(8))
    with pytest.raises(ValueError, match=r"judge is, or shares sequences with, data"):
        compensate(student, teacher, [0, 1, 4], sequences(8), judge=sequences(4))


def test_equal_methods_leave_the_model_as_it_was():
    # Nothing lies between: every method is "none", and the first one that is as good as any is taken.
    teacher = tiny_model("llama")
    student = prune(teacher, [2, 3, 4, 5])
    result = compensate(student, teacher, [2, 3, 4, 5], sequences(8), judge=narrow(4), **EXACT)
    assert len(set(result.kl.values())) == 1
    assert result.method == "none"


def test_the_models_keep_their_modes():
    teacher = tiny_model("llama").train()
    teacher.model.norm.eval()
    student = prune(teacher, [0, 1, 4]).train()
    compensate(student, teacher, [0, 1, 4], sequences(8), method="scale", **EXACT)
    assert [teacher.training, teacher.model.norm.training, student.training] == [True, False, True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_judged_is_what_is_returned(precision):
    teacher, kept, data = tiny_model("llama"), [0, 2, 4, 5], sequences(64)
    student = prune(teacher, kept)
    judged = compensate(student, teacher, kept, data, method="least-squares", precision=precision).kl["least-squares"]
    p, q = (model(data[-16:]).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert judged == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2"])
def test_layers_that_cannot_be_corrected_are_left_alone_or_refused(model_type):
    teacher = tiny_model(model_type)
    student = prune(teacher, [0, 1, 4, 5])
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for method in ("least-squares", "scale"):
        with pytest.raises(ValueError, match="does not write to its residual stream by one linear projection"):
            compensate(student, teacher, [0, 1, 4, 5], sequences(8), method=method, **EXACT)
    result = compensate(student, teacher, [0, 1, 4, 5], sequences(8), judge=narrow(4), **EXACT)
    assert (result.method, result.kl["least-squares"], result.kl["scale"]) == ("none", float("inf"), float("inf"))
    torch.testing.assert_close(dict(student.named_parameters()), before, rtol=0, atol=0)


def test_bad_arguments_are_named():
    teacher = tiny_model("llama")
    student = prune(teacher, [0, 1, 4])
    with pytest.raises(
        ValueError, match=r"method='linear' must be 'auto' or one of \('none', 'scale', 'least-squares'"
    ):
        compensate(student, teacher, [0, 1, 4], sequences(8), method="linear")
    with pytest.raises(ValueError, match=r"plan keeps layers \[0, 1\]; the models have 3 and 6"):
        compensate(student, teacher, [0, 1], sequences(8), method="none")
    with pytest.raises(ValueError, match="data has one sequence"):
        compensate(student, teacher, [0, 1, 4], sequences(1), method="none")
