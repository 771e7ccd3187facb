"""Held-out figures have one definition: of masks, of pruned models, and while a student is trained."""

import pytest
import torch
from tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokens

import e3pruner
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.held_out import held_out_figures
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.units import units_of
from e3pruner.recovery.loss import DistillLoss, HeldOut
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher
from e3pruner.text.sequences import Sequences

REMOVED = [[1], [1, 4], [0, 2, 3]]
FIGURES = ("kl", "perplexity", "top1_agreement")


def padding():
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = mask[2, 9:] = 0
    return mask


TEXTS = {
    "plain": [Sequences(tiny_tokens(2)), Sequences(tiny_tokens(3, seed=1))],
    "padded": [Sequences(tiny_tokens(3), attention_mask=padding())],
    "labelled": [Sequences(tiny_tokens(2), labels=tiny_tokens(2)[:, 1:].masked_fill(torch.arange(11) < 5, -100))],
}


def pruned(model, removed):
    return e3pruner.prune(model, [layer for layer in range(NUM_LAYERS) if layer not in removed])


@pytest.mark.parametrize("kind", TEXTS)
def test_masks_are_judged_as_the_models_that_they_leave(kind):
    model, text = tiny_model("llama"), TEXTS[kind]
    with SearchProblem(model, Calibration(text, model.device), units=units_of(model, 2)) as problem:
        found = held_out_figures(problem, [problem.mask(removed) for removed in REMOVED])
    for removed, figures in zip(REMOVED, found, strict=True):
        expected = e3pruner.evaluate(pruned(model, removed), text, model, by_sequence=True, progress=False)
        assert figures.pop("sequences")["kl"] == pytest.approx(expected["sequences"]["kl"], rel=1e-4)
        assert figures == pytest.approx({name: expected[name] for name in FIGURES}, rel=1e-4)


def test_what_is_known_of_a_mask_is_not_measured_again():
    model = tiny_model("llama")
    problem = SearchProblem(model, Calibration(TEXTS["plain"], model.device), units=units_of(model, 2))
    with problem:
        masks = [problem.mask(removed) for removed in REMOVED]
        first = held_out_figures(problem, masks[:2])
        runs = []
        for layer in e3pruner.find_layers(model):
            layer.mlp.register_forward_hook(lambda *_: runs.append(1))
        assert held_out_figures(problem, [masks[1], masks[0], masks[1]]) == [first[1], first[0], first[1]]
        assert not runs
        held_out_figures(problem, masks)
        assert runs


@pytest.mark.parametrize("options", [{}, {"divergence": "reverse", "temperature": 2.0, "kd_ratio": 0.5}], ids=str)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_student_is_watched_as_it_is_evaluated_whatever_it_is_trained_on(kind, options):
    teacher = tiny_model("llama")
    student, (rows, *_) = pruned(teacher, REMOVED[1]), TEXTS[kind]
    loss = DistillLoss(student, LiveTeacher(teacher), DistillOptions(**options), None, VOCAB_SIZE)
    expected = e3pruner.evaluate(student, rows, teacher, progress=False)
    assert HeldOut(loss, rows, 2).evaluate() == pytest.approx({name: expected[name] for name in FIGURES}, rel=1e-4)
