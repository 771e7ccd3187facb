"""Kinds of text that need no network: what each is, where it comes from, and its licence."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.text.built_in import SUBJECTS, Document, manual_documents, written_documents

_MODULE_BYTES = 8_000, 24_000  # of a standard-library module: long enough to be text, no one too large for its split
# Folders of the library with long lists of cases, and with other people's modules.
_NO_TEXT = frozenset(("test", "tests", "idle_test", "site-packages", "lib2to3"))
# Of packages that PyTorch needs, those folders whose docstrings explain.
_SYMPY = ("combinatorics", "concrete", "discrete", "geometry", "ntheory", "series", "sets", "stats", "vector")
_NETWORKX = ("algorithms",)
_DOCSTRING = 600  # characters: shorter ones say little but their names
_DOCUMENTED = 3_000  # characters of docstrings of a module
_WRITTEN_LENGTH, _WRITTEN_EACH = 384, 3  # tokens of a document that the teacher writes, and documents of each subject

WRITTEN = ("prose", "chat")
"""What the teacher writes itself: continuations, and answers where its tokenizer has a chat template."""


@dataclass(frozen=True)
class Source:
    """A kind of text: what it is, whose licence it stands under, and its documents by name."""

    about: str
    licence: str
    documents: Callable[[], dict[str, str]]


def module_documents(packages: bool = False) -> dict[str, str]:
    """The source of the modules at the top of Python's standard library, or of its packages too, by path."""
    low, high = _MODULE_BYTES
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.rglob("*.py") if packages else library.glob("*.py"))
    return {
        str(file.relative_to(library)): file.read_text(encoding="utf-8")
        for file in files
        if low <= file.stat().st_size <= high and _NO_TEXT.isdisjoint(file.relative_to(library).parts)
    }


def docstrings(package: str, folders: Sequence[str]) -> dict[str, str]:
    """The docstrings of the modules in some folders of an installed package, by path: prose, formulas and examples."""
    found = {}
    for file in sorted(distribution(package).files or [], key=str):
        if file.suffix == ".py" and file.parts[:2] in {(package, folder) for folder in folders}:
            text = "\n\n".join(_docstrings(Path(str(file.locate()))))
            if len(text) >= _DOCUMENTED and _NO_TEXT.isdisjoint(file.parts):
                found[str(file)] = text
    return found


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text is not None and len(text) >= _DOCSTRING:
            yield text


SOURCES = {
    "manual": Source("the topics of Python's manual", "PSF-2.0", manual_documents),
    "code": Source("modules at the top of Python's standard library", "PSF-2.0", module_documents),
    "library": Source(
        "modules of Python's standard library and its packages", "PSF-2.0", partial(module_documents, packages=True)
    ),
    "mathematics": Source("docstrings of SymPy", "BSD-3-Clause", partial(docstrings, "sympy", _SYMPY)),
    "graphs": Source("docstrings of NetworkX", "BSD-3-Clause", partial(docstrings, "networkx", _NETWORKX)),
}


def written(
    tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel, subjects: Sequence[str] = SUBJECTS
) -> dict[str, dict[str, list[Document]]]:
    """By kind of `WRITTEN` and subject, what `teacher` writes about each, once: see `written_documents`."""
    found = written_documents(tokenizer, teacher, subjects, length=_WRITTEN_LENGTH, each=_WRITTEN_EACH)
    return {
        kind: {subject: [each for each in rows if each.kind == kind] for subject, rows in found.items()}
        for kind in WRITTEN
    }
