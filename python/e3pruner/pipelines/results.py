"""What searches and recoveries write into results.json, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.evaluation import Speeds, fastest_writer, writing
from e3pruner.recovery import DistillResult
from e3pruner.report import describe_environment
from e3pruner.surgery import PruningPlan

DENSE = "dense"


def run_results(title: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What every run has: its title, where it ran, with which options."""
    return {"title": title, "environment": describe_environment(), "config": dict(settings)}


def search_results(plan: PruningPlan) -> dict[str, Any]:
    """The plan's layers, the importance its search started from and the way its masks went, where it kept them."""
    results: dict[str, Any] = {"layers": plan.num_layers, "removed": plan.removed}
    if scores := [record["importance"] for record in plan.history if "importance" in record]:
        results["importance"] = scores[0]
    if len(plan.history) > 1:
        results["mask_path"] = {
            "steps": [record["step"] for record in plan.history],
            "removed": [removed_share(record, plan.num_layers) for record in plan.history],
        }
    return results


def removed_share(record: dict[str, Any], num_layers: int) -> list[float]:
    """For each layer the share of the step's masks that lack it; of one mask, 1 or 0."""
    share = record.get("removed_share")
    return share if share is not None else [float(layer in record["removed"]) for layer in range(num_layers)]


def recovery_results(result: DistillResult) -> dict[str, Any]:
    """The training loss of every step, and the held-out KL and perplexity where they were measured."""
    return {
        "recovery": {
            "train": [[record["step"], record["loss"]] for record in result.curve],
            "held_out": [[record["step"], record["kl"]] for record in result.held_out if "kl" in record],
            "perplexity": [[record["step"], record["perplexity"]] for record in result.held_out],
        }
    }


def speed_results(models: Sequence[Mapping[str, Any]], found: Speeds) -> dict[str, Any]:
    """The figures of `models` with the speeds of those that were timed, and how far these can be trusted."""
    return {"models": [{**row, **found.of.get(row["name"], {})} for row in models], "timing": found.timing}


def writing_results(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> dict[str, Any]:
    """How each of `models` writes, by `e3pruner.evaluation.writing` with `options`, and their answers side by side."""
    found = {name: writing(fastest_writer(model), tokenizer, **options) for name, model in models.items()}
    texts = {name: {text["prompt"]: text["answer"] for text in each.pop("texts")} for name, each in found.items()}
    prompts = next(iter(texts.values()))
    side_by_side = [{"prompt": p, "answers": {name: answers[p] for name, answers in texts.items()}} for p in prompts]
    return {"writing": found, "generations": side_by_side}
