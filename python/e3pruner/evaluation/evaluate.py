"""Perplexity, and how far a model's predictions are from a teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.evaluation.figures import Figures
from e3pruner.models import OutputHead, find_layers, last_hidden, output_head
from e3pruner.models.stack import evaluating
from e3pruner.models.vocabulary import common_vocabulary, tokenizer_size
from e3pruner.precision import autocast_dtype, weights_in
from e3pruner.text.given import Given, batches_of, is_whole
from e3pruner.text.sequences import Sequences

_PASS_TOKENS = 4096  # of one forward pass, where one batch is all there is


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
    dtype = autocast_dtype(precision, model.device)
    figures = Figures()
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(evaluating(each))
            stack.enter_context(weights_in(each.parameters(), dtype))
        for number, batch in enumerate(
            track(batches, "evaluate", console=Console(stderr=True), disable=not progress, transient=True)
        ):
            _add_batch(figures, models, heads, batch)
            if math.isnan(figures.cross_entropy + figures.kl):
                raise FloatingPointError(f"token_batches[{number}]: the loss is NaN")
    return figures.means() | {
        "tokens": figures.tokens,
        "layers": len(find_layers(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _add_batch(
    figures: Figures, models: Sequence[PreTrainedModel], heads: Sequence[OutputHead], batch: Sequences
) -> None:
    rows = batch.trimmed()
    hidden = [here.at_predicted(last_hidden(m, **here.inputs)) for m in models for here in [rows.to(m.device)]]
    teacher = (heads[1], hidden[1]) if len(models) > 1 else None
    figures.add(heads[0], hidden[0], rows.predicted, teacher)
