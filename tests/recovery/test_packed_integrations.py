"""Documents packed into rows, in other people's trainers: the same step as of the documents one to a row."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from recovery.test_integrations import KEPT, LR, InOrder, arguments, datasets, fit_lightning, trl, weights
from recovery.test_integrations import _tokenizer as word_tokenizer
from tiny_models import VOCAB_SIZE, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, TrainingArguments

from e3pruner import find_layers, prune
from e3pruner.recovery.integrations import trainer
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.text.batches import shuffled_batch
from e3pruner.text.documents import Marked, pack_documents

LENGTHS = [5, 9, 3, 7, 4, 8, 6, 6]


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama")


def documents() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()} for n in LENGTHS]


def one_to_a_row() -> dict[str, torch.Tensor]:
    """The documents, padded on the right."""
    inputs = {
        "input_ids": torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64),
        "labels": torch.full((len(LENGTHS), max(LENGTHS)), -100),
        "attention_mask": torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64),
    }
    for row, document in enumerate(documents()):
        ids = torch.tensor(document["input_ids"])
        inputs["input_ids"][row, : len(ids)] = inputs["labels"][row, : len(ids)] = ids
        inputs["attention_mask"][row, : len(ids)] = 1
    return inputs


def one_step(teacher, batch) -> dict[str, torch.Tensor]:
    """The weights after one step of SGD, of a plain loop."""
    student = prune(teacher, KEPT)
    step = DistillStep(student, teacher)
    step.backward_loss(student, batch)[0].backward()
    step.finish(student.parameters())
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    torch.optim.SGD(student.parameters(), lr=LR).step()
    return weights(student)


@pytest.fixture(scope="module")
def expected(teacher):
    return one_step(teacher, batch_of(one_to_a_row()))


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_packed_rows_is_that_of_the_documents(teacher, expected):
    inputs = DataCollatorWithFlattening()(documents())
    assert_near(one_step(teacher, batch_of(inputs)), expected)
    # Whose first tokens the labels do not leave out, as those of a data set that nobody prepared.
    assert_near(one_step(teacher, batch_of(inputs | {"labels": inputs["input_ids"]})), expected)
    assert_near(one_step(teacher, batch_of(inputs | {"attention_mask": torch.ones_like(inputs["labels"])})), expected)
    marked = [Marked(d["input_ids"], [True] * len(d["input_ids"])) for d in documents()]
    packed = pack_documents(marked, sum(LENGTHS) // 2)  # cuts no document: the first four are as long as the others
    assert_near(one_step(teacher, shuffled_batch(packed, 0, 2, seed=0)), expected)


def test_transformers_trainer_learns_from_packed_rows(teacher, expected, tmp_path):
    student = prune(teacher, KEPT)
    trainer.DistillTrainer(
        student,
        arguments(TrainingArguments, tmp_path, len(LENGTHS), 1),
        train_dataset=documents(),
        data_collator=DataCollatorWithFlattening(),
        teacher=teacher,
    ).train()
    assert_near(weights(student), expected)


@pytest.mark.parametrize("packing", [{"packing": True, "max_length": 12}, {"padding_free": True, "max_length": None}])
@pytest.mark.filterwarnings("ignore:.*[Ff]lash")
def test_trl_packs(teacher, expected, tmp_path, packing):
    class Trainer(InOrder, trainer.DistillMixin, trl.SFTTrainer):
        pass

    student = prune(teacher, KEPT)
    settings = arguments(trl.SFTConfig, tmp_path, len(LENGTHS), 1, bf16=False, **packing)
    run = Trainer(
        student,
        settings,
        train_dataset=datasets.Dataset.from_list(documents()),
        processing_class=word_tokenizer(),
        teacher=teacher,
    )
    run.train()
    assert run.state.global_step == 1
    assert_near(weights(student), expected)


def test_lightning_learns_from_packed_rows(teacher, expected, tmp_path):
    student = prune(teacher, KEPT)
    batches = DataLoader(documents(), batch_size=len(LENGTHS), collate_fn=DataCollatorWithFlattening())
    fit_lightning(student, teacher, batches, tmp_path)
    assert_near(weights(student), expected)


def test_two_processes_with_sharded_weights_learn_from_packed_rows(teacher, expected, tmp_path):
    def compare():
        student, mesh = prune(teacher, KEPT), init_device_mesh("cpu", (2,))
        step = DistillStep(student, teacher)
        for layer in find_layers(student):
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        inputs = DataCollatorWithFlattening()(documents()[dist.get_rank() :: 2])
        step.backward_loss(student, batch_of(inputs))[0].backward()
        step.finish(student.parameters())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        torch.optim.SGD(student.parameters(), lr=LR).step()
        assert_near({name: w.full_tensor() for name, w in weights(student).items()}, expected)

    on_ranks(2, compare, tmp_path)


def test_what_cannot_be_told_apart_is_refused():
    inputs = DataCollatorWithFlattening()(documents())
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask holds padding beside position_ids"):
        batch_of(inputs | {"attention_mask": mask})
    with pytest.raises(ValueError, match=r"position_ids has shape \(47,\); input_ids ask for \(1, 48\)"):
        batch_of(inputs | {"position_ids": torch.arange(47)})
    other = tiny_model("bloom")
    with pytest.raises(ValueError, match=r"student \(bloom\)"):
        DistillStep(other, tiny_model("bloom")).backward_loss(other, batch_of(inputs))
    student = prune(tiny_model("llama"), KEPT)
    with pytest.raises(ValueError, match=r"teacher \(bloom\)"):
        DistillStep(student, other).backward_loss(student, batch_of(inputs))
