"""The before/after table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from e3pruner.report import model_table, writing_table

# A pipe has no width: wide enough there that no figure is folded.
PIPE_WIDTH = 180


def print_table(results: dict[str, Any]) -> None:
    """Prints the results' models, one per row, to stdout."""
    headings, rows = model_table(results)
    console().print(rich_table(results["title"], headings, rows))
    for doubt in results.get("timing", {}).get("doubts", []):
        console().print(f"tokens/s are not reliable: {doubt}", highlight=False, markup=False)


def print_tasks(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints {model: {task: {metric: value}}}, one metric of a task a row, to stdout."""
    first = next(iter(scores.values()))
    rows = [
        [f"{task} {metric}", *(f"{found[task][metric]:.4f}" for found in scores.values())]
        for task, figures in first.items()
        for metric in figures
    ]
    console().print(rich_table("Tasks", ["task", *scores], rows))


def print_writing(results: dict[str, Any]) -> None:
    """Prints how the results' models write, one figure per row with its standard error, to stdout."""
    headings, rows = writing_table(results)
    console().print(rich_table("Writing", headings, rows))


def rich_table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column names the row and whose others are figures."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    return table


def console() -> Console:
    """Standard output, at the width of the terminal if it is one."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=PIPE_WIDTH)
