"""Looking at paths that a user gave: what cannot be looked at or read is said in one sentence.

``pathlib``'s own ``is_dir`` and ``is_file`` let a PermissionError through, and take a pipe, whose reader waits for
ever, for something that exists.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saw_trtllm.errors import ConfigError

#: Bytes that are copied at a time.
_COPIED = 1 << 20

_LFS_POINTER = b"version https://git-lfs."


def is_folder(path: Path, error: type[Exception] = ConfigError) -> bool:
    """Whether a folder is at ``path``; raise ``error`` if that cannot be told."""
    status = _status(path, error)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_file(path: Path, error: type[Exception] = ConfigError) -> bool:
    """Whether a regular file is at ``path``, or where its link leads.

    Raises
    ------
    error
        If that cannot be told, the file may not be read, or something else is there: a folder, a pipe, a device.
    """
    status = _status(path, error)
    if status is None:
        return False
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise error(f"{path} is {what}, but a regular file is needed: put the file itself in its place")
    if not os.access(path, os.R_OK):
        raise error(f"{path} may not be read by this user: ask its owner for the right to read it")
    return True


def reject_lfs_pointer(path: Path, error: type[Exception]) -> None:
    """Raise ``error`` if the file is what Git leaves in a file's place where Git LFS is not installed."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError:  # whoever asks has found that out, and says so
        return
    if start == _LFS_POINTER:
        raise error(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder, or download it")


@contextlib.contextmanager
def reading(path: Path | str, error: type[Exception] = ConfigError) -> Iterator[None]:
    """Raise ``error`` where a file fails while it is read: who writes another meanwhile would say that of its own."""
    try:
        yield
    except OSError as e:
        raise error(f"{path} cannot be read ({e.strerror or e}): put a whole copy in its place") from e


def copy_file(source: Path, target: Path, error: type[Exception] = ConfigError) -> None:
    """Copy a file's bytes; raise ``error`` if it cannot be read, and OSError if the copy cannot be written."""
    with reading(source, error):
        file = source.open("rb")
    with file, target.open("wb") as copy:
        while True:
            with reading(source, error):
                piece = file.read(_COPIED)
            if not piece:
                return
            copy.write(piece)


def _status(path: Path, error: type[Exception]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise error(f"{path} may not be looked at by this user: ask its owner for the right to read it") from None
    except (OSError, ValueError) as e:  # a loop of links, a name too long, or with a null byte
        raise error(f"{path} is no path that can be used ({getattr(e, 'strerror', None) or e}): give another") from None


#: Far deeper than any config, and what JSON and pydantic can write again.
_MAX_NESTING = 64


def read_json(path: Path, error: type[Exception] = ConfigError) -> dict[str, Any]:
    """Read a JSON object, compressed if the name ends in ``.gz``, or raise ``error`` in one sentence."""
    if not is_file(path, error):
        raise error(f"{path} does not exist")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is JSON and no text: it cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
        reject_lfs_pointer(path, error)
        # The interpreter's limit on digits comes as a plain ValueError, with advice for programmers.
        why = "a number has thousands of digits" if type(e) is ValueError else e
        raise error(f"{path} cannot be read as JSON: {why}") from e
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not a JSON object")
    if _nested_deeper(value, _MAX_NESTING):
        raise error(f"{path} cannot be read: its values are nested deeper than {_MAX_NESTING} levels")
    return value


def _nested_deeper(value: dict[str, Any], depth: int) -> bool:
    level: list[Any] = [value]
    for _ in range(depth):
        nested = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in nested for v in values if isinstance(v, dict | list)]
        if not level:
            return False
    return True
