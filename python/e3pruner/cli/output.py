"""Output folders: OUT appears when it is complete; until then the work lies in OUT.partial and can be resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
import yaml

from e3pruner.cli.command import stderr
from e3pruner.cli.config import CONFIG_FILE, resolved, save_config
from e3pruner.storage import remove_temporaries


@contextmanager
def output_folder(ctx: typer.Context, out: Path, force: bool) -> Iterator[Path]:
    """Gives the folder to work in, which becomes `out` when the block ends well.

    A run that was cut short is taken up again when its options are the same; one that has nothing to show yet leaves
    nothing behind. Raises FileExistsError, before anything is written, when `out` holds something and `force` is not
    set, or is no folder of ours (`force` deletes only what this program made); ValueError when the unfinished run
    beside it had other options and `force` is not set.
    """
    check_free(out, force)
    partial = out.with_name(out.name + ".partial")
    check_resumable(ctx, partial, force)
    partial.mkdir(parents=True, exist_ok=True)
    save_config(ctx, partial / CONFIG_FILE)
    try:
        yield partial
    except BaseException as error:
        if [path.name for path in partial.iterdir()] == [CONFIG_FILE]:
            shutil.rmtree(partial)
        elif isinstance(error, KeyboardInterrupt):
            stderr.print(f"What is done is kept in {partial}; the same command goes on from there.")
        raise
    replace_folder(partial, out)


def check_free(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise FileExistsError(f"--out {out} exists; name another folder, or replace it with --force")
    if not (out / CONFIG_FILE).is_file():
        raise FileExistsError(
            f"--out {out} holds no {CONFIG_FILE}, so e3 did not make it and --force does not delete it"
        )


def check_resumable(ctx: typer.Context, partial: Path, force: bool) -> None:
    for half in partial.glob(f".{CONFIG_FILE}.*.tmp"):  # killed before its options were whole
        half.unlink()
    if not partial.exists() or not any(partial.iterdir()):
        return
    if not (partial / CONFIG_FILE).is_file():
        raise FileExistsError(f"{partial} exists and holds no {CONFIG_FILE}, so it is no unfinished run; move it away")
    remove_temporaries(partial)
    earlier = yaml.safe_load((partial / CONFIG_FILE).read_text(encoding="utf-8"))
    now = resolved(ctx)
    changed = [name for name in sorted({*earlier, *now} - {"out"}) if earlier.get(name) != now.get(name)]
    if not changed:
        stderr.print(f"Going on with the unfinished run in {partial}.")
    elif force:
        shutil.rmtree(partial)
    else:
        changes = ", ".join(f"{name} {earlier.get(name)!r} there, {now.get(name)!r} here" for name in changed)
        raise ValueError(
            f"{partial} holds an unfinished run with other options ({changes}); repeat them, or use --force"
        )


def replace_folder(new: Path, out: Path) -> None:
    """Renames `new` to `out`; what `out` held is deleted only once the new folder stands in its place."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)
