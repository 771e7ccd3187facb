"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

32-bit words are held in int64 tensors: a 32 x 32-bit product wraps modulo 2^64, and its halves are cut out by masks.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four pseudo-random 32-bit words (int64 tensors) for each counter; the counter's words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 32 & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = k0 + _WEYL[0] & MASK, k1 + _WEYL[1] & MASK
    return c0, c1, c2, c3


def uniform(rows: int, columns: int, seed: int, step: int, device: torch.device) -> Tensor:
    """(rows, columns) fp64 numbers strictly inside (0, 1): u = (x>>8 + 1/2)·2^-24, exact in fp64.

    Key (seed low, seed high), counter (step low, step high, row, column // 4); word j of a block serves column
    4·block + j.
    """
    row = torch.arange(rows, device=device)[:, None]
    block = torch.arange((columns + 3) // 4, device=device)[None, :]
    low, high = torch.full_like(row, step & MASK), torch.full_like(row, step >> 32 & MASK)
    words = torch.stack(philox4x32((low, high, row, block), (seed & MASK, seed >> 32 & MASK)), dim=-1)
    return ((words.flatten(1)[:, :columns] >> 8).double() + 0.5) * 2.0**-24
