"""Rows of tokens, what of them is text, and what is to be predicted: the one form that all measurements run on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from e3pruner.storage import fingerprint
from e3pruner.text.extras import Extras, joined_extras

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Sequences:
    """N rows of S tokens, `input_ids` (N, S) int64.

    `position_ids` (N, S): of documents packed into rows, each token's position in its document, by which attention
    tells the documents apart. `labels` (N, S − 1): the token to predict at each position but the last, or `IGNORED`;
    None: every token but the first of each row. `attention_mask` (N, S): 1 for tokens, 0 for padding, which is neither
    predicted nor counted; None: there is none. `extras`: images and what else the rows hold beside tokens.

    Raises ValueError if the shapes do not fit, for padding or extras beside `position_ids`, and for a row with nothing
    to predict.
    """

    input_ids: Tensor
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    extras: Extras | None = None

    def __post_init__(self) -> None:
        rows, length = self.input_ids.shape
        shapes = {"position_ids": (rows, length), "labels": (rows, length - 1), "attention_mask": (rows, length)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; input_ids ask for {shape}")
        if self.position_ids is not None and self.attention_mask is not None:
            raise ValueError("position_ids of packed documents stand beside padding; pack without it, or leave one out")
        if self.position_ids is not None and self.extras is not None:
            held = ", ".join(self.extras.inputs)
            raise ValueError(f"position_ids of packed documents stand beside {held}; give each document a row")
        if not self.plain and not (some := (self.targets != IGNORED).any(-1)).all():
            raise ValueError(f"labels: row {int(some.int().argmin())} has nothing to predict; leave it out")

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Sequences:
        """The sequences with these numbers."""
        return replace(self, **{name: value[rows] for name, value in self._held()})

    @property
    def shape(self) -> torch.Size:
        """(N, S)."""
        return self.input_ids.shape

    @property
    def plain(self) -> bool:
        """Whether every token but the first of each row is to be predicted from all those before it."""
        return self.labels is None and self.attention_mask is None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a model's forward pass."""
        own = {name: value for name, value in self._held() if isinstance(value, Tensor) and name != "labels"}
        return own if self.extras is None else own | self.extras.inputs

    @property
    def with_extras(self) -> dict[str, Tensor] | None:
        """The arguments of a forward pass over the first row, if the rows have extras."""
        return None if self.extras is None else self[:1].inputs

    @property
    def targets(self) -> Tensor:
        """The token to predict at each position but the last, or `IGNORED`: (N, S − 1)."""
        labels = self.input_ids[:, 1:] if self.labels is None else self.labels
        if self.attention_mask is None:
            return labels
        return labels.masked_fill(beside_padding(self.attention_mask), IGNORED)

    @property
    def predicted(self) -> Tensor:
        """The tokens to predict, one after another: (count,)."""
        targets = self.targets.flatten()
        return targets if self.plain else targets[targets != IGNORED]

    @property
    def counted(self) -> Tensor:
        """The positions whose predictions count where no label is needed: (N, S), bool.

        They are those that predict a token of `labels`; without labels all that are no padding, the last included.
        """
        if self.labels is not None:
            last = torch.zeros_like(self.input_ids[:, :1], dtype=torch.bool)
            return torch.cat([self.targets != IGNORED, last], dim=1)
        return self.text

    @property
    def text(self) -> Tensor:
        """The positions that are no padding: (N, S), bool."""
        return torch.ones_like(self.input_ids) == 1 if self.attention_mask is None else self.attention_mask == 1

    @property
    def seen(self) -> Tensor:
        """How many tokens of its document each position sees, itself included: (N, S)."""
        return self.text.cumsum(-1) if self.position_ids is None else self.position_ids + 1

    def at_counted(self, values: Tensor) -> Tensor:
        """Of `values` (N·S, ...), one for each position, those of `counted`."""
        return values if self.plain else values[self.counted.flatten()]

    def at_text(self, values: Tensor) -> Tensor:
        """Of `values` (N·S, ...), one for each position, those that are no padding."""
        return values if self.attention_mask is None else values[self.text.flatten()]

    def at_predicted(self, values: Tensor) -> Tensor:
        """Of `values` (N, S, ...), those of the positions that predict the tokens `predicted`: (count, ...)."""
        before_last = values[:, :-1].flatten(0, 1)
        return before_last if self.plain else before_last[(self.targets != IGNORED).flatten()]

    def split(self, size: int) -> Iterator[Sequences]:
        """Parts of `size` sequences, the last one perhaps smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def trimmed(self) -> Sequences:
        """Without the columns at either end in which every row has padding; all of it where there are extras."""
        if self.attention_mask is None or self.extras is not None:
            return self
        some = self.attention_mask.any(0).nonzero()
        columns = slice(int(some[0]), int(some[-1]) + 1)
        mask = self.attention_mask[:, columns]
        labels = None if self.labels is None else self.labels[:, columns.start : columns.stop - 1]
        return Sequences(self.input_ids[:, columns], None, labels, None if mask.all() else mask)

    def to(self, device: torch.device) -> Sequences:
        return replace(self, **{name: value.to(device) for name, value in self._held()})

    @property
    def identity(self) -> str:
        """A hash of all of it."""
        held: dict[str, Any] = dict(self._held())
        if self.extras is not None:
            held["extras"] = self.extras.tensors
        return fingerprint(self.input_ids if len(held) == 1 else held)

    def _held(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True, eq=False)
class Packed(Sequences):
    """Documents packed into rows: positions and labels are there. See `Sequences`."""

    position_ids: Tensor
    labels: Tensor


Rows = Tensor | Sequences
"""Rows of tokens: ids (N, S), of which all but the first of each row are to be predicted, or `Sequences`."""


def as_sequences(rows: Rows) -> Sequences:
    return rows if isinstance(rows, Sequences) else Sequences(rows)


def check_mask(name: str, mask: Tensor) -> None:
    """Raises ValueError naming `name` for an attention mask that holds anything but 0 and 1."""
    if not (fit := (mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name} holds {mask[~fit][0].item()}; it is 1 for tokens and 0 for padding")


def beside_padding(attention_mask: Tensor) -> Tensor:
    """Where a position, or the token that it predicts, is padding: (N, S − 1), bool, for a mask (N, S)."""
    return (attention_mask[:, :-1] == 0) | (attention_mask[:, 1:] == 0)


def joined(parts: list[Sequences]) -> Sequences:
    """All of `parts` as one; narrower ones are padded on the right."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[1] for part in parts)

    def wide(columns: list[Tensor], width: int, fill: int) -> Tensor:
        return torch.cat([pad(each, (0, width - each.shape[1]), value=fill) for each in columns])

    whole: dict[str, Any] = {"input_ids": wide([part.input_ids for part in parts], width, 0)}
    if any(part.position_ids is not None for part in parts):
        alone = [torch.arange(part.shape[1]).expand(part.shape) for part in parts]
        whole["position_ids"] = wide([_or(p.position_ids, own) for p, own in zip(parts, alone, strict=True)], width, 0)
    if any(part.labels is not None for part in parts):
        whole["labels"] = wide([part.targets for part in parts], width - 1, IGNORED)
    if any(part.attention_mask is not None or part.shape[1] < width for part in parts):
        whole["attention_mask"] = wide([part.text.long() for part in parts], width, 0)
    shapes = [(len(part), part.shape[1]) for part in parts]
    return Sequences(**whole, extras=joined_extras([part.extras for part in parts], shapes))


def _or(given: Tensor | None, default: Tensor) -> Tensor:
    return default if given is None else given
