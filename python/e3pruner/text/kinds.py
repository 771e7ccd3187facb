"""Text of several kinds for a comparison: calibration and held-out tokens that share no document and no passage."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from e3pruner.text.built_in import Document, deal, manual_documents, pack
from e3pruner.text.documents import ending, holds_documents
from e3pruner.text.files import naming
from e3pruner.text.opening import opening
from e3pruner.text.splits import file_splits, take

WINDOW = 32  # tokens: what two texts share of this length is the same passage, not the same language
_MODULE_BYTES = 8_000, 24_000  # of a standard-library module: long enough to be text, no one too large for its split
# Folders of the library with long lists of cases, and with other people's modules.
_NO_TEXT = frozenset(("test", "tests", "idle_test", "site-packages", "lib2to3"))


@dataclass(frozen=True)
class KindsOfText:
    """Token sequences (sequences, length), int64. `calibration` and `training` take turns between the kinds, as many of
    each; unless `balanced`, what `training` has left of the longer kinds follows."""

    calibration: Tensor
    training: Tensor
    held_out: dict[str, Tensor]

    def calibration_of(self, seed: int, count: int) -> Tensor:
        """The `count` calibration sequences that `seed` draws, without replacement."""
        order = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(seed))
        return take(self.calibration[order], count, "calibration")


def kinds_of_text(
    tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], *, length: int, held_out: int, balanced: bool = True
) -> KindsOfText:
    """Text of each of `kinds`: "manual" (the Python manual), "code" (modules at the top of Python's standard library),
    "library" (those of its packages too) or a file's path.

    Documents are dealt to the splits, a file is cut in three. Of the held-out sequences, `held_out` of each kind, none
    shares `WINDOW` tokens in a row with any calibration or training sequence of any kind.

    Raises `ValueError` for a kind twice, and where too little text is left.
    """
    if len(set(kinds)) != len(kinds) or not kinds:
        raise ValueError(f"text={list(kinds)} must name at least one kind, and none twice")
    splits = {kind: _splits(tokenizer, kind, length, "text:") for kind in kinds}
    calibration = _in_turns([splits[kind]["calibration"] for kind in kinds], balanced=True)
    training = _in_turns([splits[kind]["training"] for kind in kinds], balanced=balanced)
    seen = torch.cat([windows(calibration), windows(training)]).unique()
    unseen = {}
    for kind in kinds:
        unseen[kind] = _fresh(splits[kind]["held_out"], seen, kind, held_out)
    return KindsOfText(calibration, training, unseen)


def unseen_text(
    tokenizer: PreTrainedTokenizerBase, kind: str, *, length: int, held_out: int, seen: Sequence[Tensor]
) -> Tensor:
    """`held_out` sequences of text of one of the kinds that `kinds_of_text` takes, none of which shares `WINDOW` tokens
    in a row with the sequences (N, T) `seen`. Raises `ValueError` where too little text is left."""
    passages = torch.cat([windows(sequences).flatten() for sequences in seen])
    return _fresh(_splits(tokenizer, kind, length, "--unseen")["held_out"], passages, kind, held_out)


def _fresh(sequences: Tensor, seen: Tensor, kind: str, held_out: int) -> Tensor:
    fresh = sequences[~torch.isin(windows(sequences), seen).any(1)]
    if len(fresh) < held_out:
        raise ValueError(
            f"held_out={held_out}: {kind!r} has {len(fresh)} sequences of {sequences.shape[1]} unseen tokens"
        )
    return fresh[:held_out]


def windows(sequences: Tensor) -> Tensor:
    """A hash of every run of `WINDOW` tokens within each sequence (N, runs), or of whole sequences that are shorter.

    It is a sum of products modulo 2⁶⁴: equal runs have equal hashes, others almost surely not.
    """
    width = min(WINDOW, sequences.shape[1])
    odd = torch.randint(2**62, (width,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (sequences.unfold(1, width, 1) * odd).sum(-1)


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


_BUILT_IN: dict[str, Callable[[], dict[str, str]]] = {
    "manual": manual_documents,
    "code": module_documents,
    "library": partial(module_documents, packages=True),
}


def _splits(tokenizer: PreTrainedTokenizerBase, kind: str, length: int, option: str) -> dict[str, Tensor]:
    if kind not in _BUILT_IN:
        path = Path(kind)
        if not path.is_file():
            raise FileNotFoundError(f"{option} {kind} is neither a file nor one of {', '.join(_BUILT_IN)}")
        with naming(option, path):
            if holds_documents(path):
                raise ValueError("it holds documents; plain text is read here, which this is not")
            return file_splits(tokenizer, path, length)
    documents, begin = _BUILT_IN[kind](), opening(tokenizer)
    splits = {}
    for split, names in deal({name: len(text) for name, text in documents.items()}).items():
        encoded = tokenizer([documents[name] for name in names], add_special_tokens=False, verbose=False)["input_ids"]
        rows = zip(names, encoded, strict=True)
        splits[split] = pack(
            [Document(name, kind, [*row, *ending(tokenizer)]) for name, row in rows], length, begin=begin
        )
    return splits


def _in_turns(parts: Iterable[Tensor], balanced: bool) -> Tensor:
    """As many sequences of each part, in turns; what is left of the longer ones after them, unless `balanced`."""
    parts = list(parts)
    count = min(map(len, parts))
    turns = torch.stack([part[:count] for part in parts], dim=1).flatten(0, 1)
    return turns if balanced else torch.cat([turns, *(part[count:] for part in parts)])
