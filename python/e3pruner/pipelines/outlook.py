"""What can be done with a model, and why not: from its configuration alone, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from e3pruner.mask_search.search import try_surgery
from e3pruner.mask_search.units import units_of
from e3pruner.models import find_layers
from e3pruner.models.files.empty import empty_model
from e3pruner.models.loading import BUILT_IN, checked_folder
from e3pruner.pipelines.forecast import Sizes
from e3pruner.surgery.demands import demands_of
from e3pruner.surgery.engines import ENGINES, orders_of

_ERRORS = (ValueError, TypeError, ImportError)


@dataclass(frozen=True)
class Answer:
    """Whether something can be done; `why`: on which conditions it can, or the reason why it cannot."""

    yes: bool
    why: str


@dataclass(frozen=True)
class Outlook:
    """model: as it was named. model_type: of its configuration. layers: of its decoder, None where that is not found.
    answers: by what is asked for: "search", "prune", "distill", "runtime", and the engines downstream by name. sizes:
    of its weights, None where the layers are not found.
    """

    model: str
    model_type: str
    layers: int | None
    answers: dict[str, Answer]
    sizes: Sizes | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def outlook(name: str, *, trust_remote_code: bool = False) -> Outlook:
    """What can be done with the model `name`: a checkpoint folder, "smollm2", or a model on the Hugging Face Hub, of
    which nothing but the configuration is fetched. The model is built without weights.

    Raises ValueError for a configuration that describes no model, OSError where it cannot be had.
    """
    config = _config(name, trust_remote_code)
    text = config.get_text_config(decoder=True)
    try:
        model = empty_model(config, trust_remote_code)
        layers = len(find_layers(model))
    except _ERRORS as error:
        asked = ("search", "prune", "distill", "runtime", *ENGINES)
        return Outlook(name, config.model_type, None, dict.fromkeys(asked, Answer(False, str(error))), None)
    cut = _answer(lambda: _cut(model))
    answers = {
        "search": cut,
        "prune": cut,
        "distill": _distill(config, cut),
        "runtime": _answer(lambda: _served(model)),
    }
    answers |= {engine: _engine(config, engine) for engine in ENGINES}
    return Outlook(name, text.model_type, layers, answers, Sizes.of(model))


def _config(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    local = name == BUILT_IN or Path(name).exists()
    where = checked_folder(name, trust_remote_code) if local else name
    config: PreTrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    return config


def _answer(question: Callable[[], str]) -> Answer:
    try:
        return Answer(True, question())
    except _ERRORS as error:
        return Answer(False, str(error))


def _cut(model: PreTrainedModel) -> str:
    """How many layers may go, and on which conditions; raises where none may."""
    demands = demands_of(model.config)
    try_surgery(model, units_of(model, 1))
    may_go = len(find_layers(model)) - len({layer for demand in demands for layer in demand.fixed})
    return "; ".join([f"{may_go} layers may go, if one stays", *(demand.reason for demand in demands)])


def _distill(config: PreTrainedConfig, cut: Answer) -> Answer:
    if not cut.yes:
        return cut
    if getattr(config, "quantization_config", None) is not None:
        return Answer(False, "its weights are quantised: they can be cut as files, and learn only when dequantised")
    return Answer(True, "all weights, LoRA, or the layers beside the cuts")


def _served(model: PreTrainedModel) -> str:
    from e3pruner.runtime.decoder_description import check_supported  # the compiled module may be missing

    check_supported(model)
    return "LayerSkipRuntime decodes it in C++, with any of its layers skipped"


def _engine(config: PreTrainedConfig, engine: str) -> Answer:
    if orders := orders_of(config, engine):
        return Answer(True, f"only layers that keep to its rule, quota={engine!r}: {orders[0].reason}")
    return Answer(True, "no rule by index is known for this type; whether the engine serves it, its own list says")
