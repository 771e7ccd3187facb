"""How every sub-command ends: exit codes, one-line errors, and what an interrupt leaves behind."""

from __future__ import annotations

import os
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

# What the library raises for an argument, a file or a model that it cannot take; anything else failed while running.
USAGE_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError)


def error_line(error: BaseException) -> str:
    """The error as one line; the type is named where the message alone would not tell."""
    message = " ".join(str(error).split())
    speaks = isinstance(error, (*USAGE_ERRORS, OSError)) and message
    return message if speaks else f"{type(error).__name__}: {message}".rstrip(": ")


def name_of(ctx: Any) -> str:
    """The command as it is typed: "e3 search", "e3 profile model"."""
    outer = ctx.parent.info_name if ctx.parent.parent is not None else None
    return " ".join(filter(None, ("e3", outer, ctx.info_name)))


class Command(TyperCommand):
    """A sub-command whose failure is one line on stderr and an exit code; `E3_DEBUG=1` lets the traceback through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter):  # Typer prints wrong usage itself
            raise
        except KeyboardInterrupt:
            stderr.print(f"[bold]{name_of(ctx)}[/]: interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if os.environ.get("E3_DEBUG") == "1":
                raise
            stderr.print(f"[bold red]{name_of(ctx)}: error:[/] ", end="")
            stderr.print(error_line(error), markup=False)
            usage = isinstance(error, USAGE_ERRORS)
            if not usage:
                stderr.print("E3_DEBUG=1 shows the traceback", style="dim")
            raise typer.Exit(USAGE if usage else FAILURE) from None
