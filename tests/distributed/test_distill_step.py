"""`DistillStep` on ranks whose tokens differ, against one process that has all of them."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokens
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from e3pruner import find_layers, prune
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.options import DistillOptions

KEPT = [0, 2, 5]
TOKENS = tiny_tokens(batch=4, length=9)
NONE = torch.full_like(TOKENS, -100)


def sharded(student, **options):
    for layer in find_layers(student):
        fully_shard(layer, **options)
    return fully_shard(student, **options)


def own(tensor):
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def learn(student, teacher, labels, wrap=None, share=lambda tensor: tensor, **options):
    """The mean loss that is shown, and the gradients by name, of one step; `wrap` prepares the student for it."""
    step = DistillStep(student, teacher, DistillOptions(weighting="none", **options))
    wrapper = student if wrap is None else wrap(student)
    loss, shown = step.backward_loss(wrapper, batch_of({"input_ids": share(TOKENS), "labels": share(labels)}))
    loss.backward()
    step.finish(student.parameters())
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    return shown, {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


@pytest.mark.parametrize("reshard", [None, True, False])
@pytest.mark.parametrize("model_type", ["llama", "phi"])  # a tied head; one of its own, with a bias
def test_fully_sharded(model_type, reshard, tmp_path):
    teacher = tiny_model(model_type)
    expected = learn(prune(teacher, KEPT), teacher, TOKENS)

    def compare():
        wrap = partial(sharded, reshard_after_forward=reshard)
        shown, gradients = learn(prune(teacher, KEPT), teacher, TOKENS, wrap, own)
        torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-6)
        losses = [torch.empty_like(shown) for _ in range(2)]
        dist.all_gather(losses, shown)
        assert losses[0] != losses[1]
        torch.testing.assert_close(sum(losses) / 2, expected[0])

    on_ranks(2, compare, tmp_path)


@pytest.mark.parametrize("reshard", [True, False])
def test_a_sharded_head_with_more_columns_than_the_teacher_s(reshard, tmp_path):
    teacher, wide = tiny_model("phi"), tiny_model("phi", vocab_size=VOCAB_SIZE + 4)
    cut = partial(learn, labels=TOKENS, vocabulary=VOCAB_SIZE)
    expected = cut(prune(wide, KEPT), teacher)[1]

    def compare():
        wrap = partial(sharded, reshard_after_forward=reshard)
        gradients = cut(prune(wide, KEPT), teacher, wrap=wrap, share=own)[1]
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)

    on_ranks(2, compare, tmp_path)


def test_sharded_anew_after_the_forward_over_fewer_ranks(tmp_path):
    teacher = tiny_model("phi")
    expected = learn(prune(teacher, KEPT), teacher, TOKENS)[1]

    def compare():
        wrap = partial(sharded, reshard_after_forward=2)
        gradients = learn(prune(teacher, KEPT), teacher, TOKENS, wrap, own)[1]
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)

    on_ranks(4, compare, tmp_path)


@pytest.mark.parametrize("reshard", [True, False])
def test_fully_sharded_in_mixed_precision(reshard, tmp_path):
    """Weights that the optimizer holds in fp32 and the model multiplies in bf16, the head among them."""
    student, teacher = prune(tiny_model("phi"), KEPT), tiny_model("phi").bfloat16()
    expected = learn(prune(tiny_model("phi"), KEPT).bfloat16(), teacher, TOKENS)[1]

    def compare():
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        wrap = partial(sharded, reshard_after_forward=reshard, mp_policy=policy)
        gradients = learn(student, teacher, TOKENS, wrap, own)[1]
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            error = (gradient - expected[name].float()).norm() / expected[name].float().norm()
            assert error < 0.05, name

    on_ranks(2, compare, tmp_path)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, sharded])
def test_a_rank_without_a_label(wrap, tmp_path):
    """It learns nothing and takes nobody down; only if no rank has one, all raise."""
    teacher = tiny_model("llama")
    labels = torch.cat([TOKENS[:2], NONE[2:]])
    expected = learn(prune(teacher, KEPT), teacher, labels)[1]

    def compare():
        gradients = learn(prune(teacher, KEPT), teacher, labels, wrap, own)[1]
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="labels: no token of this step is to be predicted"):
            learn(prune(teacher, KEPT), teacher, NONE, wrap, own)

    on_ranks(2, compare, tmp_path)


def test_a_rank_without_a_batch(tmp_path):
    """Its share of a step was empty: as if it had no label."""
    teacher = tiny_model("llama")

    def compare():
        student = prune(teacher, KEPT)
        step = DistillStep(student, teacher)
        if dist.get_rank() == 0:
            step.backward_loss(student, batch_of({"input_ids": TOKENS}))[0].backward()
        step.finish(student.parameters())
        learnt = [p.grad is not None and bool(p.grad.any()) for p in student.parameters()]
        assert any(learnt) == (dist.get_rank() == 0)

    on_ranks(2, compare, tmp_path)
