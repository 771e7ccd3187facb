"""Rules that name modules by layer, as settings of quantised checkpoints and of adapters hold them, for fewer layers.

A rule is the name of a module, whole or its last parts, or a pattern that names match. What it says of the layers that
stay it must say of them under their new numbers, and of nothing else.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Reads = Callable[[str, str], bool]  # whether a pattern, without its prefix, speaks of the module of a name

_PREFIX = re.compile(r"re:|[+-]:")  # of patterns: compressed-tensors, GPTQModel
_NAME = re.compile(r"[\w.:/-]+")  # no character that means more than itself in a pattern, but for the dot


def matches(pattern: str, name: str) -> bool:
    """As quantisers read a pattern: from the beginning of a name on."""
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return matches_glob(pattern, name)


def matches_glob(pattern: str, name: str) -> bool:
    """As ModelOpt does: * is any text, and the whole name must match."""
    return fnmatch.fnmatchcase(name, pattern)


class Renumbering:
    """The layers of a stack under new numbers.

    stems: what stands before a layer's number in full names ("model.layers."). places: new numbers by the old ones, of
    those that stay. modules: the full names of all modules that a rule may speak of, before anything was removed.
    """

    def __init__(self, stems: Iterable[str], places: Mapping[int, int], modules: Iterable[str]) -> None:
        self._places = places
        parts = [stem.removesuffix(".").split(".") for stem in stems]
        self._stems = {".".join(part[start:]) for part in parts for start in range(len(part))}
        alternatives = "|".join(r"\\?\.".join(map(re.escape, s.split("."))) for s in sorted(self._stems, key=len)[::-1])
        self._numbered = re.compile(rf"(?<![\w.])(({alternatives})\\?\.)(\d+)(?![\d\w])")
        self._modules = {module: self.name(module) for module in modules}

    def name(self, name: str) -> str | None:
        """A name, whole or its last parts, as it is now; None if its layer is gone."""
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit() and ".".join(parts[:place]) in self._stems:
                new = self._places.get(int(part))
                return None if new is None else ".".join([*parts[:place], str(new), *parts[place + 1 :]])
        return name

    def rule(self, rule: str, reads: Reads = matches) -> list[str]:
        """The rules that say what `rule` said: itself, itself under another number, several in its place, or none."""
        prefix = found[0] if (found := _PREFIX.match(rule)) else ""
        body = rule.removeprefix(prefix)
        if _NAME.fullmatch(body):
            name = self.name(body)
            return [] if name is None else [prefix + name]
        wanted = {new for old, new in self._modules.items() if new is not None and reads(body, old)}
        if not wanted and any(reads(body, module) for module in self._modules):
            return []  # of layers that are gone alone
        if wanted == self._read(body, reads):
            return [rule]
        renumbered = self._numbered.sub(lambda m: f"{m[1]}{self._places.get(int(m[3]), m[3])}", body)
        if wanted == self._read(renumbered, reads):
            return [prefix + renumbered]
        if reads is matches_glob:
            return sorted(wanted)
        return [f"{prefix}(?:{'|'.join(map(re.escape, sorted(wanted)))})$"] if wanted else []

    def settings(self, settings: Any, reads: Reads = matches) -> Any:
        """`settings`, JSON, with every rule in it, in lists and as keys, and every name, as it is now."""
        if isinstance(settings, Mapping):
            return {
                new: self.settings(value, reads) for key, value in settings.items() for new in self.rule(key, reads)
            }
        if isinstance(settings, list):
            return [
                new
                for each in settings
                for new in (self.rule(each, reads) if isinstance(each, str) else [self.settings(each, reads)])
            ]
        return self.name(settings) if isinstance(settings, str) else settings

    def _read(self, pattern: str, reads: Reads) -> set[str]:
        return {new for new in self._modules.values() if new is not None and reads(pattern, new)}
