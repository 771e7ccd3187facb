"""Files that are either whole or absent: written under a temporary name in the same folder, then renamed."""

import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from e3pruner.form import check_form


def cache_home() -> Path:
    """Where recomputable files live: E3_CACHE, else e3pruner under XDG_CACHE_HOME, else under ~/.cache."""
    if chosen := os.environ.get("E3_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e3pruner"


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A temporary path that takes the name `path` when the block ends well and vanishes when it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask, whatever the writer, as safetensors, sets
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: str | Path, of: str | None = None) -> None:
    """Deletes what writers to `folder`, or to `of` in it, left that were killed. Nobody else may be writing there."""
    for left in Path(folder).glob(".*.tmp" if of is None else f".{glob.escape(of)}.*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextmanager
def locked(path: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Inside the block no other process or thread is inside a block of the same `path`: it holds the file `path`.lock.

    The system lets go of the lock when its owner ends, however that happens, so that none is ever left behind.
    Raises FileExistsError, naming the owner's process and host, if `path` is locked and `wait` is not set.
    """
    path = Path(path)
    file = path.with_name(f"{path.name}.lock")
    created = created_parents(path)
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        owner = file.read_text(encoding="utf-8") if file.exists() else ""
        raise FileExistsError(
            f"{path} is being written by {owner or 'another process'}: wait for it, or name another"
        ) from None
    try:
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # held elsewhere, Windows does not delete it
            file.unlink()
        lock.release()
        for parent in created:
            with suppress(OSError):  # not empty: it serves
                parent.rmdir()


def share(folder: Path) -> None:
    """Gives the files in `folder` the mode that the umask gave it: safetensors makes its own for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode | path.stat().st_mode & 0o111)


def created_parents(path: Path) -> list[Path]:
    """Makes the folders that `path` lies in; those that were not there, the innermost first."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def new_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends well and vanishes when it raises.

    Raises FileExistsError at once if `path` exists, unless `force`: then the folder that is there now goes when the new
    one is whole. Also at the end, if `path` is then no longer what it was at the beginning: what others put there
    meanwhile is never deleted.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists and is never overwritten unasked: choose another folder, or force")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _content(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()  # with the mode that the umask gives, which tempfile's ignore
    try:
        yield temporary
        share(temporary)
        if _content(path) != before:
            raise FileExistsError(f"{path} was made by another process meanwhile, or changed")
        if before is not None:
            shutil.rmtree(path)
        try:
            temporary.rename(path)
        except OSError as error:
            if not path.is_dir():
                raise
            raise FileExistsError(f"{path} was made by another process meanwhile") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _content(path: Path) -> dict[str, tuple[int, int, int]] | None:
    """By what a folder is known to be as it was: number, size and time of change of each file; None: there is none."""
    if not path.exists():
        return None
    stats = {file.relative_to(path).as_posix(): file.lstat() for file in (path, *path.rglob("*")) if not file.is_dir()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def write_json(path: str | Path, content: Any) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def parse_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """Raises ValueError naming `path` for what is no JSON, and OSError if it cannot be read."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_checked(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """`content` as JSON of this `kind`, with the checksum by which `read_checked` knows that it is whole."""
    as_read = json.loads(json.dumps({"format": kind, **content}))
    write_json(path, {**as_read, "checksum": fingerprint([as_read])})


def read_checked(path: str | Path, kind: str, form: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_checked` wrote, which must have the `form` that `check_form` takes.

    Raises ValueError naming `path` if it is of another kind or anything of it has changed since.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"{path} is not of the format {kind!r}")
    checksum = content.pop("checksum", None)
    try:
        whole = checksum == fingerprint([content])
    except RecursionError:
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: its content is not that of its checksum")
    check_form(path, content, form)
    return content


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_json_lines(path: Path, form: Mapping[str, Any], otherwise: str) -> list[dict[str, Any]]:
    """The rows of a JSON lines file. Raises ValueError naming the line that is no JSON, that is, saying `otherwise`, no
    object with the keys of `form`, or that has not that form (see `check_form`).
    """
    rows, needed = [], {key for key in form if not key.endswith("?")}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line.decode())
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict) or not needed <= row.keys():
            raise ValueError(f"{path}, line {number}: {otherwise}")
        check_form(f"{path}, line {number}", row, form)
        rows.append(row)
    return rows


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`tensors` as one safetensors file. Raises OSError naming `path` if it cannot be written, as on a full disk."""
    with replacing_file(path) as temporary:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def content_digest(parts: Iterable[Mapping[str, Tensor]]) -> str:
    """A hash of every byte of named tensors, with names, dtypes and shapes, however they are divided into `parts`, of
    which one is asked for at a time: SHA-256, 1 GB/s or more on each core."""
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for part in parts:
            digests |= zip(part, threads.map(fingerprint, part.values()), strict=True)
    return fingerprint(digests)


def fingerprint(*parts: Any) -> str:
    """SHA-256, as 64 hexadecimal digits, of tensors (dtype, shape and bytes), mappings of them, and JSON values."""
    digest = hashlib.sha256()

    def update(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(part, Mapping):
            for key in sorted(part):
                update(key)
                update(part[key])
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())

    for part in parts:
        update(part)
    return digest.hexdigest()
