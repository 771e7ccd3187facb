"""What a search method is, and the table of those that there are: one file each in `methods`, or another package's."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Generator, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e3pruner.mask_search.problem import SearchProblem

GROUP = "e3pruner.methods"
"""The entry points by which another package adds methods: `NAME = "package.module:function"`."""

Search = Generator[dict[str, Any], None, list[int]]
"""A running search: yields one record per step, returns the units to remove.

Every record holds "removed", the best mask known after that step, as indices of units (see `Units`). "importance" is
one value per unit, "score" a mean KL per token in nats, "removed_share" for each unit the share of the step's masks
that lack it.
"""


class Progress:
    """Hears how far a search is; this one says it to nobody."""

    def expect(self, passes: int) -> None:
        """The search will make at most so many forward passes."""

    def advance(self) -> None:
        """One of them is made."""


class Method:
    """A search by `name`: called as `method(problem, option=value, ...)`, it checks its options at once or in its first
    step, then searches.

    `sublayers`: it can remove the attention or the MLP of a layer alone. `quotas`: it can remove given numbers of each
    kind of layer.
    """

    def __init__(self, function: Callable[..., Search], name: str, *, sublayers: bool, quotas: bool) -> None:
        functools.update_wrapper(self, function)
        self.name, self.sublayers, self.quotas = name, sublayers, quotas
        self._function = function
        self.about = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        parameters = inspect.signature(function).parameters.values()
        self.options = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    def __call__(self, problem: SearchProblem, **options: Any) -> Search:
        return self._function(problem, **options)


def search_method(
    name: str, *, sublayers: bool = False, quotas: bool = False
) -> Callable[[Callable[..., Search]], Method]:
    """Declares the decorated function a `Method`."""
    return lambda function: Method(function, name, sublayers=sublayers, quotas=quotas)


class Methods(Mapping[str, Method]):
    """The methods by name: ours, then those of other packages, which are imported when they are first asked for."""

    @functools.cached_property
    def _ours(self) -> dict[str, Method]:
        package = importlib.import_module("e3pruner.mask_search.methods")
        modules = [
            importlib.import_module(f"{package.__name__}.{each.name}")
            for each in pkgutil.iter_modules(package.__path__)
        ]
        found = [each for module in modules for each in vars(module).values() if isinstance(each, Method)]
        return {method.name: method for method in found}

    def described(self) -> str:
        """Each of our methods with its options and their defaults, and what it does: text for a docstring."""
        lines = []
        for name, method in self._ours.items():
            options = ", ".join(f"{option}={default!r}" for option, default in method.options.items())
            lines.append(f"    {name}: {options or 'no options'}\n        {method.about}")
        return "\n".join(lines)

    @functools.cached_property
    def _theirs(self) -> dict[str, EntryPoint]:
        found = {point.name: point for point in entry_points(group=GROUP)}
        if taken := sorted(found.keys() & self._ours.keys()):
            raise ValueError(f"{found[taken[0]].value}: there is a search method {taken[0]!r} already; rename it")
        return found

    def __getitem__(self, name: str) -> Method:
        if name in self._ours:
            return self._ours[name]
        method = self._theirs[name].load()
        if not isinstance(method, Method):
            raise TypeError(f"{self._theirs[name].value}, search method {name!r}, is not declared by search_method")
        return method

    def __iter__(self) -> Iterator[str]:
        yield from self._ours
        yield from self._theirs

    def __len__(self) -> int:
        return len(self._ours) + len(self._theirs)


METHODS = Methods()
