"""The training loop of `distill`: steps, held-out evaluations, saved states, and what is shown meanwhile."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.tracking import GeneralTracker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from e3kernels.profiling import named_range
from e3pruner.recovery.average import WeightAverage
from e3pruner.recovery.interrupt import deferred_interrupt
from e3pruner.recovery.loss import DistillLoss, HeldOut
from e3pruner.recovery.state import StateFolder, pack_state, unpack_state
from e3pruner.text.batches import shuffled_batch
from e3pruner.text.sequences import IGNORED, Sequences

SPIKE_WINDOW = 32


@dataclass
class DistillResult:
    """What a run of `distill` did: optimizer steps, tokens trained on, seconds, and its curves.

    curve: one {"step", "loss", "lr", "grad_norm"} per step, the norm before clipping, and "skipped" where the loss
    was a spike and nothing was learnt. held_out: {"step", "kl", "perplexity",
    "top1_agreement"} before the first step, every `eval_every` steps and after the last; with a `TeacherCache` the
    perplexity alone.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)

    @property
    def skipped(self) -> list[int]:
        """The steps that were not taken."""
        return [int(record["step"]) for record in self.curve if "skipped" in record]


class Training:
    """`steps` steps of AdamW over `parameters` on shuffled `data`; `settings` are what a resume must repeat."""

    def __init__(
        self,
        loss: DistillLoss,
        parameters: dict[str, nn.Parameter],
        data: Sequences,
        held_out: Sequences | None,
        steps: int,
        settings: dict[str, Any],
    ) -> None:
        self.loss, self.options, self.steps, self.settings = loss, loss.options, steps, settings
        self.data, self.held_out_data = data, held_out
        self.parameters = parameters
        # Matrices decay, norms and biases do not.
        decayed = [p for p in parameters.values() if p.dim() > 1]
        kept = [p for p in parameters.values() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.options.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            lr=self.options.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.average = None if self.options.ema is None else WeightAverage(parameters, self.options.ema)
        self.result = DistillResult()

    def restore(self, folder: StateFolder) -> None:
        """Go on from the state in `folder`. Raises ValueError naming the first setting that is not what it was."""
        content = folder.read()
        for name, value in self.settings.items():
            if (saved := content["settings"].get(name)) != value:
                raise ValueError(f"resume: {name} was {saved!r} in the saved run and is {value!r} now")
        result = DistillResult(**content["result"])
        taken = result.steps - len(result.skipped)
        tensors = folder.tensors(content)
        unpack_state(tensors, taken, self.parameters, self.optimizer)
        if self.average is not None:
            self.average.unpack(tensors)
        self.result = result

    def run(self, folder: StateFolder | None, tracker: GeneralTracker, progress: bool = True) -> DistillResult:
        """The rest of the steps; afterwards the parameters are their average, if one is kept."""
        if self.result.steps < self.steps:
            self._train(folder, tracker, progress)
        if self.average is not None:
            self.average.exchange()
        return self.result

    def _train(self, folder: StateFolder | None, tracker: GeneralTracker, shown: bool) -> None:
        result, options = self.result, self.options
        started = time.monotonic() - result.seconds
        held_out = (
            HeldOut(self.loss, self.held_out_data, options.batch_size) if self.held_out_data is not None else None
        )
        with _progress(shown) as progress, deferred_interrupt() as interrupted:
            task = progress.add_task("distil", total=self.steps, completed=result.steps, status="")
            while True:
                last = result.steps == self.steps
                self._watch(held_out, last, tracker)
                result.seconds = time.monotonic() - started
                progress.update(task, completed=result.steps, status=self._status())
                if folder is not None and (last or interrupted() or result.steps % options.save_every == 0):
                    self._save(folder)
                if interrupted():
                    raise KeyboardInterrupt
                if last:
                    return
                try:
                    with named_range("step"):
                        self._step()
                    _log(tracker, "train", result.curve[-1])
                    if "skipped" in result.curve[-1]:
                        progress.console.print(
                            f"step {result.steps} skipped: its loss is {result.curve[-1]['loss']:.3g}"
                        )
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error}; {self._kept(folder)}") from None

    def _step(self) -> None:
        """One optimizer step, or none if its loss is a spike.

        Raises FloatingPointError, with every weight as it was, if anything is not finite.
        """
        options, result = self.options, self.result
        self.optimizer.zero_grad()
        weight, total, tokens = 0.0, 0.0, 0
        for micro in range(options.accumulation):
            start = (result.steps * options.accumulation + micro) * options.batch_size
            with named_range("data"):
                batch = shuffled_batch(self.data, start, options.batch_size, options.seed)
                batch = batch.to(self.loss.student.device)
            loss, stats = self.loss(batch, self.loss.targets(batch), "sum")
            with named_range("backward"):
                loss.backward()
            total += float(loss.detach())
            weight += float(stats.weight.sum())
            tokens += int((batch.labels != IGNORED).sum())
        if not weight:
            raise ValueError(f"data: step {result.steps + 1} has no token to predict")
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        # The mean over all accumulated tokens, Σwℓ / Σw, and the clipping are one multiplication.
        with named_range("clip"):
            norm = float(nn.utils.get_total_norm(gradients)) / weight
        step, mean = result.steps + 1, total / weight
        if not (abs(mean) < float("inf") and norm < float("inf")):
            raise FloatingPointError(f"step {step}: loss is {mean}, gradient norm {norm}; the step was not taken")
        rate = options.learning_rate(result.steps, self.steps)
        record = {"step": step, "loss": mean, "lr": rate, "grad_norm": norm}
        if self._is_spike(mean):
            record["skipped"] = 1
        else:
            with named_range("clip"):
                torch._foreach_mul_(gradients, min(1.0, options.max_grad_norm / max(norm, 1e-12)) / weight)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with named_range("optimizer"):
                self.optimizer.step()
                if self.average is not None:
                    self.average.update()
        result.steps, result.tokens = step, result.tokens + tokens
        result.curve.append(record)

    def _is_spike(self, loss: float) -> bool:
        # Skipped steps are among the last ones too: what stays high is no spike, and is learnt from again.
        recent = [record["loss"] for record in self.result.curve[-SPIKE_WINDOW:]]
        return len(recent) >= SPIKE_WINDOW // 4 and loss > self.options.spike * statistics.median(recent) > 0

    def _watch(self, held_out: HeldOut | None, last: bool, tracker: GeneralTracker) -> None:
        result = self.result
        seen = bool(result.held_out) and result.held_out[-1]["step"] == result.steps
        if held_out is not None and not seen and (last or result.steps % self.options.eval_every == 0):
            with nullcontext() if self.average is None else self.average.in_place():
                result.held_out.append({"step": result.steps, **held_out.evaluate()})
            _log(tracker, "held_out", result.held_out[-1])

    def _save(self, folder: StateFolder) -> None:
        content = {"step": self.result.steps, "settings": self.settings, "result": asdict(self.result)}
        average = {} if self.average is None else self.average.packed()
        folder.save(content, pack_state(self.parameters, self.optimizer) | average)

    def _kept(self, folder: StateFolder | None) -> str:
        if folder is None:
            return "the model holds the last good weights"
        self._save(folder)
        return f"the last good state, of step {self.result.steps}, is in {folder.path}"

    def _status(self) -> str:
        result = self.result
        parts = [f"loss {result.curve[-1]['loss']:.3f}"] if result.curve else []
        if result.held_out:
            parts.append(f"held-out perplexity {result.held_out[-1]['perplexity']:.1f}")
        if result.tokens:
            parts.append(f"{result.tokens / result.seconds:.0f} tokens/s")
        return ", ".join(parts)


def _log(tracker: GeneralTracker, kind: str, record: dict[str, float]) -> None:
    tracker.log({f"{kind}/{name}": value for name, value in record.items() if name != "step"}, step=int(record["step"]))


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=Console(stderr=True),
        disable=not shown,
    )
