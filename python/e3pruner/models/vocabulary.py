"""Which columns of output heads count: checkpoints pad their vocabularies, one model more than another."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase


def tokenizer_size(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """One more than the highest id of a token, added ones included; None without a tokenizer."""
    return None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1


def common_vocabulary(
    sizes: Mapping[str, int], vocabulary: int | None, tokens: int | None, *, joint: str = ", "
) -> int:
    """How many columns, from the first on, count of output heads that have `sizes` of them, by the model's name.

    `vocabulary` if it is given. Else all, where the sizes are equal; where they are not, the least, if the `tokens` of
    the tokenizer that the models share prove that no token needs more.

    Raises ValueError naming what is missing, or what does not fit; `joint` stands between the models in it.
    """
    least = min(sizes.values())
    (first, size), *others = sizes.items()
    named = joint.join([f"{first} has a vocabulary of {size} tokens", *(f"{name} one of {n}" for name, n in others)])
    if vocabulary is not None:
        if not 1 <= vocabulary <= least:
            raise ValueError(f"vocabulary={vocabulary} must be in 1 … {least}: {named}")
        return vocabulary
    if len(set(sizes.values())) > 1:
        if tokens is None:
            raise ValueError(
                f"{named}; they must share a tokenizer, and if what one has more is padding that no token uses, give "
                "that tokenizer, which proves it, or vocabulary=, the number of columns to compare"
            )
        if tokens > least:
            raise ValueError(
                f"{named}, and the tokenizer's ids go up to {tokens - 1}: not all of them know all of its tokens; they "
                "need the same tokenizer"
            )
    return least
