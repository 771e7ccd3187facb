"""`patch_trl()` inside the steps of TRL's own trainers."""

import inspect

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model

import e3kernels

trl = pytest.importorskip("trl", reason="needs e3kernels[trl]")
datasets = pytest.importorskip("datasets", reason="needs e3kernels[trl]")

from trl.experimental.gkd.gkd_trainer import GKDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402


@pytest.fixture
def patched():
    """patched(...): `patch_trl(...)`, taken back at the end."""
    undo = []
    yield lambda **options: undo.append(e3kernels.patch_trl(**options))
    for restore in reversed(undo):
        restore()


def with_gradients(call, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss, *rest = result if isinstance(result := call(*leaves), tuple) else (result,)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves), *rest]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(5.0)])
def test_the_chunked_loss_is_trls_own(patched, beta, items):
    torch.manual_seed(0)
    hidden, head, bias = torch.randn(2, 5, 8), torch.randn(50, 8), torch.randn(50)
    teacher_hidden, teacher_head = torch.randn(2, 5, 12), torch.randn(50, 12)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])

    def call(hidden, head, bias):
        return distillation_trainer._chunked_divergence_loss(
            hidden, teacher_hidden, head, teacher_head, mask, beta, items, student_lm_head_bias=bias,
            student_logit_scale=0.7, teacher_final_logit_softcapping=6.0, temperature=1.7,
        )  # fmt: skip

    own = with_gradients(call, hidden, head, bias)
    patched()
    torch.testing.assert_close(with_gradients(call, hidden, head, bias), own, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_dense_loss_is_trls_own(patched, beta, reduction, labelled):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 50), torch.randn(2, 5, 50)
    labels = torch.where(torch.rand(2, 5) < 0.4, -100, 3) if labelled else None

    def call(student):
        loss = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, 1.7, reduction)
        return loss.sum() if reduction == "none" else loss

    own = with_gradients(call, student)
    patched()
    torch.testing.assert_close(with_gradients(call, student), own, rtol=2e-5, atol=1e-6)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w2", pad_token="w0", chat_template=chat)


def trained(kind, folder):
    """(losses, weights) of two steps of the trainer."""
    words = [" ".join(f"w{7 * i + j + 3}" for j in range(4)) for i in range(4)]
    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "optim": "sgd", "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "beta": 0.3, "seed": 1,
        "gradient_accumulation_steps": 2, "save_strategy": "no", "temperature": 0.9, "gradient_checkpointing": False,
    }  # fmt: skip
    models = {"model": tiny_model("llama", seed=1), "teacher_model": tiny_model("llama", seed=2)}
    if kind == "distillation":
        rows = [{"prompt": text} for text in words]
        arguments = trl.DistillationConfig(**settings, max_completion_length=4)
        trainer = trl.DistillationTrainer
    else:
        from trl.experimental.gkd import GKDConfig as Config

        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "w5 w6 w7"}]}
            for text in words
        ]
        arguments = Config(**settings, lmbda=0.0, max_length=32)
        trainer = GKDTrainer
    run = trainer(
        **models, args=arguments, processing_class=tokenizer(), train_dataset=datasets.Dataset.from_list(rows)
    )
    run.train()
    logs = [{k: v for k, v in log.items() if k in ("loss", "entropy", "grad_norm")} for log in run.state.log_history]
    return logs, {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("kind", ["distillation", "gkd"])
def test_a_trainer_takes_the_same_steps(patched, kind, tmp_path):
    logs, weights = trained(kind, tmp_path / "own")
    patched()
    ours, after = trained(kind, tmp_path / "ours")
    torch.testing.assert_close(ours, logs, rtol=2e-4, atol=2e-4)  # which TRL rounds
    torch.testing.assert_close(after, weights, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(p, tiny_model("llama", seed=1).get_parameter(name)) for name, p in after.items())


def test_other_weights_are_another_loss(patched):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 50), 4 * torch.randn(2, 5, 50)
    own = GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.0)
    patched(weighting="entropy", gamma=2.0)
    ours = GKDTrainer.generalized_jsd_loss(student, teacher, torch.zeros(2, 5, dtype=torch.long), beta=0.0)
    torch.testing.assert_close(ours, e3kernels.entropy_kl(student, teacher, gamma=2.0))
    assert abs(ours - own) > 1e-3


def test_everything_can_be_put_back():
    own = distillation_trainer._chunked_divergence_loss, inspect.getattr_static(GKDTrainer, "generalized_jsd_loss")
    first, second = e3kernels.patch_trl(), e3kernels.patch_trl(student_entropy=False)
    second()
    first()
    now = distillation_trainer._chunked_divergence_loss, inspect.getattr_static(GKDTrainer, "generalized_jsd_loss")
    assert now == own


def test_what_cannot_be_served_is_named(monkeypatch):
    with pytest.raises(ValueError, match="weighting is 'mix'"):
        e3kernels.patch_trl(weighting="mix")
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", lambda hidden, mask: None)
    with pytest.raises(RuntimeError, match=r"takes \['hidden', 'mask'\]; that of TRL"):
        e3kernels.patch_trl()
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    with pytest.raises(RuntimeError, match="has no _chunked_divergence_loss"):
        e3kernels.patch_trl()
