"""How every sub-command ends: exit codes, one-line errors, and what an interrupt leaves behind."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

OK, FAILURE, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM

# What the library raises for an argument, a file or a model that it cannot take; anything else failed while running.
USAGE_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


def error_line(error: BaseException) -> str:
    """The error as one line; the type is named where the message alone would not tell."""
    message = " ".join(str(error).split())
    speaks = isinstance(error, (*USAGE_ERRORS, OSError)) and message
    return message if speaks else f"{type(error).__name__}: {message}".rstrip(": ")


def name_of(ctx: Any) -> str:
    """The command as it is typed: "e3 search", "e3 profile model"."""
    outer = ctx.parent.info_name if ctx.parent.parent is not None else None
    return " ".join(filter(None, ("e3", outer, ctx.info_name)))


def command_line() -> str:
    """This call, as it can be repeated."""
    return shlex.join(["e3", *sys.argv[1:]])


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Inside the block SIGTERM does what Ctrl-C does, which a training puts off until its state is saved.

    Yields the list of those that came. Signals reach the main thread only: elsewhere nothing changes.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler = signal.getsignal(signal.SIGINT)
        # A shell has what it runs in the background ignore Ctrl-C; SIGTERM is meant all the same.
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_finite(params: dict[str, Any]) -> None:
    """Raises ValueError naming an option whose value is no finite number."""
    for name, value in params.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be a finite number")


class Command(TyperCommand):
    """A sub-command whose failure is one line on stderr and an exit code; `E3_DEBUG=1` lets the traceback through."""

    def invoke(self, ctx: Any) -> Any:
        came: list[int] = []
        try:
            check_finite(ctx.params)
            with terminable() as came:
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter):  # Typer prints wrong usage itself
            raise
        except KeyboardInterrupt:
            stderr.print(f"[bold]{name_of(ctx)}[/]: {'terminated' if came else 'interrupted'}")
            raise typer.Exit(TERMINATED if came else INTERRUPTED) from None
        except Exception as error:
            if os.environ.get("E3_DEBUG") == "1":
                raise
            stderr.print(f"[bold red]{name_of(ctx)}: error:[/] ", end="")
            stderr.print(error_line(error), markup=False)
            usage = isinstance(error, USAGE_ERRORS)
            if not usage:
                stderr.print("E3_DEBUG=1 shows the traceback", style="dim")
            raise typer.Exit(USAGE if usage else FAILURE) from None
