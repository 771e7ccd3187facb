"""What a pipeline is told: every option, its default and its legal values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from e3pruner.evaluation.target import check_target
from e3pruner.models.device import AUTO, usable_device
from e3pruner.models.loading import Dtype
from e3pruner.pipelines.settings import check_compensate, check_recover, check_search
from e3pruner.vocabulary import check_choice, check_integer, check_options


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """Options of a `Pipeline`; their names are the same in its YAML file, on the command line and here.

    model: folder of a Hugging Face causal LM, or "smollm2". out: folder for the result. drop: layers to remove over all
    rounds (8 if neither it nor `fraction`, a share of the layers, is given). protect: layers of the model that stay.
    rounds: how often layers are removed and the rest recovered; each round starts from the recovered model of the last.
    method, search: how layers are searched, and the options of that method. rivals: other methods, whose masks are
    judged beside, on the same tokens; curve: points of a curve of held-out KL over the number of removed layers: both
    of a run with one round. compensate: "none", "scale", "least-squares", or "auto", which needs `judge`, text of
    another kind than `text`. steps, recover: optimizer steps of each round, and further options of `e3pruner.distill`.
    track: a tracker for its curves. cached: train from a teacher cache, made first. text: where tokens come from, as
    `--text`; None: built in. unseen: text of a kind that no step sees, on which every model is judged too: "manual",
    "code", "library" or a file. written: add training text that the model writes itself. length: tokens per sequence.
    sequences, held_out: numbers of calibration and of held-out sequences. batch: sequences at a time. speed: measure
    tokens/s. writing: prompts that every model writes from, to count loops, lengths and right answers; 0: none.
    prompts, new_tokens: what the models answer at the end, and in how many tokens. seed: of all randomness.
    device: "auto", "cpu", "cuda:1", ... dtype: of the weights that come out; "auto": as they came in.
    trust_remote_code: run the code that a checkpoint brings.

    Raises, before anything is read or written, ValueError or TypeError naming the option that is wrong, and
    ModuleNotFoundError for a tracker that is not installed.
    """

    model: str | Path
    out: str | Path
    drop: int | None = None
    fraction: float | None = None
    protect: list[int] = field(default_factory=list)
    rounds: int = 1
    method: str = "gumbel-topk"
    search: dict[str, Any] = field(default_factory=dict)
    rivals: list[str] = field(default_factory=list)
    curve: int = 0
    compensate: str = "none"
    judge: str | Path | None = None
    steps: int = 50
    recover: dict[str, Any] = field(default_factory=dict)
    track: str | None = None
    cached: bool = False
    text: str | Path | None = None
    unseen: str | Path | None = None
    written: bool = False
    length: int = 256
    sequences: int = 16
    held_out: int = 16
    batch: int = 4
    speed: bool = False
    writing: int = 8
    prompts: list[str] = field(default_factory=list)
    new_tokens: int = 48
    seed: int = 0
    device: str = AUTO
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_options("a pipeline", self.settings(), type(self))
        for name in ("rounds", "steps", "sequences", "held_out", "batch", "new_tokens"):
            check_integer(name, getattr(self, name), 1)
        check_integer("length", self.length, 2)
        check_integer("seed", self.seed, 0)
        check_integer("curve", self.curve, 0)
        check_integer("writing", self.writing, 0)
        check_target(drop=self.drop, fraction=self.fraction)
        check_search(self.method, self.search)
        for rival in self.rivals:
            check_search(rival, {}, "rivals")
        if self.rounds > 1 and (self.rivals or self.curve):
            raise ValueError(f"rounds={self.rounds}: rivals and curve are of a run with one round")
        if self.method in self.rivals or len(set(self.rivals)) != len(self.rivals):
            raise ValueError(f"rivals={self.rivals} must be methods other than {self.method}, none of them twice")
        check_compensate(self.compensate, self.judge)
        check_recover(self.distill_options(), self.track)
        if self.written and self.text is not None:
            raise ValueError(f"written=True adds to the built-in text, of which text={str(self.text)!r} has nothing")
        check_choice("dtype", self.dtype, list(Dtype))
        usable_device(self.device)

    def settings(self) -> dict[str, Any]:
        """All options by name, as YAML values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: str(value) if isinstance(value, (Path, str)) else value for name, value in values.items()}

    def distill_options(self) -> dict[str, Any]:
        """Options of `e3pruner.distill` for each round."""
        return {"steps": self.steps, "batch_size": self.batch, "seed": self.seed, **self.recover}
