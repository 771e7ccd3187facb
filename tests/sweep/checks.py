"""What is asked of one model type, each question with its own truth (see `truth.py`), and the outcome.

exact: pruned, reloaded, decoded, searched and distilled as the truth says. refused: with a reason, by e3pruner. raw: an
error of another library came out. late: searched, and what was found cannot be pruned. wrong: figures that differ.
not built: no small model of it runs, or no image is known that it reads.

Text is asked about wherever the model runs on text alone, and text with an image wherever it takes one.
"""

from __future__ import annotations

import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import e3pruner
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.recovery.options import DistillOptions

from .images import IMAGE_TOKEN, NoImageError, takes_images, with_images
from .shrink import LAYERS, NOTES, VOCABULARY, small_config, small_model
from .truth import Batch, bypassed, logits

OUTCOMES = ("exact", "refused", "late", "raw", "wrong", "not built")
_LENGTH, _PROMPT, _PLANS, _PADDED = 24, 6, 3, 5
# What some types are told of all images of a batch at once, which does not tell one row's from another's.
_WHOLE = {"target_sizes", "image_token_pooling"}
_HOME = str(Path(e3pruner.__file__).parent)


class WrongError(AssertionError):
    """A result that is not the truth."""


class _NotAskedError(Exception):
    """Nothing was pruned that could be asked about."""


class Case:
    """A dense model, what it is asked with, and the plans tried: three random ones that surgery allows.

    batches: text, where the model runs on it, and text with images, where it takes them.
    """

    def __init__(self, model: PreTrainedModel, auto: Any) -> None:
        self.model, self.auto = model, auto
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY - 9, (2, _LENGTH), generator=generator)
        self.batches: list[Batch] = []
        self.images = "not asked"
        self.apart: list[Batch] = []
        self.pruned: dict[tuple[int, ...], PreTrainedModel] = {}
        self.failed: Exception | None = None  # of a model that runs on neither
        text = {"input_ids": ids}
        if model.config.is_encoder_decoder:  # which is refused
            self.batches.append(text)
            return
        try:
            if not logits(model, text).isfinite().all():
                raise ArithmeticError("its logits are not finite")
            self.batches.append(text)
        except Exception as error:
            self.failed = error
        if takes_images(model):
            self._add_images(ids)
        if self.batches:
            self.failed = None
        else:
            self.batches.append(text)

    def _add_images(self, ids: Tensor) -> None:
        try:
            self.batches.append(with_images(self.model, ids))
            self.images = "ok"
            if _WHOLE & self.batches[-1].keys():
                self.apart = [with_images(self.model, row[None]) for row in ids]
        except NoImageError as error:
            self.images = f"not built: {_said(error)}"


def examine(model_type: str, auto: Any, checks: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """{"outcome", "checks": {check: "ok" or what came instead}} of one model type, all of them unless named; `changes`
    of its small configuration."""
    warnings.simplefilter("ignore")
    try:
        case = Case(small_model(small_config(model_type, **changes), auto), auto)
    except Exception as error:
        return {"outcome": "not built", "checks": {"build": _said(error)}}
    questions = {name: _QUESTIONS[name] for name in checks or _QUESTIONS}
    if case.failed is not None:
        questions = {name: _QUESTIONS[name] for name in ("prune", "search")}  # it may be refused before it is called
        if not _asked(_prune, case).startswith("refused"):
            return {"outcome": "not built", "checks": {"build": _said(case.failed)}}
    found = {name: _asked(question, case) for name, question in questions.items()}
    if case.images != "not asked":
        found["images"] = case.images
    if model_type in NOTES:
        found["note"] = f"ok: {NOTES[model_type]}"
    kinds = {said.partition(":")[0] for said in found.values()}
    outcome = next((kind for kind in ("wrong", "raw", "late", "refused", "not built") if kind in kinds), "exact")
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
        for batch in case.batches:
            with bypassed(case.model, removed, batch):
                _assert_equal(f"logits without {removed}", logits(pruned, batch), logits(case.model, batch))
        case.pruned[removed] = pruned
        if len(case.pruned) == _PLANS:
            break
    if not case.pruned:
        raise refusals[0]
    return "ok" if not refusals else f"ok: some layers must stay: {_said(refusals[-1])}"


def _padding(case: Case) -> str:
    for removed, pruned in _plans(case):
        for batch in map(_padded, case.batches):
            with bypassed(case.model, removed, batch):
                expected = logits(case.model, batch)
            _assert_equal(f"padded logits without {removed}", logits(pruned, batch), expected)
    return "ok"


def _padded(batch: Batch) -> Batch:
    """`batch` with padding for the first tokens of its first row."""
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :_PADDED] = 0
    return batch | {"attention_mask": mask}


def _first(batch: Batch, count: int) -> Batch:
    """The first `count` tokens of `batch`."""
    shape = batch["input_ids"].shape
    return {name: value[:, :count] if value.shape[:2] == shape else value for name, value in batch.items()}


def _reload(case: Case) -> str:
    said = "ok"
    for _, pruned in _plans(case):
        again = _written_and_read(case, pruned)
        if not _equal_weights(pruned, again):
            if not _equal_weights(case.model, _written_and_read(case, case.model)):
                return "ok: the dense model's own checkpoint, written and read again, has other weights too"
            raise WrongError("the reloaded checkpoint has other weights")
        error = max(_distance(logits(again, batch), logits(pruned, batch)) for batch in case.batches)
        if error > 1e-6:  # a tensor that is stored another way may be multiplied in another order
            dense = _written_and_read(case, case.model)
            own = max(_distance(logits(dense, batch), logits(case.model, batch)) for batch in case.batches)
            what = f"logits of the reloaded checkpoint differ by {error:.2g} of their size"
            if own <= 1e-6 or error > 1e-4:
                raise WrongError(what)
            said = f"ok: {what}, the dense model's by {own:.2g}"
    return said


def _written_and_read(case: Case, model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loader = case.auto if type(model.config) in case.auto._model_mapping else type(model)
        return loader.from_pretrained(folder, attn_implementation="eager")


def _equal_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    before, after = one.state_dict(), other.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def _generate(case: Case) -> str:
    """The logits of every step of `generate`, with the model's own cache or state, against passes without one."""
    said = "ok"
    for batch in case.batches:
        longer = batch["input_ids"].shape[1] - _LENGTH  # by the image
        for prompt in (_first(batch, longer + _PROMPT), _padded(_first(batch, longer + 2 * _PROMPT))):
            for removed, pruned in _plans(case):
                with bypassed(case.model, removed, batch):
                    expected = _steps_without_cache(case.model, prompt)
                error = _cache_error(pruned, prompt, expected)
                if isinstance(error, Exception):
                    dense_error = _cache_error(case.model, prompt, expected)
                    if not isinstance(dense_error, type(error)):
                        raise WrongError(f"decoding fails, the dense model's does not: {_said(error)}")
                    said = f"ok: decoding with a cache fails, the dense model's too: {_said(error)}"
                elif error > 1e-3:
                    dense = _own_cache_error(case.model, prompt)
                    what = f"decoding differs by {error:.1%}, the dense model's by {dense:.1%}"
                    if dense <= 1e-3:
                        raise WrongError(what)
                    said = f"ok: {what}"
    return said


def _cache_error(model: PreTrainedModel, prompt: Batch, expected: Tensor) -> float | Exception:
    """How far the logits of `generate` are from `expected`, or what it raises."""
    try:
        return _distance(_steps(model, prompt), expected)
    except Exception as error:
        return error


def _own_cache_error(model: PreTrainedModel, batch: Batch) -> float:
    """The most that the model's own cache changes its decoding of a few prompts: an indexer may meet ties."""
    errors, ids = [], batch["input_ids"]
    for seed in range(8):
        other = torch.randint(3, VOCABULARY - 9, ids.shape, generator=torch.Generator().manual_seed(seed))
        prompt = batch | {"input_ids": torch.where(ids == IMAGE_TOKEN, ids, other)}
        prompt = _padded(prompt) if seed % 2 else prompt | {"attention_mask": torch.ones_like(ids)}
        errors.append(_distance(_steps(model, prompt), _steps_without_cache(model, prompt)))
    return max(errors)


def _search(case: Case) -> str:
    options, batch = {"drop": 2, "method": "leave-one-out", "progress": False}, case.batches[-1]
    given = case.apart or [batch]
    e3pruner.search(case.model, given, **options)
    plan = e3pruner.search(case.model, given, precision="fp32", **options)
    expected = []
    for each in given:
        dense = logits(case.model, each)
        with bypassed(case.model, plan.removed, each):
            expected.append(_divergence(dense, logits(case.model, each), each))
    _assert_close("the search's KL", plan.metrics["kl"], sum(expected) / len(expected))
    try:
        pruned = e3pruner.prune(case.model, plan)
    except (ValueError, TypeError) as error:
        return f"late: {_said(error)}"
    with bypassed(case.model, plan.removed, batch):
        _assert_equal("logits of the plan found", logits(pruned, batch), logits(case.model, batch))
    return "ok"


def _distill(case: Case) -> str:
    _, pruned = next(_plans(case))
    options, batch = DistillOptions(weighting="none", kd_ratio=1.0), case.batches[-1]
    step = DistillStep(pruned, case.model, options)
    loss, shown = step.backward_loss(pruned, batch_of(batch))
    loss.backward()
    step.finish(pruned.parameters())
    expected = _divergence(logits(case.model, batch), logits(pruned, batch), batch, last=False)
    _assert_close("the step's loss", float(shown), expected)
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
def _steps(model: PreTrainedModel, prompt: Batch, **options: Any) -> Tensor:
    """Logits (B, steps, V) of greedy decoding."""
    given = {"attention_mask": torch.ones_like(prompt["input_ids"])} | prompt | {"do_sample": False}
    given |= {"max_new_tokens": _PROMPT, "output_logits": True, "return_dict_in_generate": True}
    given |= {"suppress_tokens": list(range(IMAGE_TOKEN, VOCABULARY))}  # text alone
    return torch.stack(model.generate(**given, **options).logits, dim=1)


def _steps_without_cache(model: PreTrainedModel, prompt: Batch) -> Tensor:
    """The same without a cache: of `generate`, or where that has the model within use one, or fails, pass by pass."""
    if model.main_input_name == "input_ids":
        with suppress(RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return _steps(model, prompt, use_cache=False)
    batch, steps = {"attention_mask": torch.ones_like(prompt["input_ids"])} | prompt, []
    for _ in range(_PROMPT):
        steps.append(logits(model, batch)[:, -1])
        token = steps[-1][:, :IMAGE_TOKEN].argmax(-1, keepdim=True)
        shape = batch["input_ids"].shape
        longer = {n: v for n, v in batch.items() if v.shape[:2] == shape and not n.startswith("qformer")}
        longer = {n: torch.cat([v, torch.zeros_like(v[:, :1])], dim=1) for n, v in longer.items()}
        longer["input_ids"][:, -1:], longer["attention_mask"][:, -1] = token, 1
        batch |= longer
    return torch.stack(steps, dim=1)


def _divergence(dense: Tensor, pruned: Tensor, batch: Batch, *, last: bool = True) -> float:
    """The mean KL(dense || pruned) of the predictions of text; of text alone with the one behind its `last` token."""
    p, q = (each.double().log_softmax(-1) for each in (dense, pruned))
    each = (p.exp() * (p - q)).sum(-1)
    if last and len(batch) == 1:
        return float(each.mean())
    return float(each[:, :-1][batch["input_ids"][:, 1:] != IMAGE_TOKEN].mean())


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
