"""What a quantised checkpoint says of its modules by name, carried over to fewer layers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from e3pruner.models.files.names import TensorNames
from e3pruner.storage import parse_json, read_json, write_json
from e3pruner.surgery.renumbering import Renumbering, matches, matches_glob

_SETTINGS = ("quantization_config", "compression_config")
# Beside config.json: of ModelOpt, AutoGPTQ, AutoAWQ, Quanto.
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json")


def is_quantised(config: PreTrainedConfig) -> bool:
    """Whether a configuration speaks of quantised weights."""
    return any(getattr(part, name, None) for part in _parts(config) for name in _SETTINGS)


def rules_of(names: TensorNames, tensors: Iterable[str], places: Mapping[int, int]) -> Renumbering:
    """What rules may speak of in a checkpoint of `tensors`: their modules, as they are stored and in the model."""
    full = {*tensors, *(name for name, _ in names.model.named_modules())}
    modules = {parent for name in full for parent in _parents(name)}
    return Renumbering(names.stems, places, modules)


def renumber(config: PreTrainedConfig, rules: Renumbering) -> None:
    """Every rule in the quantisation's settings, in place."""
    for part in _parts(config):
        for name in _SETTINGS:
            if settings := getattr(part, name, None):
                setattr(part, name, rules.settings(settings, _reading(settings)))


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """`config.json` of `config`, the quantisation's settings in their order: of GPTQModel's rules the first counts."""
    config.save_pretrained(folder)
    content = read_json(folder / "config.json")
    content |= {name: getattr(config, name) for name in _SETTINGS if name in content}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def renumber_files(folder: Path, rules: Renumbering) -> None:
    """The same in the files that some quantisers write beside it."""
    for file in (folder / name for name in _FILES):
        if file.is_file():
            content = read_json(file)
            write_json(file, rules.settings(content, _reading(content)))


def renumbered_metadata(metadata: Mapping[str, str], rules: Renumbering) -> dict[str, str]:
    """The metadata in the header of a safetensors file, which may speak of tensors by name, and hold JSON (torchao)."""
    found = {}
    for key, value in metadata.items():
        if (new := rules.name(key)) is None:
            continue
        try:
            content = parse_json(value) if value[:1] in ("{", "[") else None
        except ValueError:
            content = None
        found[new] = value if content is None else json.dumps(rules.settings(content))
    return found


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _reading(settings: Any) -> Any:
    """How the quantiser that wrote `settings` reads a pattern."""
    producer = settings.get("producer") or {} if isinstance(settings, Mapping) else {}
    names = (settings.get("quant_method"), producer.get("name")) if isinstance(settings, Mapping) else ()
    return matches_glob if "modelopt" in names else matches
