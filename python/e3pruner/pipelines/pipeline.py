"""The whole way from a dense model to a recovered one, as one set of options says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from e3pruner.pipelines.options import PipelineOptions
from e3pruner.pipelines.output import output_folder
from e3pruner.pipelines.results import run_results
from e3pruner.pipelines.settings import check_keys, parse_pairs, read_settings
from e3pruner.pipelines.work import Work
from e3pruner.report import build_report, save_results


class Pipeline(PipelineOptions):
    """Search, cut, compensate, recover, judge and report, in one or several rounds.

    `Pipeline(model="smollm2", drop=8, out="run").run()` does what `e3 run` does, and
    `Pipeline.from_yaml("pipeline.yaml").run()` what `e3 run pipeline.yaml` does. See `PipelineOptions` for the options.
    """

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> Pipeline:
        """The pipeline of a YAML file, such as the e3.yaml in the folder of a result; `changes` win over it.

        Raises ValueError naming the file and its fault, besides what the constructor raises.
        """
        values = read_settings(path)
        check_keys(str(path), values, [each.name for each in fields(cls)])
        for name in ("search", "recover"):
            if isinstance(values.get(name), list):  # as on the command line
                values[name] = parse_pairs(values[name], name)
        values = {name: value for name, value in (values | changes).items() if value is not None}
        if missing := [name for name in ("model", "out") if name not in values]:
            raise ValueError(f"{path} lacks {' and '.join(missing)}; give it as an argument, or in the file")
        return cls(**values)

    def run(
        self,
        *,
        force: bool = False,
        settings: Mapping[str, Any] | None = None,
        command: str = "e3 run",
        about: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Does all of it and returns the results (see `e3pruner.report.results`).

        `out` then holds the pruned and the recovered model as Hugging Face folders, pruning.json, results.json and the
        report. Interrupted or killed at any point, the same call goes on and ends with the same weights. `force`
        replaces an earlier result. `settings`: what to keep as the options of the run, for `command`, in place of
        `self.settings()`. `about`: parts of the results to set, such as "title".

        Raises what `output_folder` raises for `out`; ValueError for a model, a text or a number of layers that does not
        fit, before anything is measured; KeyboardInterrupt after Ctrl-C, once what is done is kept.
        """
        kept = self.settings() if settings is None else settings
        with output_folder(self.out, kept, force=force, command=command) as folder:
            work = Work.load(self, folder)
            results = run_results(work.title, kept) | dict(about or {}) | work.run()
            save_results(results, folder)
            build_report(folder)
            work.clean()
        return results
