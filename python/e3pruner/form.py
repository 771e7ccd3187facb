"""The form that JSON from a file must have, checked before anything reads its parts."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any


def check_form(path: Any, value: Any, form: Any) -> None:
    """Raises ValueError naming `path` and the first part of `value` that has not its `form`.

    A form is a type (`float` takes integers, `int` no booleans, `object` anything) or None for null; `[form]`, a list;
    `{str: form}`, an object with any keys; `{"key": form, "other?": form}`, an object with these keys, of which "other"
    may be missing, and perhaps more; a tuple of forms, any of them; or a function that says whether a value fits.
    """
    for misfit in _misfits(value, form, ""):
        raise ValueError(f"{path} is damaged: {misfit}")


def positive(value: Any) -> bool:
    """Whether it is an integer of 1 or more."""
    return type(value) is int and value > 0


def natural(value: Any) -> bool:
    """Whether it is an integer of 0 or more."""
    return type(value) is int and value >= 0


def _misfits(value: Any, form: Any, name: str) -> Iterator[str]:
    if isinstance(form, tuple):
        found = [list(_misfits(value, each, name)) for each in form]
        yield from found[0] if all(found) else ()
    elif isinstance(form, list) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from _misfits(item, form[0], f"{name}[{number}]")
    elif isinstance(form, dict) and isinstance(value, dict):
        expected = dict.fromkeys(value, form[str]) if str in form else form
        for key, part in expected.items():
            plain = key.removesuffix("?")
            if plain in value:
                yield from _misfits(value[plain], part, f"{name}.{plain}" if name else plain)
            elif plain == key:
                yield f"{name or 'it'} lacks {key!r}"
    elif not _fits(value, form):
        yield f"{name or 'it'} is {reprlib.repr(value)}, not {_called(form)}"


def _fits(value: Any, form: Any) -> bool:
    if form is None:
        return value is None
    if isinstance(form, type):
        kinds = (int, float) if form is float else (form,)
        return isinstance(value, kinds) and (form is object or not isinstance(value, bool) or form is bool)
    return callable(form) and form(value)


def _called(form: Any) -> str:
    if isinstance(form, (list, dict)):
        return "a list" if isinstance(form, list) else "an object"
    return "null" if form is None else str(form.__name__).replace("_", " ")
