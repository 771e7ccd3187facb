"""What calls the model while Hugging Face's generation runs on the runtime: it sees the kept layers, or is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from e3pruner.runtime.unchanged import CallGuard


@contextmanager
def calls_go_to(view: Any, model: PreTrainedModel, holders: Iterable[Any]) -> Iterator[None]:
    """Inside the block, attributes of `holders` (logits processors, stopping criteria) that are `model` are `view`.

    What calls `model` by another way, as a closure does, raises RuntimeError: it would run all layers. Other threads
    may call it as ever.
    """
    held = [(holder, name) for holder in holders for name, value in _attributes(holder) if value is model]
    guard = model.base_model.register_forward_pre_hook(_RefuseCalls())
    try:
        for holder, name in held:
            setattr(holder, name, view)
        yield
    finally:
        guard.remove()
        for holder, name in held:
            setattr(holder, name, model)


class _RefuseCalls(CallGuard):
    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self.thread:
            raise RuntimeError(
                "the model was called while generate(custom_generate=runtime) ran: it would run all its layers. "
                "A logits processor or stopping criterion that holds it as an attribute is served; "
                "what holds it otherwise is not"
            )


def _attributes(holder: Any) -> list[tuple[str, Any]]:
    return list(getattr(holder, "__dict__", {}).items())
