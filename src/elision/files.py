"""Files that are whole or absent: every artifact is written beside its name and moved into place."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elision.errors import InputError


def write(path: str | Path, fill: Callable[[Path], Any]) -> Path:
    """Let `fill` write a temporary neighbour of `path`, then rename it: a kill or a full disk leaves no half file."""
    path = Path(path)
    check_file(path, "file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        with disk_errors(path):
            fill(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


NO_PLACE = (errno.ENAMETOOLONG, errno.ELOOP)  # no disk has a file of such a name
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, *NO_PLACE)


@contextmanager
def disk_errors(path: str | Path | None = None) -> Iterator[None]:
    """What libraries say of the disk as the OSError that it is, of `path` where it names no file of its own.

    safetensors raises an error of its own ("... File too large (os error 27)"), tokenizers a plain Exception of the
    same words, torch.save a RuntimeError without the reason, a write to an open file an OSError without the name.
    """
    try:
        yield
    except Exception as error:
        code = _disk_error(error)
        if code is None or (isinstance(error, OSError) and (error.filename is not None or path is None)):
            raise
        raise OSError(code, os.strerror(code), None if path is None else str(path)) from error


def _disk_error(error: Exception) -> int | None:
    """The number of the system's error that `error` stands for; None: it is not of the disk."""
    if isinstance(error, OSError):
        return error.errno if error.errno in OF_THE_DISK else None
    of_rust = type(error) is Exception or type(error).__name__ == "SafetensorError"
    if of_rust and (number := re.search(r"\(os error (\d+)\)", str(error))):
        return int(number[1])
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|unexpected pos|iostream error", str(error)):
        return errno.EIO
    return None


def check_file(path: str | Path, what: str) -> None:
    """Raise InputError where `path`, which is to become a file, is a directory."""
    if Path(path).is_dir():
        raise InputError(f"{what} {path} is a directory: give the name of a file")


def check_place(path: str | Path, what: str) -> None:
    """Refuse a place that cannot be written, before any work is done for what is to stand there; leaves nothing.

    Raises:
        InputError: the nearest directory of `path` that exists does not take a file.
    """
    path = Path(path)
    folder = path
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            (path.parent / f".{path.name}.journal.12345678").lstat()  # no name beside it will be longer
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        folder = there.parent if there == path and not path.is_dir() else there
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder}: {error.strerror or error}"
        raise InputError(f"{what} {path} cannot be written ({reason}): give another place") from None


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON with stable formatting (indent 2, keys in the given order, trailing newline), atomically."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """`value` with None for every number that is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file of lines; what a kill left of the line before stays a line of its own."""
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(f"{line}\n".encode())


def whole_lines(path: str | Path) -> list[str]:
    """The lines of a file of JSON lines that are JSON; none where there is no file."""
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for line in text.split("\n") if _is_json(line)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file; `what` names it in the error ("plan", "config").

    Raises:
        InputError: the file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # edited by hand, it may begin with a mark
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{what} {path} is not a file: give the path of an existing {what}") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}): give a file that you may read") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number or a depth beyond what Python reads
        raise InputError(f"{what} {path} is not JSON ({error}): write it again") from None
