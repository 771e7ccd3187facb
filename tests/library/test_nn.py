import inspect

import pytest
import torch

import e3kernels as e3k
from e3kernels.ops.common import keywords

OPTIONS = {"temperature": 2.0, "weighting": "inverse", "kd_ratio": 0.5, "reduction": "sum", "student_softcap": 5.0}


def test_modules_equal_the_functions():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 4, 7, generator=generator)
    hidden, weight, bias = torch.randn(4, 3), torch.randn(7, 3), torch.randn(7)
    logprobs, ids = (teacher / 2).log_softmax(-1).topk(2)
    labels, mask = torch.arange(4), torch.tensor([True, True, False, True])
    dense, stored = OPTIONS | {"teacher_scale": 0.5}, OPTIONS | {"tail": "renorm"}
    linear = (hidden, weight)
    for module, function, inputs, options, call in (
        (e3k.nn.EntropyKLLoss, e3k.entropy_kl, (student, teacher), dense, {}),
        (e3k.nn.TopkKLLoss, e3k.topk_kl, (student, logprobs, ids), stored, {}),
        (e3k.nn.LinearEntropyKLLoss, e3k.linear_entropy_kl, (*linear, *linear), dense, {"student_bias": bias}),
        (e3k.nn.LinearTopkKLLoss, e3k.linear_topk_kl, (*linear, logprobs, ids), stored, {"student_bias": bias}),
    ):
        expected = function(*inputs, labels, token_mask=mask, **options, **call)
        assert torch.equal(module(**options)(*inputs, labels, token_mask=mask, **call), expected)


def test_modules_show_their_options_and_reject_unknown_ones():
    assert "temperature=2.0" in repr(e3k.nn.TopkKLLoss(temperature=2.0))
    assert "tail='renorm'" in repr(e3k.nn.LinearTopkKLLoss(tail="renorm"))
    with pytest.raises(TypeError, match="heat"):
        e3k.nn.EntropyKLLoss(heat=1)


@pytest.mark.parametrize(
    ("function", "typed"),
    [
        (e3k.entropy_kl, keywords.EntropyKLKeywords),
        (e3k.topk_kl, keywords.TopkKLKeywords),
        (e3k.linear_entropy_kl, keywords.LinearEntropyKLKeywords),
        (e3k.linear_topk_kl, keywords.LinearTopkKLKeywords),
    ],
)
def test_the_typed_keywords_are_those_of_the_functions(function, typed):
    parameters = inspect.signature(function).parameters.values()
    taken = {parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}
    assert taken == {*typed.__annotations__, "return_stats"}
