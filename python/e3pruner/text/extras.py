"""What rows of tokens hold beside them: images, sound, and what says which tokens stand for these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of patches that all images of a batch have in one tensor: the tensors of each image's (frames,) rows and columns.
_GRIDS = {"pixel_values": ("image_grid_thw", "image_grid_hw"), "pixel_values_videos": ("video_grid_thw",)}
# Texts of their own, for a part that reads an image by a question; as wide as the row by chance alone.
_OTHER_TEXT = "qformer_"

PerRow = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Extras:
    """`per_token`: name: (N, S, …), a value for every token. `per_row`: of each of the N rows, name: (count, …), so
    many images, patches or frames as the row has; a row may lack what another has.
    """

    per_token: Mapping[str, Tensor]
    per_row: tuple[PerRow, ...]

    @staticmethod
    def of_batch(values: Mapping[str, Tensor], rows: int, width: int) -> Extras:
        """Of what a batch of `rows` · `width` tokens holds, all rows together, what belongs to each row.

        Raises ValueError naming the first tensor of which that is not known.
        """
        per_token = {n: v for n, v in values.items() if v.shape[:2] == (rows, width) and not n.startswith(_OTHER_TEXT)}
        split = {n: _split(n, v, rows, values) for n, v in values.items() if n not in per_token}
        return Extras(per_token, tuple({n: parts[row] for n, parts in split.items()} for row in range(rows)))

    def __getitem__(self, rows: slice | Tensor) -> Extras:
        chosen = torch.arange(len(self.per_row))[rows].tolist()
        return Extras({n: v[rows] for n, v in self.per_token.items()}, tuple(self.per_row[row] for row in chosen))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a model's forward pass. Raises ValueError for images whose tensors cannot be joined."""
        joined = {}
        for name in dict.fromkeys(name for row in self.per_row for name in row):
            parts = [row[name] for row in self.per_row if name in row]
            if len(shapes := {part.shape[1:] for part in parts}) > 1:
                raise ValueError(f"{name} has shapes {sorted(map(tuple, shapes))} in one batch: give it one row each")
            joined[name] = torch.cat(parts)
        return {**self.per_token, **joined}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, by names of their own."""
        rows = {f"{row} {name}": value for row, each in enumerate(self.per_row) for name, value in each.items()}
        return {**self.per_token, **rows}

    def to(self, device: torch.device) -> Extras:
        moved = tuple({n: v.to(device) for n, v in row.items()} for row in self.per_row)
        return Extras({n: v.to(device) for n, v in self.per_token.items()}, moved)


def joined_extras(parts: list[Extras | None], shapes: list[tuple[int, int]]) -> Extras | None:
    """All of `parts` as one, of batches of `shapes` (rows, tokens); what is per token is 0 where a batch is narrower,
    or has none."""
    if not any(parts):
        return None
    width = max(tokens for _, tokens in shapes)
    own = [part or Extras({}, ({},) * rows) for part, (rows, _) in zip(parts, shapes, strict=True)]

    def wide(name: str, like: Tensor) -> Tensor:
        whole = like.new_zeros(sum(rows for rows, _ in shapes), width, *like.shape[2:])
        for part, into in zip(own, whole.split([rows for rows, _ in shapes]), strict=True):
            if name in part.per_token:
                into[:, : part.per_token[name].shape[1]] = part.per_token[name]
        return whole

    known = {name: value for part in own for name, value in part.per_token.items()}
    return Extras({n: wide(n, v) for n, v in known.items()}, tuple(row for part in own for row in part.per_row))


def _split(name: str, value: Tensor, rows: int, values: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """`value` (count, …) by row."""
    if rows == 1:
        return (value,)
    if value.dim() and len(value) == rows:
        return value.chunk(rows)
    grid = next((values[grid] for grid in _GRIDS.get(name, ()) if grid in values), None)
    if grid is not None and len(grid) == rows and int(grid.prod(-1).sum()) == len(value):
        return list(torch.split(value, grid.prod(-1).tolist()))
    raise ValueError(
        f"{name} has shape {tuple(value.shape)} for {rows} rows: which of it belongs to which row is not known; give a "
        "list of batches of one row each"
    )
