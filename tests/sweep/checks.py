"""What is asked of one model type, each question with its own truth (see `truth.py`), and the outcome.

exact: pruned, reloaded, decoded, searched and distilled as the truth says. refused: with a reason, by e3pruner. raw: an
error of another library came out. late: searched, and what was found cannot be pruned. wrong: figures that differ.
not built: no small model of it runs.
"""

from __future__ import annotations

import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import e3pruner
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.options import DistillOptions

from .shrink import LAYERS, NOTES, VOCABULARY, small_config, small_model
from .truth import bypassed, logits

OUTCOMES = ("exact", "refused", "late", "raw", "wrong", "not built")
_LENGTH, _PROMPT, _PLANS = 24, 6, 3
_HOME = str(Path(e3pruner.__file__).parent)


class WrongError(AssertionError):
    """A result that is not the truth."""


class _NotAskedError(Exception):
    """Nothing was pruned that could be asked about."""


class Case:
    """A dense model, what it is asked with, and the plans tried: three random ones that surgery allows."""

    def __init__(self, model: PreTrainedModel, auto: Any) -> None:
        self.model, self.auto = model, auto
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY - 9, (2, _LENGTH), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :5] = 0
        self.pruned: dict[tuple[int, ...], PreTrainedModel] = {}


def examine(model_type: str, auto: Any, checks: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """{"outcome", "checks": {check: "ok" or what came instead}} of one model type, all of them unless named; `changes`
    of its small configuration."""
    warnings.simplefilter("ignore")
    try:
        model = small_model(small_config(model_type, **changes), auto)
        case = Case(model, auto)
    except Exception as error:
        return {"outcome": "not built", "checks": {"build": _said(error)}}
    questions = {name: _QUESTIONS[name] for name in checks or _QUESTIONS}
    try:
        if not logits(model, case.ids).isfinite().all():
            raise ArithmeticError("its logits are not finite")
    except Exception as error:
        questions = {name: _QUESTIONS[name] for name in ("prune", "search")}  # it may be refused before it is called
        if not _asked(_prune, case).startswith("refused"):
            return {"outcome": "not built", "checks": {"build": _said(error)}}
    found = {name: _asked(question, case) for name, question in questions.items()}
    if model_type in NOTES:
        found["note"] = f"ok: {NOTES[model_type]}"
    kinds = {said.partition(":")[0] for said in found.values()}
    outcome = next((kind for kind in ("wrong", "raw", "late", "refused") if kind in kinds), "exact")
    return {"outcome": outcome, "checks": found}


def _asked(question: Callable[[Case], str], case: Case) -> str:
    try:
        return question(case)
    except WrongError as error:
        return f"wrong: {error}"
    except _NotAskedError:
        return "not asked"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reasoned = isinstance(error, ValueError | TypeError) and frame.filename.startswith(_HOME)
        return f"{'refused' if reasoned else 'raw'}: {_said(error)}"


def _prune(case: Case) -> str:
    plans = [removed for size in (1, 2, 3) for removed in combinations(range(LAYERS), size)]
    random.Random(0).shuffle(plans)
    refusals: list[Exception] = []
    for removed in plans:
        try:
            pruned = e3pruner.prune(case.model, sorted(set(range(LAYERS)) - set(removed)))
        except (ValueError, TypeError) as error:
            refusals.append(error)
            continue
        with bypassed(case.model, removed):
            _assert_equal(f"logits without {removed}", logits(pruned, case.ids), logits(case.model, case.ids))
        case.pruned[removed] = pruned
        if len(case.pruned) == _PLANS:
            break
    if not case.pruned:
        raise refusals[0]
    return "ok" if not refusals else f"ok: some layers must stay: {_said(refusals[-1])}"


def _padding(case: Case) -> str:
    for removed, pruned in _plans(case):
        with bypassed(case.model, removed):
            expected = logits(case.model, case.ids, case.mask)
        _assert_equal(f"padded logits without {removed}", logits(pruned, case.ids, case.mask), expected)
    return "ok"


def _reload(case: Case) -> str:
    for _, pruned in _plans(case):
        with tempfile.TemporaryDirectory() as folder:
            pruned.save_pretrained(folder)
            loader = case.auto if type(pruned.config) in case.auto._model_mapping else type(pruned)
            again = loader.from_pretrained(folder, attn_implementation="eager")
        before, after = pruned.state_dict(), again.state_dict()
        if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
            raise WrongError("the reloaded checkpoint has other weights")
        error = _distance(logits(again, case.ids), logits(pruned, case.ids))
        if error > 1e-6:  # a tensor that is stored another way may be multiplied in another order
            raise WrongError(f"logits of the reloaded checkpoint differ by {error:.2g} of their size")
    return "ok"


def _generate(case: Case) -> str:
    """The logits of every step of `generate`, with the model's own cache or state, against passes without one."""
    said = "ok"
    for mask in (None, case.mask[:, : 2 * _PROMPT]):
        prompt = case.ids[:, : _PROMPT if mask is None else 2 * _PROMPT]
        for removed, pruned in _plans(case):
            with bypassed(case.model, removed):
                expected = _steps(case.model, prompt, mask, use_cache=False)
            error = _cache_error(pruned, prompt, mask, expected)
            if isinstance(error, Exception):
                dense_error = _cache_error(case.model, prompt, mask, expected)
                if not isinstance(dense_error, type(error)):
                    raise WrongError(f"decoding fails, the dense model's does not: {_said(error)}")
                said = f"ok: decoding with a cache fails, the dense model's too: {_said(error)}"
            elif error > 1e-3:
                dense = _own_cache_error(case.model)
                what = f"decoding differs by {error:.1%}, the dense model's by {dense:.1%}"
                if dense <= 1e-3:
                    raise WrongError(what)
                said = f"ok: {what}"
    return said


def _cache_error(model: PreTrainedModel, prompt: Tensor, mask: Tensor | None, expected: Tensor) -> float | Exception:
    """How far the logits of `generate` are from `expected`, or what it raises."""
    try:
        return _distance(_steps(model, prompt, mask), expected)
    except Exception as error:
        return error


def _own_cache_error(model: PreTrainedModel) -> float:
    """The most that the model's own cache changes its decoding of a few prompts: an indexer may meet ties."""
    errors = []
    for seed in range(8):
        prompt = torch.randint(3, VOCABULARY - 9, (2, 2 * _PROMPT), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(prompt)
        mask[0, : seed % 2 * 5] = 0
        errors.append(_distance(_steps(model, prompt, mask), _steps(model, prompt, mask, use_cache=False)))
    return max(errors)


def _search(case: Case) -> str:
    options = {"drop": 2, "method": "leave-one-out", "progress": False}
    e3pruner.search(case.model, case.ids, **options)
    plan = e3pruner.search(case.model, case.ids, precision="fp32", **options)
    dense = logits(case.model, case.ids)
    with bypassed(case.model, plan.removed):
        expected = _divergence(dense, logits(case.model, case.ids)).mean()
    _assert_close("the search's KL", plan.metrics["kl"], float(expected))
    try:
        pruned = e3pruner.prune(case.model, plan)
    except (ValueError, TypeError) as error:
        return f"late: {_said(error)}"
    with bypassed(case.model, plan.removed):
        _assert_equal("logits of the plan found", logits(pruned, case.ids), logits(case.model, case.ids))
    return "ok"


def _distill(case: Case) -> str:
    _, pruned = next(_plans(case))
    options = DistillOptions(weighting="none", kd_ratio=1.0)
    step = DistillStep(pruned, case.model, options)
    loss, shown = step.backward_loss(pruned, batch_of({"input_ids": case.ids}))
    loss.backward()
    step.finish(pruned.parameters())
    expected = _divergence(logits(case.model, case.ids), logits(pruned, case.ids))[:, :-1].mean()
    _assert_close("the step's loss", float(shown), float(expected))
    gradients = [p.grad for p in pruned.parameters() if p.grad is not None]
    if not gradients or not all(gradient.isfinite().all() for gradient in gradients):
        raise WrongError("gradients are missing or not finite")
    return "ok"


_QUESTIONS = {
    "prune": _prune,
    "padding": _padding,
    "reload": _reload,
    "generate": _generate,
    "search": _search,
    "distill": _distill,
}


def _plans(case: Case) -> Iterator[tuple[tuple[int, ...], PreTrainedModel]]:
    if not case.pruned:
        raise _NotAskedError
    return iter(case.pruned.items())


@torch.no_grad()
def _steps(model: PreTrainedModel, prompt: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Logits (B, steps, V) of greedy decoding."""
    given = {"attention_mask": torch.ones_like(prompt) if mask is None else mask, "do_sample": False}
    given |= {"max_new_tokens": _PROMPT, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(prompt, **given, **options).logits, dim=1)


def _divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """KL(dense || pruned) (B, T)."""
    p, q = (each.double().log_softmax(-1) for each in (dense, pruned))
    return (p.exp() * (p - q)).sum(-1)


def _assert_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual.nan_to_num(), expected.nan_to_num()):
        raise WrongError(f"{what} differ by {_distance(actual, expected):.2g} of their size")


def _assert_close(what: str, actual: float, expected: float) -> None:
    if not abs(actual - expected) <= 1e-3 * abs(expected) + 1e-6:
        raise WrongError(f"{what} is {actual:.6g}, it should be {expected:.6g}")


def _distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double().nan_to_num(), expected.double().nan_to_num()
    return float((actual - expected).norm() / expected.norm())


def _said(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return message[:300] if isinstance(error, ValueError) else f"{type(error).__name__}: {message[:280]}"
