"""Which columns of output heads count: checkpoints pad their vocabularies, one model more than another."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase


def tokenizer_size(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """One more than the highest id of a token, added ones included; None without a tokenizer."""
    return None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1


def common_vocabulary(sizes: Mapping[str, int], vocabulary: int | None, tokens: int | None) -> int:
    """How many columns, from the first on, count of output heads that have `sizes` of them, by the model's name.

    `vocabulary` if it is given. Else all, where the sizes are equal; where they are not, the least, if the `tokens` of
    the tokenizer that the models share prove that no token needs more.

    Raises ValueError naming what is missing, or what does not fit.
    """
    least = min(sizes.values())
    named = ", ".join(f"{name} has {size}" for name, size in sizes.items())
    if vocabulary is not None:
        if not 1 <= vocabulary <= least:
            raise ValueError(
                f"vocabulary={vocabulary} must be in 1 … {least}, for the columns that models have: {named}"
            )
        return vocabulary
    if len(set(sizes.values())) > 1:
        if tokens is None:
            raise ValueError(
                f"the vocabularies differ in size: {named}; if what one has more is padding that no token uses, give "
                "the tokenizer that they share, which proves it, or vocabulary=, the number of columns to compare"
            )
        if tokens > least:
            raise ValueError(
                f"the vocabularies differ in size: {named}, and the tokenizer's ids go up to {tokens - 1}: not all "
                "models know all of its tokens; they need the same tokenizer"
            )
    return least
