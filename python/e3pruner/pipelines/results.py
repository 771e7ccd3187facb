"""What searches and recoveries write into results.json, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e3pruner.recovery import DistillResult
from e3pruner.report import describe_environment
from e3pruner.surgery import PruningPlan


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
