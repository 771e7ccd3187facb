import json
import os
import signal

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from e3pruner import PruningPlan, prune
from e3pruner.recovery import LiveTeacher, distill
from e3pruner.recovery.state import KIND
from e3pruner.recovery.teacher import narrowed
from e3pruner.storage import read_checked, write_checked
from e3pruner.text.batches import Batch

FP32 = {"precision": "fp32", "lr": 3e-3, "eval_every": 10}


def sequences(count: int, seed: int = 0, length: int = 16) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama")


def teacher_with_another(name, rows=slice(None)):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[rows] *= 1.5
    return model


@pytest.fixture
def student(teacher):
    return prune(teacher, [0, 1, 3, 5])


class Disturbed(LiveTeacher):
    """The live teacher, with `disturb()` run on its targets before batch number `at` (from 0)."""

    def __init__(self, model, at, disturb):
        super().__init__(model)
        self.calls, self.at, self.disturb = 0, at, disturb

    def targets(self, batch):
        hidden = super().targets(batch)
        self.calls += 1
        return self.disturb(hidden) if self.calls == self.at + 1 else hidden


def interrupt(hidden):
    signal.raise_signal(signal.SIGINT)
    return hidden


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_type", "precision"), [("llama", "bf16"), ("gemma2", "fp32"), ("gpt2", "fp32"), ("cohere2", "fp32")]
)
def test_distillation_brings_the_student_nearer_to_its_teacher(model_type, precision):
    teacher = tiny_model(model_type)
    student = prune(teacher, [0, 1, 3, 5])
    before = weights(teacher)
    options = FP32 | {"precision": precision, "kd_ratio": 1.0, "weighting": "none"}
    result = distill(student, teacher=teacher, data=sequences(64), held_out=sequences(8, 1), steps=30, **options)
    assert result.held_out[-1]["kl"] < 0.8 * result.held_out[0]["kl"]
    losses = [point["loss"] for point in result.curve]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert [point["step"] for point in result.held_out] == [0, 10, 20, 30]
    assert (result.steps, len(result.curve), result.tokens) == (30, 30, 30 * 4 * 15)
    assert_same(weights(teacher), before)


def test_the_loss_of_the_first_step_is_that_of_the_logits(teacher, student):
    data = sequences(4)
    expected = torch.nn.functional.kl_div(
        student(data).logits.detach()[:, :-1].log_softmax(-1).flatten(0, 1),
        teacher(data).logits[:, :-1].log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    ).item()
    options = FP32 | {"kd_ratio": 1.0, "weighting": "none"}
    result = distill(student, teacher=teacher, data=data, held_out=data, **options)
    assert result.steps == 1
    assert result.curve[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.held_out[0]["kl"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_that_of_the_model(teacher, student):
    data = sequences(8)
    result = distill(student, teacher=teacher, data=data, held_out=data, steps=3, **FP32)
    assert result.held_out[-1]["perplexity"] == pytest.approx(student(data, labels=data).loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("weighting", ["entropy", "inverse", "none"])
def test_accumulation_is_as_good_as_a_large_batch(teacher, weighting):
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        student = prune(teacher, [0, 2, 4])
        options = FP32 | {"batch_size": batch_size, "accumulation": accumulation, "weighting": weighting}
        result = distill(student, teacher=teacher, data=sequences(16), steps=3, **options)
        runs.append((weights(student), [point["loss"] for point in result.curve]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-5)


def test_an_interrupted_run_resumes_to_the_same_bits(teacher, tmp_path):
    options = FP32 | {"data": sequences(16), "held_out": sequences(4, 1), "steps": 7, "eval_every": 3}
    whole = prune(teacher, [0, 1, 5])
    expected = distill(whole, teacher=teacher, **options)

    student = prune(teacher, [0, 1, 5])
    with pytest.raises(KeyboardInterrupt):
        # One batch of held-out text comes first, so this is the third step.
        distill(student, teacher=Disturbed(teacher, 3, interrupt), output=tmp_path / "run", **options)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["step"] == 3

    student = prune(teacher, [0, 1, 5])
    result = distill(student, teacher=teacher, output=tmp_path / "run", resume=True, **options)
    assert_same(weights(student), weights(whole))
    assert (result.curve, result.held_out, result.tokens) == (expected.curve, expected.held_out, expected.tokens)

    finished = prune(teacher, [0, 1, 5])
    assert distill(finished, teacher=teacher, output=tmp_path / "run", resume=True, **options) == result
    assert_same(weights(finished), weights(whole))


def test_a_killed_run_resumes_to_the_same_bits(teacher, tmp_path):
    options = FP32 | {"data": sequences(16), "steps": 6, "save_every": 2}
    whole = prune(teacher, [0, 1, 5])
    distill(whole, teacher=teacher, **options)
    # A copy of this process that dies in its fifth step; single-threaded, so forking it is safe.
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        killer = Disturbed(teacher, 4, lambda hidden: os.kill(os.getpid(), signal.SIGKILL))
        distill(prune(teacher, [0, 1, 5]), teacher=killer, output=tmp_path / "run", **options)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    student = prune(teacher, [0, 1, 5])
    assert distill(student, teacher=teacher, output=tmp_path / "run", resume=True, **options).steps == 6
    assert_same(weights(student), weights(whole))


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(teacher, student, tmp_path):
    options = FP32 | {"data": sequences(16), "steps": 5}
    expected = prune(teacher, [0, 1, 3, 5])
    with pytest.raises(FloatingPointError, match=r"step 3: loss is nan.*last good state, of step 2, is in "):
        distill(student, teacher=Disturbed(teacher, 2, lambda h: h * float("nan")), output=tmp_path / "run", **options)
    last_good = weights(student)
    assert all(w.isfinite().all() for w in last_good.values())

    resumed = prune(teacher, [0, 1, 3, 5])
    distill(resumed, teacher=teacher, output=tmp_path / "run", resume=True, **options)
    distill(expected, teacher=teacher, **options)
    assert_same(weights(resumed), weights(expected))


def test_bfloat16_models_are_trained_in_fp32_and_given_back_in_bfloat16(teacher):
    student = prune(teacher, [0, 1, 3, 5]).to(torch.bfloat16)
    before = weights(student)
    # Each of these steps is below half a bfloat16 ulp of most weights: without master weights all would be lost.
    distill(student, teacher=teacher, data=sequences(64), steps=30, lr=3e-4, warmup=0.0, precision="fp32")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    moved = [float((w != before[name]).float().mean()) for name, w in weights(student).items() if w.dim() == 2]
    assert min(moved) > 0.2


def test_only_the_chosen_parameters_move_and_the_model_is_left_as_it_was(teacher, student):
    student.train()
    student.model.norm.weight.requires_grad_(False)
    before = weights(student)
    distill(student, teacher=teacher, data=sequences(8), trainable="decoder", **FP32)
    moved = {name for name, w in weights(student).items() if not torch.equal(w, before[name])}
    assert moved == {name for name in before if name.startswith("model.layers.")}
    assert student.training
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in student.parameters())


def test_the_teacher_keeps_its_mode(student):
    teacher = tiny_model("gpt2").train()  # with dropout
    teacher.transformer.h[2].eval()
    modes = {name: module.training for name, module in teacher.named_modules()}
    batch = Batch.of_rows(sequences(4), torch.arange(4))
    source = LiveTeacher(teacher)
    assert_same(source.targets(batch), source.targets(batch))
    distill(prune(teacher, [0, 1, 3, 5]), teacher=teacher, data=sequences(8), held_out=sequences(4, 1), **FP32)
    assert {name: module.training for name, module in teacher.named_modules()} == modes


def test_what_the_caller_froze_stays_frozen(teacher, student):
    student.model.layers[1].requires_grad_(False)
    student.model.embed_tokens.requires_grad_(False)  # and the output head, which is the same weight
    before = weights(student)
    distill(student, teacher=teacher, data=sequences(8), **FP32)
    moved = {name for name, w in weights(student).items() if not torch.equal(w, before[name])}
    frozen = ("model.layers.1.", "model.embed_tokens.")
    assert moved == {name for name in before if not name.startswith(frozen)}
    assert {name for name, p in student.named_parameters() if not p.requires_grad} == before.keys() - moved


@pytest.mark.parametrize("trainable", ["all", "decoder", "cuts", "norms", "lora"])
def test_a_student_with_nothing_to_train_is_refused(teacher, student, trainable, tmp_path):
    if trainable == "lora":
        pytest.importorskip("peft", reason="needs e3kernels[lora]")
    student.requires_grad_(False)
    before = weights(student)
    arguments = {"data": sequences(8), "plan": PruningPlan.of_removed([2, 4], 6), "output": tmp_path / "run"}
    with pytest.raises(ValueError, match=rf"trainable='{trainable}' names no parameter that requires a gradient"):
        distill(student, teacher=teacher, trainable=trainable, **arguments, **FP32)
    assert_same(weights(student), before)
    assert not any(p.requires_grad for p in student.parameters())
    assert not (tmp_path / "run").exists()


def test_tied_weights_stay_tied(teacher, student):
    distill(student, teacher=teacher, data=sequences(8), **FP32)
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, r"resume: lr was 0.003 in the saved run and is 0.001 now"),
        ({"steps": 9}, r"resume: steps was 2 .* is 9 now"),
        ({"data": sequences(16, seed=5)}, r"resume: data was"),
        ({"teacher": tiny_model("llama", seed=3)}, r"resume: teacher was"),
        ({"teacher": teacher_with_another("model.layers.2.mlp.down_proj.weight")}, r"resume: teacher was"),
        ({"teacher": teacher_with_another("model.embed_tokens.weight", rows=-1)}, r"resume: teacher was"),
        ({"teacher": teacher_with_another("model.layers.3.mlp.up_proj.weight", rows=(17, 5))}, r"resume: teacher was"),
    ],
)
def test_resuming_with_other_settings_is_refused(teacher, student, tmp_path, changes, message):
    arguments = {"teacher": teacher, "data": sequences(16), "steps": 2, "output": tmp_path / "run"} | FP32
    distill(student, **arguments)
    before = weights(student)
    with pytest.raises(ValueError, match=message):
        distill(student, **arguments | changes, resume=True)
    assert_same(weights(student), before)


def test_an_output_folder_is_not_overwritten_unasked(teacher, student, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    arguments = {"teacher": teacher, "data": sequences(8), "output": tmp_path, "steps": 1} | FP32
    with pytest.raises(FileExistsError, match=r"output=.* is not empty"):
        distill(student, **arguments)
    distill(student, **arguments, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "state.json").exists()


def test_there_must_be_something_to_resume(teacher, student, tmp_path):
    arguments = {"teacher": teacher, "data": sequences(8), "resume": True}
    with pytest.raises(ValueError, match="resume=True needs output"):
        distill(student, **arguments)
    with pytest.raises(FileNotFoundError, match=r"resume: .*state.json does not exist"):
        distill(student, **arguments, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def edit(file, **values):
    """Other values, with the checksum that belongs to them."""
    write_checked(file, KIND, read_checked(file, KIND, {}) | values)


DAMAGES = {
    "cut short": lambda state, tensors: state.write_text(state.read_text()[:-20]),
    "a list": lambda state, tensors: state.write_text("[]"),
    "null": lambda state, tensors: state.write_text("null"),
    "deep": lambda state, tensors: state.write_text("[" * 100_000),
    "another loss": lambda state, tensors: state.write_text(state.read_text().replace('"lr": 0.003', '"lr": 0.007')),
    "another format": lambda state, tensors: edit(state, format=1),
    "no step": lambda state, tensors: edit(state, step=None),
    "a path for a step": lambda state, tensors: edit(state, step="../../elsewhere"),
    "another step": lambda state, tensors: edit(state, step=7),
    "no settings": lambda state, tensors: edit(state, settings=[]),
    "no result": lambda state, tensors: edit(state, result=None),
    "half of a result": lambda state, tensors: edit(state, result={"steps": "many"}),
    "tensors cut short": lambda state, tensors: os.truncate(tensors, tensors.stat().st_size // 2),
    "no tensors": lambda state, tensors: tensors.unlink(),
    "a flipped bit": lambda state, tensors: flip(tensors, -5),
    "a flipped bit in a moment": lambda state, tensors: flip(tensors, tensors.stat().st_size // 3),
    "a flipped bit in the header": lambda state, tensors: flip(tensors, 40),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_changes(teacher, student, tmp_path, damage):
    arguments = {"teacher": teacher, "data": sequences(8), "output": tmp_path, "steps": 1} | FP32
    distill(student, **arguments)
    (tensors,) = tmp_path.glob("state-*.safetensors")
    DAMAGES[damage](tmp_path / "state.json", tensors)
    before = weights(student)
    with pytest.raises(ValueError, match=r"state.*(damaged|not of the format).*start again with force"):
        distill(student, **arguments, resume=True)
    assert_same(weights(student), before)


def test_a_state_reads_nothing_outside_its_folder(teacher, student, tmp_path):
    arguments = {"teacher": teacher, "data": sequences(8), "steps": 1} | FP32
    distill(student, **arguments, output=tmp_path / "other")
    distill(student, **arguments, output=tmp_path / "run")
    (outside,) = (tmp_path / "other").glob("state-*.safetensors")
    (tmp_path / "run" / outside.name).unlink()
    edit(tmp_path / "run" / "state.json", tensors=f"../other/{outside.name}")
    with pytest.raises(ValueError, match=rf"run/{outside.name} is missing or damaged.*start again with force"):
        distill(student, **arguments, output=tmp_path / "run", resume=True)


def test_a_state_of_another_model_is_refused(teacher, student, tmp_path):
    arguments = {"teacher": teacher, "data": sequences(8), "output": tmp_path, "steps": 1} | FP32
    distill(student, **arguments)
    with pytest.raises(ValueError, match=r"state is of another model: model\.layers\.3"):
        distill(prune(teacher, [0, 1, 3]), **arguments, resume=True)


def test_teacher_and_student_must_share_vocabulary_but_not_weights(teacher, student):
    with pytest.raises(ValueError, match=r"teacher has a vocabulary of 120 tokens and the student one of 99"):
        distill(student, teacher=tiny_model("llama", vocab_size=120), data=sequences(8))
    with pytest.raises(ValueError, match=r"teacher shares the weight model.embed_tokens.weight"):
        distill(prune(teacher, [0, 1], copy_weights=False), teacher=teacher, data=sequences(8))


def test_tokens_beyond_the_vocabulary_are_refused(teacher, student):
    with pytest.raises(ValueError, match=r"data\[0\] holds token 99"):
        distill(student, teacher=teacher, data=torch.full((2, 8), VOCAB_SIZE))
    with pytest.raises(ValueError, match=r"held_out is empty"):
        distill(student, teacher=teacher, data=sequences(8), held_out=[])


def test_casting_the_teacher_once_changes_no_bit_of_it(teacher):
    batch = Batch.of_rows(sequences(4), torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        expected = LiveTeacher(teacher).targets(batch)
        before = weights(teacher)
        with narrowed(teacher, torch.bfloat16):
            assert teacher.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
            actual = LiveTeacher(teacher, torch.bfloat16).targets(batch)
    assert_same(actual, expected)
    assert_same(weights(teacher), before)
