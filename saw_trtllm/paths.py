"""Looking at paths that a user gave: what cannot be looked at or read is said in one sentence.

``pathlib``'s own ``is_dir`` and ``is_file`` let a PermissionError through, and take a pipe, whose reader waits for
ever, for something that exists.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from saw_trtllm.errors import ConfigError

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
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise error(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder, or download it")


def _status(path: Path, error: type[Exception]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise error(f"{path} may not be looked at by this user: ask its owner for the right to read it") from None
    except (OSError, ValueError) as e:  # a loop of links, a name too long, or with a null byte
        raise error(f"{path} is no path that can be used ({getattr(e, 'strerror', None) or e}): give another") from None
