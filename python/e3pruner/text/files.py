"""Text that a user names: whatever is wrong with it, the error names the option and the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(option: str, path: Path) -> Iterator[None]:
    """Errors about what `path` holds begin with `option` and `path`.

    Raises ValueError for what is no UTF-8 and for every ValueError within; FileNotFoundError, IsADirectoryError,
    PermissionError and others as they are, with the option.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option} {path} is no UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; convert it, "
            "for instance by iconv"
        ) from error
    except ValueError as error:
        said = str(error)
        raise ValueError(f"{option} {said if said.startswith(str(path)) else f'{path}: {said}'}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option} {path} does not exist") from error
    except OSError as error:
        raise type(error)(f"{option} {path} cannot be read: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """The text in `path`. Raises ValueError where there is none, and what reading does."""
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("it holds no text")
    return text
