"""Perplexity, and how far a model's predictions are from a teacher's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.evaluation.figures import Figures
from e3pruner.models import OutputHead, find_layers, output_head
from e3pruner.models.device import rounded_dtype
from e3pruner.models.skipping_forward import each_last_hidden
from e3pruner.models.stack import evaluating
from e3pruner.models.streaming import computing_in
from e3pruner.models.vocabulary import common_vocabulary, tokenizer_size
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
    by_position: bool = False,
    by_sequence: bool = False,
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
    vocabulary, and "top1_agreement", the share of positions where both rank the same token first. With `by_position`
    also "positions": the same for predictions from 1 token, 2 to 3, 4 to 7 and so on, "seen" being the least; with
    `by_sequence` "sequences": {"tokens": [...], "perplexity": [...], ...}, one value for each sequence in their order,
    by which two models can be compared in pairs (`e3pruner.evaluation.paired`). Logits exist one tile at a time.

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
    dtypes = [rounded_dtype(each, precision, batches[0].with_extras) for each in models]
    parts: defaultdict[int, Figures] = defaultdict(Figures)
    of_each: list[Figures] = []
    with ExitStack() as stack:
        for each, dtype in zip(models, dtypes, strict=True):
            stack.enter_context(evaluating(each))
            stack.enter_context(computing_in(each, dtype))
        trimmed = [batch.trimmed() for batch in batches]
        hidden = [each_last_hidden(each, [batch.to(each.device).inputs for batch in trimmed]) for each in models]
        for number, (batch, *states) in enumerate(
            track(
                zip(trimmed, *hidden, strict=True),
                "evaluate",
                total=len(trimmed),
                console=Console(stderr=True),
                disable=not progress,
                transient=True,
            )
        ):
            size = 1 if by_sequence else len(batch)
            for rows, *part in zip(batch.split(size), *(state.split(size) for state in states), strict=True):
                own: defaultdict[int, Figures] = defaultdict(Figures)
                _add(own, heads, rows, [rows.to(state.device).at_predicted(state) for state in part], by_position)
                for power, figures in own.items():
                    parts[power] += figures
                of_each.append(sum(own.values(), Figures()))
            if any(math.isnan(part.cross_entropy + part.kl) for part in parts.values()):
                raise FloatingPointError(f"token_batches[{number}]: the loss is NaN")
    figures = sum((parts[power] for power in sorted(parts)), Figures())
    result: dict[str, Any] = figures.means() | {
        "tokens": figures.tokens,
        "layers": len(find_layers(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if by_position:
        result["positions"] = [
            {"seen": 2**power, "tokens": parts[power].tokens} | parts[power].means() for power in sorted(parts)
        ]
    if by_sequence:
        result["sequences"] = _columns(of_each)
    return result


def _columns(of_each: Sequence[Figures]) -> dict[str, list[float]]:
    rows = [{"tokens": each.tokens, **each.means()} for each in of_each]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _add(
    parts: dict[int, Figures], heads: list[OutputHead], batch: Sequences, states: list[Tensor], by_position: bool
) -> None:
    """Adds a batch to `parts`: by the power of two of how many tokens a prediction sees, else all to one."""
    seen = batch.at_predicted(batch.seen) if by_position else torch.ones_like(batch.predicted)
    for power in range(int(seen.max()).bit_length()):
        if (some := (seen >> power) == 1).any():
            student, *others = [state[some.to(state.device)] for state in states]
            parts[power].add(heads[0], student, batch.predicted[some], (heads[1], others[0]) if others else None)
