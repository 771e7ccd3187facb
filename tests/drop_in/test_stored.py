"""verl's and axolotl's losses against stored predictions, by their signatures and the formulas that they state."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from e3kernels.drop_in import axolotl, verl


def stored(teacher, k):
    return teacher.log_softmax(-1).topk(k)


def truncated(student, log_p, ids, temperature=1.0):
    """p(log p − log q) of each stored id."""
    log_q = (student / temperature).log_softmax(-1).gather(-1, ids)
    return log_p.exp() * (log_p - log_q)


def nested(values, lengths):
    return torch.nested.nested_tensor(list(values.split(lengths)), layout=torch.jagged)


def verl_config(clamp=None):
    return SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=clamp))


def renormalised(student, log_p, ids):
    log_q = student.log_softmax(-1).gather(-1, ids).log_softmax(-1)
    log_p = log_p.log_softmax(-1)
    return log_p.exp() * (log_p - log_q)


@pytest.mark.parametrize(("tail", "formula"), [("truncated", truncated), ("renorm", renormalised)])
def test_verl(tail, formula):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 8, 40, requires_grad=True), torch.randn(8, 40)
    log_p, ids = stored(teacher, 6)
    result = verl.compute_forward_kl_topk(
        student, nested(log_p, [3, 5]), nested(ids, [3, 5]), verl_config(), "thd", tail=tail
    )
    expected = formula(student, log_p[None], ids[None]).sum(-1)
    torch.testing.assert_close(result["distillation_losses"], expected, rtol=2e-5, atol=1e-6)
    mass = student.detach().log_softmax(-1).gather(-1, ids[None]).exp().sum(-1)
    torch.testing.assert_close(result["student_mass"], mass, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(result["teacher_mass"], log_p.exp().sum(-1)[None])
    weights = torch.linspace(-1, 1, 8)
    ours, theirs = (
        torch.autograd.grad((x * weights).sum(), student)[0] for x in (result["distillation_losses"], expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def test_verl_refuses_what_would_be_another_loss():
    log_p, ids = stored(torch.randn(8, 40), 6)
    arguments = nested(log_p, [3, 5]), nested(ids, [3, 5])
    with pytest.raises(ValueError, match=r"log_prob_min_clamp is -10\.0; must be None"):
        verl.compute_forward_kl_topk(torch.randn(1, 8, 40), *arguments, verl_config(-10.0), "thd")
    with pytest.raises(ValueError, match="has 8 tokens and student_logits 4"):
        verl.compute_forward_kl_topk(torch.randn(1, 4, 40), *arguments, verl_config(), "thd")


@pytest.mark.parametrize("items", [-1, 11])
@pytest.mark.parametrize("module", [True, False])
def test_axolotl(items, module):
    torch.manual_seed(0)
    student = torch.randn(2, 7, 40, requires_grad=True)
    log_p, ids = stored(torch.randn(2, 5, 40), 6)
    mask = torch.rand(2, 5, 6) < 0.7
    mask[0, 2] = False
    call = axolotl.ChunkedTopKKDLoss(3, 1.6) if module else lambda *tensors: axolotl.loss(*tensors, 1.6)
    ours = call(student, ids, log_p, mask.long(), items)
    terms = truncated(student[:, :5], log_p, ids, 1.6)[mask]
    expected = terms.sum() / (items if items > 0 else len(terms))
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-6)


SIGNATURES = {
    verl.compute_forward_kl_topk: "student_logits teacher_topk_log_probs teacher_topk_ids config data_format",
    axolotl.loss: "student_logits target_token_ids target_logprobs target_mask num_items_in_batch kd_temperature",
    axolotl.ChunkedTopKKDLoss: "num_output_chunks kd_temperature",
    axolotl.ChunkedTopKKDLoss.forward: "self student_logits target_token_ids target_logprobs target_mask "
    "num_items_in_batch",
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_arguments_are_theirs_and_ours_come_behind_by_keyword(function):
    parameters = inspect.signature(function).parameters.values()
    theirs = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert theirs == SIGNATURES[function].split()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} <= {"tail", "weighting", "gamma"}
