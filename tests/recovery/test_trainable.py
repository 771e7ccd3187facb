import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from e3pruner import PruningPlan, prune
from e3pruner.recovery import LiveTeacher, distill
from e3pruner.recovery.student import beside_cuts

OPTIONS = {"precision": "fp32", "lr": 3e-3, "eval_every": 100}
PLAN = PruningPlan.of_removed([2, 3], 6)


def sequences(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (count, 16), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama")


@pytest.fixture
def student(teacher):
    return prune(teacher, PLAN)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("removed", "beside"),
    [([2, 3], [1, 2]), ([0], [0]), ([5], [4]), ([0, 2, 5], [0, 1, 2]), ([1, 4], [0, 1, 2, 3]), ([], [])],
)
def test_the_layers_beside_the_cuts(removed, beside):
    assert beside_cuts(PruningPlan.of_removed(removed, 6)) == beside


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("cuts", lambda name, p: name.startswith(("model.layers.1.", "model.layers.2."))),
        ("norms", lambda name, p: p.dim() == 1),
        ("lora", lambda name, p: "_proj.weight" in name),
    ],
)
def test_only_what_was_chosen_moves(teacher, student, trainable, expected):
    before, modules = weights(student), [type(m) for m in student.modules()]
    kinds = [(p.requires_grad, p.dtype) for p in student.parameters()]
    options = OPTIONS | {"trainable": trainable, "plan": PLAN, "steps": 20}
    result = distill(student, teacher=teacher, data=sequences(64), held_out=sequences(8, 1), **options)
    assert result.held_out[-1]["kl"] < result.held_out[0]["kl"]
    moved = {name for name, w in weights(student).items() if not torch.equal(w, before[name])}
    assert moved == {name for name, p in student.named_parameters() if expected(name, p)}
    assert [type(m) for m in student.modules()] == modules
    assert [(p.requires_grad, p.dtype) for p in student.parameters()] == kinds


def test_frozen_weights_get_no_adapters(teacher, student):
    frozen = student.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = weights(student)
    distill(student, teacher=teacher, data=sequences(16), **OPTIONS, trainable="lora", steps=2)
    moved = {name for name, w in weights(student).items() if not torch.equal(w, before[name])}
    assert moved == {n for n, p in student.named_parameters() if "_proj.weight" in n and p is not frozen}
    assert not frozen.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainable", ["norms", "cuts", "lora"])
def test_a_narrow_checkpoint_stays_narrow(teacher, student, trainable, precision):
    student.to(torch.bfloat16)
    before = weights(student)
    options = {"precision": precision, "lr": 0.05, "trainable": trainable, "plan": PLAN, "steps": 3}
    distill(student, teacher=teacher, data=sequences(16), **options)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(w, before[name]) for name, w in weights(student).items())


def test_lora_ends_in_the_function_that_was_trained(teacher, student):
    data = sequences(8, 1)
    options = OPTIONS | {"trainable": "lora", "lora_rank": 4, "steps": 5}
    result = distill(student, teacher=teacher, data=sequences(16), held_out=data, **options)
    assert result.held_out[-1]["perplexity"] == pytest.approx(student(data, labels=data).loss.exp().item(), rel=1e-4)


class Stopped(LiveTeacher):
    """The live teacher, which gives up after `batches`."""

    def __init__(self, model, batches):
        super().__init__(model)
        self.left = batches

    def targets(self, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().targets(batch)


@pytest.mark.parametrize("trainable", ["lora", "norms"])
def test_a_subset_resumes_to_the_same_bits(teacher, tmp_path, trainable):
    options = OPTIONS | {"data": sequences(16), "steps": 5, "trainable": trainable, "save_every": 1}
    whole, stopped, student, other = (prune(teacher, PLAN) for _ in range(4))
    expected = distill(whole, teacher=teacher, **options)
    with pytest.raises(KeyboardInterrupt):
        distill(stopped, teacher=Stopped(teacher, 3), output=tmp_path / "run", **options)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    with pytest.raises(ValueError, match="resume: frozen weights was"):
        distill(other, teacher=teacher, output=tmp_path / "run", resume=True, **options)
    result = distill(student, teacher=teacher, output=tmp_path / "run", resume=True, **options)
    assert_same(weights(student), weights(whole))
    assert result.curve == expected.curve


def test_the_cuts_must_be_known(teacher, student):
    for plan in (None, PruningPlan.of_removed([1], 6)):
        with pytest.raises(ValueError, match=r"plan is .*; trainable='cuts' needs the one by which the 4 layers"):
            distill(student, teacher=teacher, data=sequences(8), trainable="cuts", plan=plan)


class Spiking(LiveTeacher):
    """The live teacher, whose hidden states are turned round in the batches `at`."""

    def __init__(self, model, at):
        super().__init__(model)
        self.calls, self.at = 0, at

    def targets(self, batch):
        self.calls += 1
        return super().targets(batch) * (-3 if self.calls in self.at else 1)


def test_a_spike_is_skipped_and_said(teacher, tmp_path, capsys):
    options = OPTIONS | {"data": sequences(64), "steps": 14, "batch_size": 8, "lr": 1e-3, "spike": 1.5}
    student, resumed, unguarded = (prune(teacher, PLAN) for _ in range(3))
    result = distill(student, teacher=Spiking(teacher, [11]), **options)
    assert result.skipped == [11]
    assert "step 11 skipped" in " ".join(capsys.readouterr().err.split())
    assert result.curve[10]["loss"] > 1.5 * result.curve[9]["loss"]
    assert result.steps == len(result.curve) == 14

    # The same steps without that one, interrupted behind it: the optimizer counts only the steps that it took.
    spiking = Spiking(teacher, [11])
    interrupted = prune(teacher, PLAN)
    spiking.stop = Stopped(teacher, 12)
    spiking.targets = lambda batch, own=spiking.targets: (spiking.stop.targets(batch), own(batch))[1]
    with pytest.raises(KeyboardInterrupt):
        distill(interrupted, teacher=spiking, output=tmp_path / "run", save_every=1, **options)
    distill(resumed, teacher=teacher, output=tmp_path / "run", save_every=1, resume=True, **options)
    assert_same(weights(resumed), weights(student))

    assert distill(unguarded, teacher=Spiking(teacher, [11]), **options | {"spike": float("inf")}).skipped == []
    assert any(not torch.equal(w, weights(student)[name]) for name, w in weights(unguarded).items())


def test_what_stays_high_is_learnt_from_again(teacher, student):
    options = OPTIONS | {"data": sequences(64), "steps": 40, "batch_size": 8, "lr": 1e-4, "spike": 1.5}
    result = distill(student, teacher=Spiking(teacher, range(11, 100)), **options)
    # Half of the window is high by then, and so is its median.
    assert result.skipped in (list(range(11, last)) for last in (21, 22, 23))
