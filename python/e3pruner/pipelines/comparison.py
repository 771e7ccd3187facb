"""Search methods side by side, on the same tokens: each cell is measured once, whatever interrupts the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import e3pruner
from e3pruner.evaluation import layers_to_drop
from e3pruner.form import natural
from e3pruner.mask_search.calibration import Calibration
from e3pruner.mask_search.held_out import held_out_figures
from e3pruner.mask_search.measurements import Checkpoint
from e3pruner.mask_search.method import METHODS
from e3pruner.mask_search.problem import SearchProblem
from e3pruner.mask_search.search import run_search
from e3pruner.mask_search.units import units_of
from e3pruner.models import find_layers
from e3pruner.models.device import AUTO
from e3pruner.models.identity import model_identity
from e3pruner.models.loading import Dtype, load_model, load_tokenizer
from e3pruner.models.stack import check_unquantised
from e3pruner.pipelines.damage import Damage
from e3pruner.pipelines.matrix import Cell, Matrix
from e3pruner.pipelines.results import run_results
from e3pruner.precision import autocast_dtype
from e3pruner.report import build_report, save_results
from e3pruner.report.comparison import markdown, summary
from e3pruner.storage import fingerprint, locked, read_json_lines, replacing_file, write_json_lines
from e3pruner.surgery import PruningPlan
from e3pruner.text.kinds import KindsOfText, kinds_of_text, leaving_one_out
from e3pruner.text.sources import WRITTEN

CELLS_FILE, MEASURED_FOLDER = "cells.jsonl", "measured"
TABLE_FILE = "comparison.md"
_COMPENSATION = 32  # training sequences of each kind: the closed forms are fitted to those of all but the last
_BATCH = 4
_ROW = {"key": str, "drop": natural, "removed": [natural], "cost": float, "seconds": float}
_ROW |= {"held_out": {str: {"kl": float, "perplexity": float, "sequences?": {"kl": [float]}}}}
_ROW |= {"writing?": {str: object}}

Row = dict[str, Any]


class KnownText(NamedTuple):
    """Tokens, and what was measured on them: by every problem on them, and by earlier runs."""

    calibration: Calibration
    store: Checkpoint


@dataclass
class Comparison:
    """A matrix on one model and its texts, its results in `folder`. `texts`: by the kind that is left out, or by "".

    `Comparison.from_yaml("matrix.yaml", "compared").run()` does what `e3 compare` measures; `save` writes its tables.

    Raises `ValueError` before anything is measured if the matrix does not fit the model.
    """

    matrix: Matrix
    model: PreTrainedModel
    texts: dict[str, KindsOfText]
    folder: Path
    tokenizer: PreTrainedTokenizerBase | None = None  # without it nothing is written

    @classmethod
    def from_yaml(
        cls, path: str | Path, folder: str | Path, device: str = AUTO, *, trust_remote_code: bool = False
    ) -> Comparison:
        """The comparison that a YAML file describes; see `Matrix` for its keys, and `load`."""
        return cls.load(Matrix.from_yaml(path), folder, device, trust_remote_code=trust_remote_code)

    @classmethod
    def load(
        cls, matrix: Matrix, folder: str | Path, device: str = AUTO, *, trust_remote_code: bool = False
    ) -> Comparison:
        """The comparison of the model and the texts that `matrix` names.

        Raises FileExistsError, before anything is loaded, for a `folder` that holds something else; ValueError for a
        model, a text or a device that cannot be taken.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / CELLS_FILE).is_file())):
            raise FileExistsError(
                f"--out {folder} holds no {CELLS_FILE}, so no comparison goes on there; name another folder"
            )
        tokenizer = load_tokenizer(matrix.model, trust_remote_code=trust_remote_code)
        writing = not {*matrix.text, *matrix.unseen}.isdisjoint(WRITTEN)
        texts = None if writing else texts_of(matrix, tokenizer)  # before the model, which may be large
        # In fp32 whatever the checkpoint: `precision` says what is computed in, and recovery needs the master weights.
        dense = load_model(matrix.model, device, Dtype.FLOAT32, trust_remote_code=trust_remote_code)
        check_unquantised("model", dense, "to cut and heal it in memory, name it dequantised")
        return cls(matrix, dense, texts or texts_of(matrix, tokenizer, dense), folder, tokenizer)

    def __post_init__(self) -> None:
        if self.matrix.fraction:
            protect = self.matrix.protect
            drops = [layers_to_drop(self.model, fraction=share, protect=protect) for share in self.matrix.fraction]
            self.matrix = replace(self.matrix, drop=list(dict.fromkeys(drops)), fraction=[])
        self.units = {drop: units_of(self.model, drop, self.matrix.protect) for drop in self.matrix.drop}
        self.dtype = autocast_dtype(self.matrix.precision, self.model.device)
        self.identity = {"dtype": str(self.dtype), "model": model_identity(self.model)}
        self._known: dict[str, KnownText] = {}
        path = self.folder / MEASURED_FOLDER / "dense.json"
        self.damage: Damage | None = None
        if self.tokenizer is not None and self.matrix.writing:
            self.damage = Damage(self.model, self.tokenizer, self.matrix.writing, path)

    def key(self, cell: Cell) -> str:
        """A hash of everything that decides the figures of a cell."""
        tokens = [each.store.identity for each in (self.calibration(cell), *self.held_out(cell).values())]
        settings, recovery = asdict(cell), cell.recovery
        settings["contestant"].pop("name")
        settings["recovery"].pop("name")
        training = fingerprint(self.texts[cell.left_out].training) if recovery.heals else None
        written = [self.matrix.writing] if self._writes(cell) else []
        return fingerprint(settings, tokens, self.matrix.protect, training, *written)[:16]

    def run(self, advance: Callable[[Row], None] = lambda row: None) -> list[Row]:
        """The rows of all cells, in the matrix's order; those that the folder has are not measured again.

        `advance(row)` is called after each.
        """
        file = self.folder / CELLS_FILE
        with locked(self.folder):
            rows = {row["key"]: row for row in read_rows(file)}
            chosen = []
            for cell in self.matrix.cells():
                key = self.key(cell)
                if key not in rows:
                    rows[key] = {"key": key, **self.measure(cell)}
                    write_json_lines(file, rows.values())
                chosen.append(rows[key] | {"method": cell.contestant.name, "recovery": cell.recovery.name})
                advance(chosen[-1])
        return chosen

    def save(self, rows: list[Row], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes results.json, `TABLE_FILE` and the report of `rows`; the results, with the parts `about` added."""
        matrix = self.matrix
        title = matrix.title or f"{matrix.model}: {len(matrix.methods)} methods, {len(matrix.seeds)} seeds"
        settings = matrix.settings()
        lines = summary(rows, matrix.methods[0].name)
        results = run_results(title, settings) | {"matrix": settings, "comparison": lines}
        results |= (self.damage.about(lines, rows) if self.damage else {}) | dict(about or {})
        save_results(results, self.folder)
        with replacing_file(self.folder / TABLE_FILE) as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
        build_report(self.folder)
        return results

    def calibration(self, cell: Cell) -> KnownText:
        """The calibration tokens of a cell's seed, the same for every method."""
        return self.known(self.texts[cell.left_out].calibration_of(cell.seed, self.matrix.sequences))

    def held_out(self, cell: Cell) -> dict[str, KnownText]:
        """What a cell is judged on, by kind of text."""
        return {kind: self.known(tokens) for kind, tokens in self.texts[cell.left_out].held_out.items()}

    def measure(self, cell: Cell) -> Row:
        """Search, recover, judge on held-out text, and let the first seed's models write."""
        row = self._search(cell)
        if cell.recovery.heals:
            return row | self._recover(cell, row["removed"])
        held_out = {kind: self._judge(row["removed"], each) for kind, each in self.held_out(cell).items()}
        kept = PruningPlan.of_removed(row["removed"], len(find_layers(self.model))).kept
        writes = self._writes(cell)
        return row | {"held_out": held_out} | (writes.of_cut(kept) if writes else {})

    def known(self, tokens: Tensor) -> KnownText:
        """What the folder knows of these tokens."""
        digest = fingerprint(tokens)
        if digest not in self._known:
            path = self.folder / MEASURED_FOLDER / f"{digest[:16]}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            store = Checkpoint(path, self.identity | {"tokens": digest})
            self._known[digest] = KnownText(Calibration(tokens.split(_BATCH), self.model.device), store)
        return self._known[digest]

    def problem(self, text: KnownText, drop: int, seed: int = 0) -> SearchProblem:
        """The search for `drop` layers on `text`, with all that is known of it."""
        return SearchProblem(
            self.model,
            text.calibration,
            units=self.units[drop],
            seed=seed,
            dtype=self.dtype,
            measurements=text.store,
        )

    def _writes(self, cell: Cell) -> Damage | None:
        """What lets the models of the first seed write."""
        first = cell.seed == self.matrix.seeds[0] and cell.left_out in ("", self.matrix.text[0])
        return self.damage if first and self.damage and self.damage.options else None

    def _search(self, cell: Cell) -> Row:
        text = self.calibration(cell)
        problem = self.problem(text, cell.drop, cell.seed)
        known = set(text.store.seconds)
        try:
            with problem:
                began = time.perf_counter()
                running = METHODS[cell.contestant.method](problem, **cell.contestant.search)
                _, removed = run_search(problem, running)
                took = time.perf_counter() - began
                cost, seconds = problem.account.cost, problem.account.seconds
                measuring = sum(each for key, each in text.store.seconds.items() if key not in known)
                (kl,) = problem.score([problem.mask(removed)])
        finally:
            text.store.save()
        return {
            "method": cell.contestant.name,
            "options": cell.contestant.search,
            "drop": cell.drop,
            "seed": cell.seed,
            "left_out": cell.left_out,
            "recovery": cell.recovery.name,
            "removed": removed,
            "calibration_kl": kl,
            "calibration_tokens": text.calibration.tokens,
            "cost": cost,
            # What its measurements took, whichever cell made them, and its own thinking.
            "seconds": seconds + max(0.0, took - measuring),
        }

    def _judge(self, removed: Sequence[int], held_out: KnownText) -> dict[str, Any]:
        """Figures of the dense model without `removed` on one kind of held-out text."""
        try:
            with self.problem(held_out, len(removed)) as problem:
                return held_out_figures(problem, [problem.mask(removed)])[0]
        finally:
            held_out.store.save()

    def _recover(self, cell: Cell, removed: Sequence[int]) -> Row:
        recovery, text = cell.recovery, self.texts[cell.left_out]
        plan = PruningPlan.of_removed(removed, len(find_layers(self.model)))
        student = e3pruner.prune(self.model, plan)
        began = time.perf_counter()
        if recovery.compensates:
            fitted, judge = self._compensation(text)
            e3pruner.compensate(student, self.model, plan, fitted, judge=judge)
        if recovery.recover is not None:
            options = {"seed": cell.seed, "plan": plan, **recovery.recover}
            e3pruner.distill(student, teacher=self.model, data=text.training, **options)
        took = time.perf_counter() - began
        options = {"precision": self.matrix.precision, "by_sequence": True, "progress": False}
        held_out = {}
        for kind, sequences in text.held_out.items():
            figures = e3pruner.evaluate(student, sequences.split(_BATCH), self.model, **options)
            held_out[kind] = {key: figures[key] for key in ("kl", "perplexity", "top1_agreement")}
            held_out[kind]["sequences"] = {"kl": figures["sequences"]["kl"]}
        writes = self._writes(cell)
        return {"held_out": held_out, "recovery_seconds": took} | (writes.of(student) if writes else {})

    def _compensation(self, text: KindsOfText) -> tuple[Tensor, Tensor]:
        """What a compensation is fitted to, and what judges it: text of another kind, the last of the matrix."""
        kinds = len(self.matrix.text) - self.matrix.leave_one_out
        rows = text.training[: _COMPENSATION * kinds]
        kind = torch.arange(len(rows)) % kinds  # the kinds take turns
        return rows[kind < kinds - 1], rows[kind == kinds - 1]


def texts_of(
    matrix: Matrix, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel | None = None
) -> dict[str, KindsOfText]:
    """The texts of a comparison, by the kind that is left out, or by ""."""
    sizes: dict[str, Any] = {"length": matrix.length, "held_out": matrix.held_out, "teacher": teacher}
    if matrix.leave_one_out:
        return leaving_one_out(tokenizer, matrix.text, **sizes)
    return {"": kinds_of_text(tokenizer, matrix.text, unseen=matrix.unseen, **sizes)}


def read_rows(path: Path) -> list[Row]:
    """The rows of a comparison's file, if it exists. Raises `ValueError` naming a line that is none."""
    return read_json_lines(path, _ROW, "no cell of a comparison") if path.exists() else []
