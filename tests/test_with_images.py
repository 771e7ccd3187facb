"""What is measured on text with images is what the model makes of them: search, evaluation, recovery, its cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery.test_images import bypassed, logits
from sweep.shrink import small_config, small_model
from tiny_models import tiny_model
from tiny_vision_models import IMAGE_TOKEN, image_batch, tiny_vision_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

import e3pruner
from e3pruner.models import find_layers
from e3pruner.recovery import cache_teacher
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.options import DistillOptions
from e3pruner.text.given import batches_of, sequences_of

ROWS = {"input_ids", "attention_mask", "mm_token_type_ids"}
TYPES = ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl"]


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`batch` with three tokens of padding before its first row, its last ones gone."""
    padded = dict(batch)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in batch:
            moved = torch.cat([batch[name].new_zeros(3), batch[name][0, :-3]])
            padded[name] = torch.stack([moved, batch[name][1]])
    return padded


def text_only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def mean_kl(dense: Tensor, pruned: Tensor, batch: dict[str, Any]) -> float:
    """KL over the positions that predict a token of text."""
    p, q = (each.double().log_softmax(-1)[:, :-1] for each in (dense, pruned))
    text = (batch["input_ids"] != IMAGE_TOKEN) & (batch["attention_mask"] == 1)
    counted = text[:, 1:] & (batch["attention_mask"][:, :-1] == 1)
    return float((p.exp() * (p - q)).sum(-1)[counted].mean())


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_search_and_evaluation_see_the_images(model_type: str, padded: bool) -> None:
    model = tiny_vision_model(model_type)
    batch = left_padded(image_batch(model)) if padded else image_batch(model)
    plan = e3pruner.search(model, [batch], 2, "leave-one-out", protect=[0, 1], precision="fp32", progress=False)
    dense = logits(model, batch)
    with bypassed(find_layers(model), plan.removed):
        expected = mean_kl(dense, logits(model, batch), batch)
    assert plan.metrics["kl"] == pytest.approx(expected, rel=1e-3)

    pruned = e3pruner.prune(model, plan)
    found = e3pruner.evaluate(pruned, [batch], model, progress=False)
    assert found["kl"] == pytest.approx(expected, rel=1e-3)
    blank = e3pruner.evaluate(pruned, [text_only(batch)], model, progress=False)
    assert found["kl"] != pytest.approx(blank["kl"], rel=1e-3)
    apart = e3pruner.evaluate(pruned, [one_row(batch, row) for row in range(2)], model, progress=False)
    assert apart["kl"] == pytest.approx(found["kl"], rel=1e-4)


def one_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch with an image in every row."""
    size = {name: len(value) // len(batch["input_ids"]) for name, value in batch.items()}
    return {name: value[row * size[name] : (row + 1) * size[name]] for name, value in batch.items()}


@pytest.mark.parametrize("model_type", TYPES)
def test_recovery_learns_from_the_images(model_type: str, tmp_path: Path) -> None:
    model = tiny_vision_model(model_type)
    pruned = e3pruner.prune(model, [0, 1, 3, 5])
    batch = image_batch(model)
    expected = mean_kl(logits(model, batch), logits(pruned, batch), batch)
    options: dict[str, Any] = {"weighting": "none", "kd_ratio": 1.0}

    _, shown = DistillStep(pruned, model, DistillOptions(**options)).backward_loss(pruned, batch_of(batch))
    assert float(shown) == pytest.approx(expected, rel=1e-3)
    data = [one_row(batch, row) for row in range(2)]
    cache = cache_teacher(model, data, tmp_path, k=5, precision="fp32")
    for teacher in (model, cache):
        student = e3pruner.prune(model, [0, 1, 3, 5])
        result = e3pruner.distill(
            student, teacher=teacher, data=data, batch_size=2, steps=2, precision="fp32", **options
        )
        assert len(result.curve) == 2
        if teacher is model:
            assert result.curve[0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_rows_keep_their_images() -> None:
    model = tiny_vision_model("qwen2_5_vl")
    batch = left_padded(image_batch(model))
    short = {name: value[:, :-2] if value.shape == batch["input_ids"].shape else value for name, value in batch.items()}
    whole = sequences_of("data", [batch, short], 99, model=model)
    last = whole[torch.tensor([3, 0])].inputs
    assert torch.equal(last["pixel_values"], torch.cat([batch["pixel_values"][16:], batch["pixel_values"][:16]]))
    assert torch.equal(last["mm_token_type_ids"] == 1, last["input_ids"] == IMAGE_TOKEN)
    assert last["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert (
        whole.identity
        != sequences_of("data", [batch, short | {"pixel_values": -short["pixel_values"]}], 99, model=model).identity
    )
    assert (whole.targets != IMAGE_TOKEN).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_values": torch.zeros(5, 3, 16, 16)}, "has shape (5, 3, 16, 16) for 2 rows.*one row each"),
        ({"position_ids": torch.arange(18).expand(2, -1), "attention_mask": None}, "packed documents stand beside"),
        ({"input_features": torch.zeros(2, 80, 10)}, "input_features, which model .llava. cannot read"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(change: dict[str, Any], said: str) -> None:
    model = tiny_vision_model("llava")
    batch = image_batch(model)
    if "position_ids" in change:
        change = change | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand(2, -1)}
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        batches_of("token_batches", [batch | change], 99, model=model)


def test_text_without_the_image_that_a_model_needs_is_refused() -> None:
    model = small_model(small_config("blip-2"), AutoModelForImageTextToText)
    with pytest.raises(
        ValueError, match=r"token_batches holds no pixel_values, which model \(blip-2\) cannot do without"
    ):
        e3pruner.search(model, torch.arange(3, 27).view(2, 12), 2, progress=False)


def test_a_model_that_does_not_predict_per_token_is_refused() -> None:
    model = small_model(small_config("git"), AutoModelForImageTextToText)
    ids = torch.arange(3, 27).view(2, 12)
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"model \(git\) predicts at 29 places for 12 tokens"):
        e3pruner.evaluate(model, [batch], progress=False)
    with pytest.raises(ValueError, match="for 12 tokens"):
        DistillStep(model, e3pruner.prune(model, [0, 1, 2])).backward_loss(model, batch_of(batch))


def test_a_row_may_have_two_images_where_it_stands_alone() -> None:
    model = tiny_vision_model("qwen2_5_vl")
    one, other = (one_row(image_batch(model), row) for row in range(2))
    pair = {name: torch.cat([one[name], other[name]], dim=int(name in ROWS)) for name in one}
    assert pair["image_grid_thw"].shape[0] == 2 * pair["input_ids"].shape[0]
    found = e3pruner.evaluate(model, [pair], model, progress=False)
    assert found["tokens"] == 2 * 13 + 1
    with pytest.raises(ValueError, match=r"image_grid_thw has shape \(2, 3\) for 4 rows|pixel_values has shape"):
        batches_of("data", [pair | {name: pair[name].repeat(4, 1) for name in ROWS}], 99, model=model)


def test_a_model_of_text_is_given_no_image() -> None:
    vision = tiny_vision_model("llava")
    batch = image_batch(vision)
    with pytest.raises(ValueError, match=r"token_batches\[0\] holds pixel_values, which model \(llama\) cannot read"):
        e3pruner.evaluate(tiny_model("llama"), [batch], progress=False)
    with pytest.raises(ValueError, match=r"pixel_values, which teacher \(llama\) cannot read"):
        e3pruner.evaluate(vision, [batch], tiny_model("llama"), vocabulary=90, progress=False)
