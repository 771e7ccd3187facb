"""Text of several kinds for a comparison: calibration and held-out tokens that share no document and no passage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.text.built_in import Document, deal, pack
from e3pruner.text.documents import ending, holds_documents
from e3pruner.text.files import naming
from e3pruner.text.opening import opening
from e3pruner.text.sources import SOURCES, WRITTEN, written
from e3pruner.text.splits import file_splits, take

WINDOW = 32  # tokens: what two texts share of this length is the same passage, not the same language
KindSplits = dict[str, dict[str, Tensor]]  # of each kind the splits by name


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
    tokenizer: PreTrainedTokenizerBase,
    kinds: Sequence[str],
    *,
    length: int,
    held_out: int,
    balanced: bool = True,
    unseen: Sequence[str] = (),
    teacher: PreTrainedModel | None = None,
) -> KindsOfText:
    """Text of each of `kinds`: one of `sources.SOURCES`, a file's path, or, with a `teacher`, what it writes itself,
    "prose" and "chat" (`sources.WRITTEN`). Of the kinds `unseen` there is held-out text alone.

    Documents are dealt to the splits, a file is cut in three. Of the held-out sequences, `held_out` of each kind, none
    shares `WINDOW` tokens in a row with any calibration or training sequence of any kind.

    Raises `ValueError` for a kind twice, a written one without a teacher, and where too little text is left.
    """
    splits = _splits_of(tokenizer, [*kinds, *unseen], length, teacher)
    if not kinds:
        raise ValueError("text=[] must name at least one kind")
    return _of_splits(splits, kinds, [*kinds, *unseen], held_out, balanced)


def leaving_one_out(
    tokenizer: PreTrainedTokenizerBase,
    kinds: Sequence[str],
    *,
    length: int,
    held_out: int,
    balanced: bool = True,
    teacher: PreTrainedModel | None = None,
) -> dict[str, KindsOfText]:
    """For each of `kinds`, two or more, the text of the others to calibrate and train on, and its own held out: what is
    judged there is of a kind that no step has seen. See `kinds_of_text`.
    """
    if len(kinds) < 2:
        raise ValueError(f"text={list(kinds)} must name two kinds or more for one of them to be left out")
    splits = _splits_of(tokenizer, kinds, length, teacher)
    return {
        left_out: _of_splits(splits, [kind for kind in kinds if kind != left_out], [left_out], held_out, balanced)
        for left_out in kinds
    }


def _splits_of(
    tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], length: int, teacher: PreTrainedModel | None
) -> KindSplits:
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"text={list(kinds)} must name no kind twice")
    asked = [kind for kind in kinds if kind in WRITTEN]
    if asked and teacher is None:
        raise ValueError(f"text={list(kinds)}: the teacher writes {' and '.join(asked)}, and none is given")
    of_teacher = _written_splits(tokenizer, teacher, asked, length) if asked and teacher is not None else {}
    return {kind: of_teacher.get(kind) or _splits(tokenizer, kind, length, "text:") for kind in kinds}


def _of_splits(
    splits: KindSplits, seen: Sequence[str], judged: Sequence[str], held_out: int, balanced: bool
) -> KindsOfText:
    calibration = _in_turns([splits[kind]["calibration"] for kind in seen], balanced=True)
    training = _in_turns([splits[kind]["training"] for kind in seen], balanced=balanced)
    passages = torch.cat([windows(calibration), windows(training)]).unique()
    return KindsOfText(
        calibration, training, {kind: _fresh(splits[kind]["held_out"], passages, kind, held_out) for kind in judged}
    )


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


def _splits(tokenizer: PreTrainedTokenizerBase, kind: str, length: int, option: str) -> dict[str, Tensor]:
    if kind not in SOURCES:
        path = Path(kind)
        if not path.is_file():
            raise FileNotFoundError(f"{option} {kind} is neither a file nor one of {', '.join((*SOURCES, *WRITTEN))}")
        with naming(option, path):
            if holds_documents(path):
                raise ValueError("it holds documents; plain text is read here, which this is not")
            return file_splits(tokenizer, path, length)
    documents = SOURCES[kind].documents()
    encoded = tokenizer(list(documents.values()), add_special_tokens=False, verbose=False)["input_ids"]
    rows = {
        name: [Document(name, kind, [*row, *ending(tokenizer)])] for name, row in zip(documents, encoded, strict=True)
    }
    return _dealt({name: len(text) for name, text in documents.items()}, rows, length, opening(tokenizer))


def _written_splits(
    tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel, kinds: Sequence[str], length: int
) -> KindSplits:
    """What the teacher writes; of a subject all documents, of both kinds, are in one split."""
    found, begin = written(tokenizer, teacher), opening(tokenizer)
    for kind in kinds:
        if not any(found[kind].values()):
            raise ValueError(f"text: {kind!r} needs a tokenizer with a chat template")
    return {kind: _dealt(dict.fromkeys(found[kind], 1), found[kind], length, begin) for kind in kinds}


def _dealt(
    sizes: dict[str, int], documents: Mapping[str, Sequence[Document]], length: int, begin: Sequence[int]
) -> dict[str, Tensor]:
    return {
        split: pack([each for name in names for each in documents[name]], length, begin=begin)
        for split, names in deal(sizes).items()
    }


def _in_turns(parts: Iterable[Tensor], balanced: bool) -> Tensor:
    """As many sequences of each part, in turns; what is left of the longer ones after them, unless `balanced`."""
    parts = list(parts)
    count = min(map(len, parts))
    turns = torch.stack([part[:count] for part in parts], dim=1).flatten(0, 1)
    return turns if balanced else torch.cat([turns, *(part[count:] for part in parts)])
