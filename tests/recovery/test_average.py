"""The moving average of the weights: the recurrence it is said to be, judged, kept and resumed as such."""

import pytest
import torch
from recovery.test_distill import FP32, Disturbed, assert_same, interrupt, sequences, weights
from recovery.test_trainable import Spiking
from tiny_models import tiny_model

import e3pruner
from e3pruner import prune
from e3pruner.recovery import LiveTeacher, distill

KEPT = [0, 1, 5]
DECAY = 0.7
SKIPPED = 11
OPTIONS = FP32 | {"steps": 13, "batch_size": 8, "lr": 1e-3, "spike": 1.5, "save_every": 1}


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama")


class Watching(Spiking):
    """A teacher that keeps the student's weights as every step finds them."""

    def __init__(self, model, student):
        super().__init__(model, [SKIPPED])
        self.student, self.seen = student, []

    def targets(self, batch):
        self.seen.append({name: w.double() for name, w in weights(self.student).items()})
        return super().targets(batch)


def test_the_weights_end_as_their_average(teacher):
    plain = prune(teacher, KEPT)
    watching = Watching(teacher, plain)
    data = sequences(64)
    assert distill(plain, teacher=watching, data=data, **OPTIONS).skipped == [SKIPPED]
    found = [*watching.seen, {name: w.double() for name, w in weights(plain).items()}]
    behind = [at for step, at in enumerate(found) if step not in (0, SKIPPED)]  # of each step that was taken
    expected = behind[0]
    for at in behind[1:]:
        expected = {name: DECAY * expected[name] + (1 - DECAY) * at[name] for name in at}

    averaged = prune(teacher, KEPT)
    result = distill(averaged, teacher=Spiking(teacher, [SKIPPED]), data=data, ema=DECAY, **OPTIONS)
    assert result.skipped == [SKIPPED]
    assert any((w - plain.get_parameter(name)).abs().max() > 1e-5 for name, w in weights(averaged).items())
    torch.testing.assert_close(
        {name: w.double() for name, w in weights(averaged).items()}, expected, rtol=1e-6, atol=1e-7
    )


def test_held_out_text_judges_the_average(teacher):
    student, data, held_out = prune(teacher, KEPT), sequences(16), sequences(4, 1)
    options = OPTIONS | {"steps": 3, "spike": 3.0, "ema": 0.9, "eval_every": 2}
    result = distill(student, teacher=teacher, data=data, held_out=held_out, **options)
    assert [record["step"] for record in result.held_out] == [0, 2, 3]
    expected = e3pruner.evaluate(student, [held_out], teacher, precision="fp32", progress=False)
    assert result.held_out[-1]["kl"] == pytest.approx(expected["kl"], rel=1e-5)


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_an_average_resumes_to_the_same_bits(teacher, tmp_path, trainable):
    options = OPTIONS | {"data": sequences(64), "held_out": sequences(4, 1), "steps": 5, "trainable": trainable}
    options |= {"ema": DECAY, "eval_every": 2}
    whole, stopped, resumed, finished = (prune(teacher, KEPT) for _ in range(4))
    expected = distill(whole, teacher=teacher, **options)
    with pytest.raises(KeyboardInterrupt):  # in the third step, behind one batch of held-out text
        distill(stopped, teacher=Disturbed(teacher, 3, interrupt), output=tmp_path / "run", **options)
    again = options | {"output": tmp_path / "run", "resume": True}
    result = distill(resumed, teacher=teacher, **again)
    assert (result.curve, result.held_out) == (expected.curve, expected.held_out)
    assert_same(weights(resumed), weights(whole))
    distill(finished, teacher=teacher, **again)
    assert_same(weights(finished), weights(whole))
    with pytest.raises(ValueError, match=r"resume: ema was 0.7 in the saved run and is None now"):
        distill(prune(teacher, KEPT), teacher=LiveTeacher(teacher), **again | {"ema": None})
