import pytest
import torch
from tiny_models import tiny_model

from e3pruner.precision import autocast_dtype, weights_in


def test_weights_are_narrow_inside_and_the_same_tensors_after_an_error():
    model = tiny_model("llama")
    before = [(parameter, parameter.data_ptr(), parameter.clone()) for parameter in model.parameters()]

    def fail_inside():
        with weights_in(model.parameters(), torch.bfloat16):
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
            assert model.lm_head.weight is model.model.embed_tokens.weight
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    for parameter, (own, pointer, values) in zip(model.parameters(), before, strict=True):
        assert parameter is own
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)


def test_precision_names():
    cpu = torch.device("cpu")
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) is torch.bfloat16
    assert autocast_dtype("auto", cpu) in (None, torch.bfloat16)
    with pytest.raises(ValueError, match="precision='int8' must be one of auto, bf16, fp32"):
        autocast_dtype("int8", cpu)
