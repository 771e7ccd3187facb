"""Result folders: OUT appears when it is complete; until then the work lies in OUT.partial and can be resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from e3pruner.pipelines.settings import FILES, read_settings, read_yaml
from e3pruner.storage import locked, read_json, remove_temporaries, replacing_file, share

CONFIG_FILE = "e3.yaml"
# What a run writes before it has measured anything.
_NO_WORK = {CONFIG_FILE, "manifest.json"}
_NO_WORK_FOLDER = "tensorboard"
_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def output_folder(
    out: str | Path, settings: Mapping[str, Any], *, force: bool = False, command: str = "e3 run"
) -> Iterator[Path]:
    """Gives the folder to work in, which becomes `out` when the block ends well. A symbolic link is followed.

    A run that was cut short is taken up again when its `settings`, YAML values kept in `CONFIG_FILE` for `command`, are
    the same; one that has nothing to show yet leaves nothing behind. Meanwhile the folder is locked.

    Raises, before anything is written, FileExistsError when another process works at `out`, when `out` is a mount point
    or holds something and `force` is not set, or, with `force`, anything that no earlier run wrote; ValueError when the
    unfinished run beside it had other settings and `force` is not set. At the end FileExistsError when `out` then holds
    something new: the result stays whole in the folder that was worked in.
    """
    out = Path(os.path.realpath(out))
    if os.path.ismount(out):
        raise FileExistsError(f"--out {out} is a mount point, whose place no result can take; name a folder in it")
    partial = out.with_name(out.name + ".partial")
    with locked(out):
        check_free(out, force)
        check_resumable(partial, settings, force)
        partial.mkdir(exist_ok=True)
        save_settings(partial, settings, (), command)
        try:
            yield partial
        except BaseException as error:
            if not holds_work(partial):
                shutil.rmtree(partial)
            elif isinstance(error, KeyboardInterrupt):
                _stderr.print(f"What is done is kept in {partial}; the same command goes on from there.")
            raise
        save_settings(partial, settings, files_of(partial), command)
        share(partial)
        replace_folder(partial, out, force)


def check_free(out: Path, force: bool) -> None:
    """Raises FileExistsError unless `out` is not there, empty, or with `force` holds only what a run wrote."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise FileExistsError(f"--out {out} exists; name another folder, or replace it with --force")
    written = written_files(out)
    ours = {*written, *(parent.as_posix() for name in written for parent in Path(name).parents)}
    if foreign := sorted(
        name for name in (path.relative_to(out).as_posix() for path in out.rglob("*")) if name not in ours
    ):
        raise FileExistsError(
            f"--out {out} holds {foreign[0]}, which e3 did not write and --force does not delete; move it away"
        )


def written_files(out: Path) -> list[str]:
    """The files that the run which made `out` wrote there. Raises FileExistsError where no run says so."""
    values = read_yaml(out / CONFIG_FILE) if (out / CONFIG_FILE).is_file() else {}
    if not isinstance(values.get(FILES), list):
        raise FileExistsError(
            f"--out {out} holds no {CONFIG_FILE} that lists its files, so e3 did not make it and --force does not "
            "delete it"
        )
    return [str(name) for name in values[FILES]]


def files_of(folder: Path) -> list[str]:
    """All files in `folder`, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def add_files(folder: Path, names: Collection[str]) -> None:
    """Notes in a finished result that e3 wrote `names` there, too; elsewhere it notes nothing."""
    if not (folder / CONFIG_FILE).is_file():
        return
    values = read_yaml(folder / CONFIG_FILE)
    head = (folder / CONFIG_FILE).read_text(encoding="utf-8").partition("\n")[0]
    write_settings(folder, values | {FILES: sorted({*values.get(FILES, []), *names})}, head)


def save_settings(folder: Path, settings: Mapping[str, Any], files: Iterable[str], command: str) -> None:
    """Writes the settings to `folder`, ready for `--config`, and the files of a result that is complete."""
    about = f"# The options of this run; {command} takes them again from this file. {FILES}: what --force may delete."
    write_settings(folder, {**settings, **({FILES: list(files)} if files else {})}, about)


def write_settings(folder: Path, values: Mapping[str, Any], head: str) -> None:
    with replacing_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(f"{head}\n{yaml.safe_dump(dict(values), sort_keys=False)}", encoding="utf-8")


def holds_work(partial: Path) -> bool:
    """Whether an unfinished run has anything that it need not do again."""
    return any(not path.is_dir() and _is_work(path, path.relative_to(partial)) for path in partial.rglob("*"))


def _is_work(path: Path, name: Path) -> bool:
    if name.as_posix() in _NO_WORK or name.parts[0] == _NO_WORK_FOLDER:
        return False
    if path.suffix != ".json":
        return True
    try:
        content = read_json(path)
    except ValueError:  # who takes it up says that it is damaged
        return True
    return not isinstance(content, dict) or content.get("measured") != {}  # a search's, before its first measurement


def check_resumable(partial: Path, settings: Mapping[str, Any], force: bool) -> None:
    """Makes way where nothing can be taken up; see `output_folder` for what it raises."""
    for half in partial.glob(f".{CONFIG_FILE}.*.tmp"):  # killed before its options were whole
        half.unlink()
    if not partial.is_symlink() and (not partial.exists() or (partial.is_dir() and not any(partial.iterdir()))):
        return
    if partial.is_symlink() or not (partial / CONFIG_FILE).is_file():
        raise FileExistsError(f"{partial} exists and holds no {CONFIG_FILE}, so it is no unfinished run; move it away")
    remove_temporaries(partial)
    if not holds_work(partial):
        shutil.rmtree(partial)
        return
    earlier = read_settings(partial / CONFIG_FILE)
    changed = [name for name in sorted({*earlier, *settings} - {"out"}) if earlier.get(name) != settings.get(name)]
    if not changed:
        _stderr.print(f"Going on with the unfinished run in {partial}.")
    elif force:
        shutil.rmtree(partial)
    else:
        changes = ", ".join(f"{name} {earlier.get(name)!r} there, {settings.get(name)!r} here" for name in changed)
        raise ValueError(
            f"{partial} holds an unfinished run with other options ({changes}); repeat them, or use --force"
        )


def replace_folder(partial: Path, out: Path, force: bool) -> None:
    """Renames `partial` to `out`, from which only what an earlier run wrote is deleted first."""
    try:
        check_free(out, force)
        if out.exists():
            remove_result(out)
        partial.rename(out)
    except OSError as error:
        raise FileExistsError(f"{error}. The new result is whole in {partial}") from error


def remove_result(out: Path) -> None:
    """Deletes the files that a run wrote, then the folders that are left empty: nothing else."""
    if any(out.iterdir()):
        for name in sorted(written_files(out), key=lambda name: name == CONFIG_FILE):  # the list itself last
            (out / name).unlink(missing_ok=True)
    for folder in sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()
    out.rmdir()
