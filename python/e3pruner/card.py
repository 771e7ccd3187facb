"""The card of a checkpoint: what it was made of, what was done to it, how to do it again."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from e3pruner.models.loading import BUILT_IN, HUB_ID, model_folder

if TYPE_CHECKING:
    from e3pruner.surgery.plan import PruningPlan

CARD, TAG = "README.md", "layer-pruning"
SMOLLM2 = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": "en"}
TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
FIGURES = {
    "kl": "held-out KL",
    "perplexity": "perplexity",
    "top1_agreement": "top-1 agreement",
    "parameters": "parameters",
}


def source_facts(name: str) -> dict[str, Any]:
    """What the card of model `name` says of base model, licence, language and tags; of a pruned one, the dense's."""
    if name == BUILT_IN:
        return dict(SMOLLM2)
    folder = model_folder(name)
    given = _metadata(folder / CARD)
    facts = {key: given[key] for key in TAKEN_OVER if key in given}
    of_cache = next((part for part in folder.parts if part.startswith("models--")), "")
    if TAG in facts.get("tags", ()):
        base = given.get("base_model")
    elif not Path(name).exists() and HUB_ID.fullmatch(name):
        base = name.partition("@")[0]
    else:
        base = of_cache.removeprefix("models--").replace("--", "/")
    return facts | ({"base_model": base} if base else {})


def _metadata(card: Path) -> dict[str, Any]:
    """What the head of a card declares; nothing, with a warning, where it cannot be read."""
    if not card.is_file():
        return {}
    try:
        given = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        warnings.warn(f"{card} cannot be read, so licence and tags are not taken over from it: {error}", stacklevel=4)
        return {}
    tags = given.get("tags") or []
    return given | {"tags": [tags] if isinstance(tags, str) else tags}


def write_card(
    folder: Path,
    source: str,
    plan: PruningPlan | None,
    command: str,
    *,
    settings: Mapping[str, Any] | None = None,
    recovered: str = "",
    figures: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Writes the card of the checkpoint in `folder`, which was made of the model `source` by `command`.

    `settings`: of the pipeline.yaml that `command` reads, by name. `recovered`: how, and by which data, it was trained;
    `figures`: rows that name a model and what was measured of it.
    No path of this machine is in it.
    """
    facts = source_facts(source)
    tags = [*dict.fromkeys([*facts.pop("tags", []), TAG, "e3kernels", *(["distillation"] if recovered else [])])]
    data = ModelCardData(**{"library_name": "transformers", "pipeline_tag": "text-generation", **facts, "tags": tags})
    base = facts.get("base_model", Path(source).resolve().name)
    parts = [f"# {base}, layers pruned", "A vanilla Hugging Face checkpoint: it loads with `AutoModelForCausalLM`."]
    if plan is not None:
        cut = "".join(f" Without their {kind}: {layers}." for kind, layers in plan.sublayers.items() if layers)
        method = f" They were found by the method `{plan.method}`, seed {plan.seed}." if plan.method else ""
        parts.append(
            f"{len(plan.kept)} of {plan.num_layers} decoder layers are left. Removed, counted from 0: {plan.removed}."
            f"{cut}{method} `pruning.json` holds the plan."
        )
    parts.append(f"## Recovery\n\n{recovered or 'None: the model was cut and not trained since.'}")
    if rows := [dict(row) for row in figures]:
        shown = [key for key in FIGURES if any(key in row for row in rows)]
        lines = [["model", *(FIGURES[key] for key in shown)], ["---"] * (len(shown) + 1)]
        lines += [[Path(str(row["name"])).name, *(_figure(row.get(key)) for key in shown)] for row in rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## Figures\n\nMeasured on held-out text by the command below.\n\n{table}")
    parts.append(f"## How to reproduce\n\n```\npip install 'e3kernels[demo]'\n{without_paths(command)}\n```")
    if settings is not None:
        given = {name: _without_path(value) for name, value in settings.items() if value is not None}
        parts.append(f"with this `pipeline.yaml`:\n\n```yaml\n{yaml.safe_dump(given, sort_keys=False)}```")
    parts.append(
        "## Limits\n\nA pruned model is a damaged model: judge it on your own task before you use it. Perplexities are "
        "of the text that the command names, and compare with nothing else. Nobody has looked at its safety."
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / CARD)


def recovery_sentence(teacher: str, text: object, steps: int) -> str:
    """What a card says of a distillation: from whom, on what, how long."""
    data = "the built-in English technical prose" if text is None else f"`{Path(str(text)).name}`"
    return f"Distilled from `{without_paths(teacher)}` in {steps:,} steps, on {data}."


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _without_path(value: Any) -> Any:
    """The last name of a path; any other value as it is."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def without_paths(command: str) -> str:
    """`command` with the last name of every path in place of it."""

    def short(word: str) -> str:
        option, equals, value = word.rpartition("=")
        return f"{option}{equals}{Path(value).name}" if "/" in value and not HUB_ID.fullmatch(value) else word

    return shlex.join(short(word) for word in shlex.split(command))
