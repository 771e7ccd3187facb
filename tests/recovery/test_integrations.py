import pytest
import torch
from sweep.shrink import small_config, small_model
from tiny_models import POSITION_CONFIGS, TINY_CONFIGS, VOCAB_SIZE, tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainingArguments

from e3pruner import cache_teacher, prune
from e3pruner.recovery import DistillOptions
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.text.batches import Batch

LightningTrainer = pytest.importorskip("lightning", reason="needs e3kernels[lightning]").Trainer
trl = pytest.importorskip("trl", reason="needs e3kernels[trl]")
datasets = pytest.importorskip("datasets", reason="needs e3kernels[trl]")

from e3pruner.recovery.integrations import lightning, trainer  # noqa: E402  imports the packages

KEPT = [0, 1, 3, 5]
COUNT = 24
LR = 1e-3


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama")


def sequences() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (COUNT, 12), generator=torch.Generator().manual_seed(0))


def examples(ignored: int = 3) -> list[dict]:
    """Unequal numbers of tokens to predict, so that a mean of means would be another loss."""
    labels = sequences()
    for i, row in enumerate(labels):
        row[: ignored * (i % 3)] = -100
    return [
        {"input_ids": ids, "labels": row, "rows": torch.tensor(i)}
        for i, (ids, row) in enumerate(zip(sequences(), labels, strict=True))
    ]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def collate(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def plain_loop(teacher, batch_size=8, accumulation=1, source=None):
    """Three steps of 8 sequences in order, SGD and clipping: what every trainer below must do."""
    student = prune(teacher, KEPT)
    step = DistillStep(student, source or teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    batches = DataLoader(examples(), batch_size=batch_size, collate_fn=collate)
    losses = []
    for number, inputs in enumerate(batches, start=1):
        loss, shown = step.backward_loss(student, batch_of(inputs))
        loss.backward()
        losses.append(float(shown))
        if number % accumulation == 0:
            step.finish(student.parameters())
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return weights(student), losses


class InOrder:
    """A Trainer that goes through its data in order."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(kind, tmp_path, batch_size, accumulation, **more):
    return kind(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **more,
    )


# Types whose causal LM passes its base model by, lies in another model, or is of a class of its own.
@pytest.mark.parametrize("model_type", ["llama", "opt", "trocr", "llama4_text"])
def test_the_plain_loop_minimises_the_mean_over_all_tokens(model_type):
    teacher = small_model(small_config(model_type), AutoModelForCausalLM)
    student = prune(teacher, KEPT)
    step = DistillStep(student, teacher, DistillOptions(kd_ratio=1.0, weighting="none"))
    inputs = collate(examples())
    loss, shown = step.backward_loss(student, batch_of(inputs))
    loss.backward()
    step.finish(student.parameters())
    learning = {name: p for name, p in student.named_parameters() if p.grad is not None}  # TrOCR's has layers to spare
    actual = {name: p.grad.clone() for name, p in learning.items()}
    student.zero_grad()
    p, q = (m(inputs["input_ids"]).logits[:, :-1].log_softmax(-1) for m in (teacher, student))
    valid = inputs["labels"][:, 1:] != -100
    expected = (p.detach().exp() * (p.detach() - q)).sum(-1)[valid].mean()
    expected.backward()
    torch.testing.assert_close(shown, expected.detach())
    torch.testing.assert_close(actual, {name: p.grad for name, p in learning.items()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_transformers_trainer_equals_the_plain_loop(teacher, tmp_path, batch_size, accumulation):
    class Trainer(InOrder, trainer.DistillTrainer):
        pass

    student = prune(teacher, KEPT)
    run = Trainer(
        student,
        arguments(TrainingArguments, tmp_path, batch_size, accumulation),
        train_dataset=examples(),
        data_collator=collate,
        teacher=teacher,
    )
    run.train()
    expected, losses = plain_loop(teacher)
    torch.testing.assert_close(weights(student), expected, rtol=1e-5, atol=1e-5)
    if accumulation == 1:
        logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert logged == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("model_type", ["opt", "trocr", "llama4_text"])
def test_transformers_trainer_takes_types_of_other_shapes(model_type, tmp_path):
    config = small_config(model_type, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    teacher = small_model(config, AutoModelForCausalLM)
    test_transformers_trainer_equals_the_plain_loop(teacher, tmp_path, batch_size=8, accumulation=1)


def test_transformers_trainer_evaluates_with_the_same_loss(teacher, tmp_path):
    student = prune(teacher, KEPT)
    run = trainer.DistillTrainer(
        student,
        arguments(TrainingArguments, tmp_path, 8, 1, per_device_eval_batch_size=COUNT),
        eval_dataset=examples(),
        data_collator=collate,
        teacher=teacher,
    )
    inputs = collate(examples())
    expected = DistillStep(student, teacher).backward_loss(student, batch_of(inputs))[1]
    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_transformers_trainer_resumes_to_the_same_bits(teacher, tmp_path):
    def run(steps, resume=None):
        student = prune(teacher, KEPT)
        settings = arguments(TrainingArguments, tmp_path, 4, 2)
        settings.max_steps, settings.save_strategy, settings.save_steps = steps, "steps", 2
        distiller = trainer.DistillTrainer(
            student, settings, train_dataset=examples(), data_collator=collate, teacher=teacher
        )
        distiller.train(resume_from_checkpoint=resume)
        return weights(student)

    whole = run(3)
    torch.testing.assert_close(run(3, str(tmp_path / "checkpoint-2")), whole, rtol=0, atol=0)


def test_trl_equals_the_plain_loop(teacher, tmp_path):
    class Trainer(InOrder, trainer.DistillMixin, trl.SFTTrainer):
        pass

    student = prune(teacher, KEPT)
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "bf16": False}
    run = Trainer(
        student,
        arguments(trl.SFTConfig, tmp_path, 4, 2, **settings),
        train_dataset=datasets.Dataset.from_list(
            [{k: v.tolist() for k, v in example.items()} for example in examples()]
        ).with_format("torch"),
        data_collator=collate,
        processing_class=_tokenizer(),
        teacher=teacher,
    )
    run.train()
    torch.testing.assert_close(weights(student), plain_loop(teacher)[0], rtol=1e-5, atol=1e-5)


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w2", pad_token="w0")


def fit_lightning(student, teacher, batches, folder, accumulation=1):
    """Trains `student` with SGD; returns its module."""

    class Module(lightning.DistillMixin):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    module = Module(student, teacher)
    LightningTrainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulation,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, batches)
    return module


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4)])
def test_lightning_equals_the_plain_loop(teacher, tmp_path, batch_size, accumulation):
    student = prune(teacher, KEPT)
    batches = DataLoader(examples(), batch_size=batch_size, collate_fn=collate)
    module = fit_lightning(student, teacher, batches, tmp_path, accumulation)
    torch.testing.assert_close(weights(student), plain_loop(teacher)[0], rtol=1e-5, atol=1e-5)
    assert len(list(module.parameters())) == len(list(student.parameters()))


def test_trainers_learn_from_a_cache(teacher, tmp_path):
    class Trainer(InOrder, trainer.DistillTrainer):
        pass

    cache = cache_teacher(teacher, sequences(), tmp_path / "cache", precision="fp32")
    student = prune(teacher, KEPT)
    Trainer(
        student,
        arguments(TrainingArguments, tmp_path, 4, 2),
        train_dataset=examples(),
        data_collator=collate,
        teacher=cache,
    ).train()
    torch.testing.assert_close(weights(student), plain_loop(teacher, source=cache)[0], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_learnt_from_is_refused(teacher):
    student = prune(teacher, KEPT)
    inputs = collate(examples())
    step = DistillStep(student, teacher)
    nothing = Batch(inputs["input_ids"], torch.full_like(inputs["labels"][:, 1:], -100))
    step.backward_loss(student, nothing)[0].backward()
    with pytest.raises(ValueError, match="no token of this step is to be predicted"):
        step.finish(student.parameters())


def test_padding_is_not_learnt_from(teacher):
    student = prune(teacher, KEPT)
    inputs = collate(examples())
    padded = {
        "input_ids": torch.cat([torch.zeros(COUNT, 2, dtype=torch.int64), inputs["input_ids"]], dim=1),
        "labels": torch.cat([torch.full((COUNT, 2), -100), inputs["labels"]], dim=1),
        "attention_mask": torch.cat([torch.zeros(COUNT, 2, dtype=torch.int64), torch.ones(COUNT, 12).long()], dim=1),
    }
    losses = [DistillStep(student, teacher).backward_loss(student, batch_of(i))[1] for i in (inputs, padded)]
    assert float(losses[1]) != pytest.approx(0.0)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_labels_is_neither_learnt_nor_learnt_from(side):
    inputs = padded_on(side)
    batch = batch_of({name: inputs[name] for name in ("input_ids", "attention_mask")})
    assert (batch.labels != -100).sum() == (inputs["attention_mask"].sum(-1) - 1).sum()
    with pytest.raises(ValueError, match="attention_mask holds 2; it is 1 for tokens and 0 for padding"):
        batch_of(inputs | {"attention_mask": 2 * inputs["attention_mask"]})


def padded_on(side: str, fill: int = 5) -> dict[str, torch.Tensor]:
    """Rows of 12 to 7 tokens, padded with `fill` on one side."""
    rows = [row[: 12 - i % 6] for i, row in enumerate(sequences()[:6])]
    parts = {"input_ids": fill, "labels": -100, "attention_mask": 0}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in parts}
    for row in rows:
        values = {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for name, pad in parts.items():
            filler = torch.full((12 - len(row),), pad)
            inputs[name].append(torch.cat([filler, values[name]] if side == "left" else [values[name], filler]))
    return {name: torch.stack(tensors) for name, tensors in inputs.items()}


@pytest.mark.parametrize("model_type", [*TINY_CONFIGS, "gpt_neo", *POSITION_CONFIGS])
def test_the_side_of_the_padding_changes_nothing(model_type):
    teacher = tiny_model(model_type)
    student = prune(teacher, KEPT)
    gradients = []
    for side in ("left", "right"):
        step = DistillStep(student, teacher)
        loss, shown = step.backward_loss(student, batch_of(padded_on(side)))
        loss.backward()
        step.finish(student.parameters())
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()} | {"loss": shown})
        student.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_the_loss_of_padded_rows_is_that_of_the_rows_alone():
    teacher = tiny_model("gpt2")
    student = prune(teacher, KEPT)
    whole = DistillStep(student, teacher).backward_loss(student, batch_of(padded_on("left")))[0]
    alone = 0.0
    for row, mask in zip(*(padded_on("left")[name] for name in ("input_ids", "attention_mask")), strict=True):
        ids = row[mask.bool()][None]
        alone += float(DistillStep(student, teacher).backward_loss(student, batch_of({"input_ids": ids}))[0].detach())
    assert float(whole.detach()) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("kind", ["transformers", "trl", "lightning"])
def test_trainers_pass_the_positions_of_padded_rows(kind, tmp_path):
    teacher = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    weights_by_side = []
    for side in ("left", "right"):
        student = prune(teacher, KEPT)
        padded = padded_on(side)
        rows = [{name: tensor[i] for name, tensor in padded.items()} for i in range(6)]
        if kind == "lightning":
            fit_lightning(student, teacher, DataLoader(rows, batch_size=6, collate_fn=collate), tmp_path)
        elif kind == "trl":

            class Trainer(InOrder, trainer.DistillMixin, trl.SFTTrainer):
                pass

            settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "bf16": False}
            Trainer(
                student,
                arguments(trl.SFTConfig, tmp_path, 6, 1, **settings),
                train_dataset=datasets.Dataset.from_list(
                    [{k: v.tolist() for k, v in r.items()} for r in rows]
                ).with_format("torch"),
                data_collator=collate,
                processing_class=_tokenizer(),
                teacher=teacher,
            ).train()
        else:
            settings = arguments(TrainingArguments, tmp_path, 6, 1)
            trainer.DistillTrainer(
                student, settings, train_dataset=rows, data_collator=collate, teacher=teacher
            ).train()
        weights_by_side.append(weights(student))
    torch.testing.assert_close(weights_by_side[0], weights_by_side[1], rtol=1e-5, atol=1e-6)


def unlabelled(rows: range) -> list[dict]:
    """The examples, those of `rows` without any label."""
    made = examples()
    for row in rows:
        made[row]["labels"] = torch.full_like(made[row]["labels"], -100)
    return made


def test_a_batch_without_labels_shows_a_loss_of_zero(teacher):
    student = prune(teacher, KEPT)
    loss, shown = DistillStep(student, teacher).backward_loss(student, batch_of(collate(unlabelled(range(COUNT)))))
    assert (float(loss.detach()), float(shown)) == (0.0, 0.0)


def test_finish_gives_the_mean_over_the_tokens_of_the_step(teacher):
    student = prune(teacher, KEPT)
    step = DistillStep(student, teacher)
    rows = unlabelled(range(4, 8))
    for part in (rows[:4], rows[4:8], rows[8:]):
        step.backward_loss(student, batch_of(collate(part)))[0].backward()
    whole = DistillStep(student, teacher).backward_loss(student, batch_of(collate(rows)))[1]
    assert float(step.finish(student.parameters())) == pytest.approx(float(whole), rel=1e-5)


def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_step(teacher, tmp_path):
    class Trainer(InOrder, trainer.DistillTrainer):
        pass

    def logged(accumulation: int, rows: range) -> list[float]:
        run = Trainer(
            prune(teacher, KEPT),
            arguments(TrainingArguments, tmp_path, 8 // accumulation, accumulation),
            train_dataset=unlabelled(rows),
            data_collator=collate,
            teacher=teacher,
        )
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    # Rows 2 to 5 are two whole micro-batches of two.
    assert logged(4, range(2, 6)) == pytest.approx(logged(1, range(2, 6)), rel=1e-3)


def test_lightning_logs_the_mean_over_the_tokens_of_the_step(teacher, tmp_path):
    def logged(batch_size: int, accumulation: int) -> float:
        batches = DataLoader(unlabelled(range(18, 22)), batch_size=batch_size, collate_fn=collate)
        module = fit_lightning(prune(teacher, KEPT), teacher, batches, tmp_path, accumulation)
        return float(module.trainer.callback_metrics["loss"])

    assert logged(2, 4) == pytest.approx(logged(8, 1), rel=1e-4)


def test_evaluation_is_the_mean_over_all_tokens(teacher, tmp_path):
    def evaluated(size: int) -> float:
        run = trainer.DistillTrainer(
            prune(teacher, KEPT),
            arguments(TrainingArguments, tmp_path, 8, 1, per_device_eval_batch_size=size),
            eval_dataset=unlabelled(range(4, 8)),
            data_collator=collate,
            teacher=teacher,
        )
        return run.evaluate()["eval_loss"]

    assert evaluated(4) == pytest.approx(evaluated(COUNT), rel=1e-5)
