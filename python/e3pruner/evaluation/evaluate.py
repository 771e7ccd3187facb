"""Perplexity, and how far a model's predictions are from a teacher's."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import e3kernels as e3k
from e3pruner.models import OutputHead, find_layers, last_hidden, output_head
from e3pruner.models.device import rounded_dtype
from e3pruner.models.stack import evaluating
from e3pruner.models.vocabulary import common_vocabulary, tokenizer_size
from e3pruner.precision import weights_in
from e3pruner.text.given import Given, batches_of, is_whole
from e3pruner.text.sequences import Sequences

_PASS_TOKENS = 4096  # of one forward pass, where one batch is all there is
_TILE_VALUES = 2**23  # logits that exist at a time: 32 MiB in fp32, of student and teacher each


@dataclass
class _Sums:
    """Sums over the predicted tokens seen so far."""

    tokens: int = 0
    cross_entropy: float = 0.0
    kl: float = 0.0
    agreements: int = 0


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    token_batches: Given,
    teacher: PreTrainedModel | None = None,
    *,
    vocabulary: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: str = "fp32",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure `model` on text: every token but the first of each sequence is predicted from those before it.

    token_batches: as in `e3pruner.search`; one batch may be of any size. Padding counts in no figure; of text with
    labels, such as `Packed` documents, they alone are predicted. teacher: the model to compare with, for example the
    dense one. precision: "fp32" computes in the type of the weights, "bf16" with the weights rounded to bfloat16
    meanwhile, "auto" in bf16 where the processor multiplies it. progress: show a bar on standard error.

    vocabulary: the columns of both models' logits that count, from the first on; what is behind them is cut, for models
    that pad their vocabularies differently. Unless told, all, where both have as many; else those that both have, if
    `tokenizer`, which they share, has no token beyond.

    Returns "perplexity" = exp of the mean cross-entropy in nats, "tokens" (predicted ones), "layers", "parameters"
    (tied ones count once), and with a teacher "kl", the mean KL(teacher ‖ model) in nats per token over the full
    vocabulary, and "top1_agreement", the share of positions where both rank the same token first. Logits exist one tile
    at a time.

    Raises `ValueError` for token batches as `e3pruner.search` does and for a teacher with a vocabulary of another size
    whose columns neither `vocabulary` nor `tokenizer` tells apart, and `FloatingPointError` naming the batch if a
    result is NaN.
    """
    models = [model] if teacher is None else [model, teacher]
    heads = [output_head(each) for each in models]
    roles = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    sizes = {role: head.weight.shape[0] for role, head in zip(roles, heads, strict=True)}
    columns = common_vocabulary(dict(reversed(sizes.items())), vocabulary, tokenizer_size(tokenizer))
    heads = [head.narrowed(columns) for head in heads]
    batches = batches_of("token_batches", token_batches, columns, **roles)
    if is_whole(token_batches):
        batches = list(batches[0].split(max(1, _PASS_TOKENS // batches[0].shape[1])))
    dtypes = [rounded_dtype(each, precision) for each in models]
    sums = _Sums()
    with ExitStack() as stack:
        for each, dtype in zip(models, dtypes, strict=True):
            stack.enter_context(evaluating(each))
            stack.enter_context(weights_in(each.parameters(), dtype))
        for number, batch in enumerate(
            track(batches, "evaluate", console=Console(stderr=True), disable=not progress, transient=True)
        ):
            _add_batch(sums, models, heads, batch)
            if math.isnan(sums.cross_entropy + sums.kl):
                raise FloatingPointError(f"token_batches[{number}]: the loss is NaN")
    result = {
        "perplexity": torch.tensor(sums.cross_entropy / sums.tokens, dtype=torch.float64).exp().item(),
        "tokens": sums.tokens,
        "layers": len(find_layers(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if teacher is not None:
        result |= {"kl": sums.kl / sums.tokens, "top1_agreement": sums.agreements / sums.tokens}
    return result


def _add_batch(sums: _Sums, models: list[PreTrainedModel], heads: list[OutputHead], batch: Sequences) -> None:
    rows = batch.trimmed()
    labels = rows.predicted
    hidden = [here.at_predicted(last_hidden(m, **here.inputs)) for m in models for here in [rows.to(m.device)]]
    size = max(1, _TILE_VALUES // heads[0].weight.shape[0])
    for start in range(0, len(labels), size):
        tile = slice(start, start + size)
        _add_tile(sums, [head.logits(h[tile]) for head, h in zip(heads, hidden, strict=True)], labels[tile])


def _add_tile(sums: _Sums, logits: list[Tensor], labels: Tensor) -> None:
    labels = labels.to(logits[0].device)
    sums.tokens += len(labels)
    if len(logits) == 1:
        sums.cross_entropy += F.cross_entropy(logits[0].float(), labels, reduction="sum").item()
        return
    student, teacher = logits[0], logits[1].to(logits[0].device)
    stats: Any = e3k.entropy_kl(student, teacher, labels, weighting="none", reduction="none", return_stats=True)[1]
    sums.cross_entropy += stats.cross_entropy.double().sum().item()
    sums.kl += stats.kl.double().sum().item()
    sums.agreements += int((student.argmax(-1) == teacher.argmax(-1)).sum())
