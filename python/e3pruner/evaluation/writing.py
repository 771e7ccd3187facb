"""What pruning does to free-running text, which no teacher-forced figure shows: loops, few words, lost answers."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.evaluation.generation import chat_text
from e3pruner.evaluation.prompts import Task, rule_tasks, writing_prompts
from e3pruner.models.positions import position_limit
from e3pruner.models.stack import evaluating, returning_dicts
from e3pruner.runtime import LayerSkipRuntime

_BATCH = 32
_SHOWN = 3  # prompts whose answers are kept
_LONGEST = 192
_LEAST_REPEATS, _LEAST_REPEATED, _LONGEST_PERIOD = 3, 24, 64


@dataclass(frozen=True)
class _Answer:
    ids: list[int]  # without what follows the end
    ended: bool

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return str(tokenizer.decode(self.ids, skip_special_tokens=True))


def writing(
    model: PreTrainedModel | LayerSkipRuntime,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[str] | None = None,
    tasks: Sequence[Task] | None = None,
    max_new_tokens: int = _LONGEST,
    samples: int = 4,
    temperature: float = 0.8,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """How `model` writes, greedy and sampled, by its `generate` with the tokenizer's chat template, if it has one.

    prompts: of free text, 32 by rule unless given; tasks: with an answer that a rule checks, 40 by rule unless given.
    max_new_tokens: of each text; answers to tasks have 64 at most. samples: of each prompt, at `temperature`, drawn
    from `seed`. A runtime writes faster than its model, and draws other samples.

    Returns for "greedy" and "sampled" text "loops", the share of answers that end in a repeated suffix (see
    `repeated_suffix`), "distinct_bigrams", the mean over answers of distinct bigrams over bigrams, "tokens", the mean
    length, and "ends", the share that came to the end token; "tasks" gives for each kind and for all of them "pass@1",
    greedy, and "pass@<samples>", the share of tasks of which a sample is right. Each figure is a pair: the value and
    its standard error over prompts. "texts" are the first prompts with their greedy answers.

    Raises ValueError naming an argument that is out of its range, or a prompt without text.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "samples": samples}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0")
    prompts = writing_prompts() if prompts is None else list(prompts)
    tasks = rule_tasks(per_kind=8, seed=seed) if tasks is None else list(tasks)
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompts[{number}] holds no text")
    writer = _Writer(model, tokenizer, temperature, seed, progress)
    texts, answers = (
        (writer.answers(asked, None, most), writer.answers(asked, samples, most))
        for asked, most in ((prompts, max_new_tokens), ([task.prompt for task in tasks], min(64, max_new_tokens)))
    )
    figures: dict[str, Any] = {
        "greedy": _figures(texts[0]),
        "sampled": _figures(texts[1]),
    }
    right = [
        (task.kind, task.check(alone.text(tokenizer)), any(task.check(each.text(tokenizer)) for each in several))
        for task, (alone,), several in zip(tasks, *answers, strict=True)
    ]
    kinds = {"all": right} | {kind: [each for each in right if each[0] == kind] for kind, *_ in right}
    figures["tasks"] = {
        kind: {"pass@1": _mean([one for _, one, _ in each]), f"pass@{samples}": _mean([some for *_, some in each])}
        for kind, each in kinds.items()
        if each
    }
    figures["texts"] = [
        {"prompt": prompt, "answer": alone.text(tokenizer).strip()}
        for prompt, (alone,) in zip(prompts[:_SHOWN], texts[0], strict=False)
    ]
    return figures


def brief_writing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: int, seed: int = 0
) -> dict[str, Any] | None:
    """Options of `writing` for what a run shows beside its other figures: so many of the prompts, drawn evenly, a
    quarter as many tasks of each kind, two samples, and texts as long as `model` has positions for.

    None, which standard error explains, where it has too few for any text worth a figure.
    """
    every = writing_prompts()
    chosen = [every[index * len(every) // prompts] for index in range(min(prompts, len(every)))]
    tasks = rule_tasks(per_kind=max(1, prompts // 4), seed=seed)
    longest = max(len(_ids(tokenizer, prompt)) for prompt in (*chosen, *(task.prompt for task in tasks)))
    room = (position_limit(model) or 1 << 20) - longest - 1
    if room < _LEAST_REPEATED:
        print(
            f"nothing is written: the model has {position_limit(model)} positions, prompts take {longest}",
            file=sys.stderr,
        )
        return None
    return {"prompts": chosen, "tasks": tasks, "samples": 2, "seed": seed, "max_new_tokens": min(_LONGEST, room)}


def fastest_writer(model: PreTrainedModel) -> PreTrainedModel | LayerSkipRuntime:
    """What writes fastest for `writing`: the runtime where it serves the model; where not, standard error says why."""
    try:
        return LayerSkipRuntime(model)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        print(f"text is written by transformers, as the runtime does not serve it: {error}", file=sys.stderr)
        return model


def repeated_suffix(ids: Sequence[int]) -> int:
    """The period of the loop in which `ids` end; 0 if they do not: at least 24 tokens at the end, three rounds or more,
    each equal to the one before it, of at most 64 tokens.
    """
    for period in range(1, min(_LONGEST_PERIOD, len(ids) // _LEAST_REPEATS) + 1):
        wanted = max(_LEAST_REPEATED, _LEAST_REPEATS * period)
        if len(ids) >= wanted and all(ids[-i] == ids[-i - period] for i in range(1, wanted - period + 1)):
            return period
    return 0


@dataclass(frozen=True)
class _Writer:
    model: PreTrainedModel | LayerSkipRuntime
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    seed: int
    progress: bool

    def answers(self, prompts: Sequence[str], samples: int | None, max_new_tokens: int) -> list[list[_Answer]]:
        """So many samples of what follows each prompt; without a number the greedy text alone."""
        count = samples or 1
        rows = [_ids(self.tokenizer, prompt) for prompt in prompts for _ in range(count)]
        what = "sampled text" if samples else "greedy text"
        found: list[_Answer] = []
        for start in track(
            range(0, len(rows), _BATCH), what, console=Console(stderr=True), disable=not self.progress, transient=True
        ):
            found += self._batch(rows[start : start + _BATCH], self.seed + start, samples is not None, max_new_tokens)
        return [found[start : start + count] for start in range(0, len(found), count)]

    @torch.no_grad()
    def _batch(self, rows: Sequence[Sequence[int]], seed: int, sampled: bool, max_new_tokens: int) -> list[_Answer]:
        network = self.model if isinstance(self.model, PreTrainedModel) else self.model.model
        ends = _ends(network, self.tokenizer)
        width, pad = max(map(len, rows)), min(ends, default=0)
        ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows], device=network.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=network.device)
        chosen: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
        if sampled:
            chosen |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        generate: Any = self.model.generate
        with evaluating(network), returning_dicts(network), torch.random.fork_rng():
            torch.manual_seed(seed)
            if network is not self.model:
                chosen["seed"] = seed
            written = generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends, **chosen
            )
        return [_answer(row, ends) for row in written[:, width:].tolist()]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = configured if configured is not None else tokenizer.eos_token_id
    return list(found) if isinstance(found, list) else [] if found is None else [found]


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    chat = tokenizer.chat_template is not None
    found: list[int] = tokenizer(chat_text(tokenizer, prompt) if chat else prompt, add_special_tokens=not chat)[
        "input_ids"
    ]
    return found


def _answer(row: list[int], ends: Sequence[int]) -> _Answer:
    stop = next((index for index, token in enumerate(row) if token in ends), None)
    return _Answer(row if stop is None else row[:stop], stop is not None)


def _figures(answers: Sequence[Sequence[_Answer]]) -> dict[str, tuple[float, float]]:
    """Of the answers to each prompt: the mean over prompts of the mean over a prompt's answers."""
    of_each = {
        "loops": [statistics.mean(repeated_suffix(each.ids) > 0 for each in several) for several in answers],
        "distinct_bigrams": [statistics.mean(_distinct_bigrams(each.ids) for each in several) for several in answers],
        "tokens": [statistics.mean(len(each.ids) for each in several) for several in answers],
        "ends": [statistics.mean(each.ended for each in several) for several in answers],
    }
    return {name: _mean(values) for name, values in of_each.items()}


def _distinct_bigrams(ids: Sequence[int]) -> float:
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which of a single value is not known."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
