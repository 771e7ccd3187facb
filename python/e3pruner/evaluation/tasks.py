"""Benchmark tasks by EleutherAI's lm-evaluation-harness, which must be installed (`lm-eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.requirements import require


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of `tasks`, with "METRIC_stderr" where the harness gives one.

    `folder`: of YAML files that define the tasks, in place of the harness's own. `limit`: documents of each task.
    Nothing is downloaded that `HF_HUB_OFFLINE=1` forbids. The global random generators are seeded with `seed`.

    Raises ValueError for a task that is not defined, FileNotFoundError if `folder` is none.
    """
    require("lm_eval")
    from lm_eval import simple_evaluate  # optional, and seconds to import
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r} is no folder of task definitions")
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        where = "the harness" if folder is None else folder
        raise ValueError(f"tasks={list(tasks)}: {', '.join(unknown)} are not defined in {where}")
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        **seeds,
    )
    return {task: _figures(values) for task, values in found["results"].items()}


def _figures(values: dict[str, object]) -> dict[str, float]:
    """The harness writes "METRIC,FILTER"; a filter that does nothing is called none."""
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    return {name.removesuffix(",none"): value for name, value in numbers.items()}
