"""Writing files and folders whole: a reader finds what was there before or what is new, however the writer ends.

What is new is written beside the old, as a *part* ``.NAME.XXXXXXXX.part``, made durable, and put in the old one's place
by one call of the kernel. The writer of a part holds its lock; a part that nobody holds was left by a writer that was
killed, and the next one removes it. Of two writers at once the last one wins, with the whole of what it wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

# From linux/fcntl.h and linux/fs.h; glibc has had the call since 2.28.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

#: Bytes of a large file after which the disk is told of them.
_PIECE = 1 << 28


@contextlib.contextmanager
def replacing_file(path: Path | str) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of ``path`` when the block ends without an exception.

    Parameters
    ----------
    path : path
        A symbolic link stays, and what it points to is replaced.

    Raises
    ------
    OSError
        If it cannot be written; what was there before stays.
    """
    path = Path(path).resolve()
    with _part(path, folder=False) as part:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)


@contextlib.contextmanager
def writing_large(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Give a function that adds bytes to a new file: they go to the disk while the next are written.

    All of them are there when the block has ended.
    """
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        syncs, pending = [], 0

        def write(data: bytes | memoryview) -> None:
            nonlocal pending
            rest = memoryview(data).cast("B")
            while rest:
                written = file.write(rest[:_PIECE])
                rest, pending = rest[written:], pending + written
                if pending >= _PIECE:
                    syncs.append(beside.submit(os.fdatasync, file.fileno()))
                    pending = 0

        yield write
        for sync in [*syncs, beside.submit(os.fdatasync, file.fileno())]:
            sync.result()


@contextlib.contextmanager
def replacing_folder(folder: Path | str, owned: Sequence[str]) -> Iterator[Path]:
    """Give an empty folder to fill, whose files take the place of those in ``folder`` when the block ends well.

    The two folders are exchanged by one call where the kernel can: no moment shows some files of either. It cannot
    exchange a mount point, in a parent that is not ours to write, or on a file system without ``RENAME_EXCHANGE``, and
    it must not exchange the current directory under a shell. There the files are moved one by one, with the first of
    ``owned`` taken away before and put back last: an interruption then leaves a folder without it.

    Parameters
    ----------
    folder : path
        Made if it is not there. A symbolic link stays, and the folder that it points to is replaced.
    owned : sequence of str
        Patterns of the names that are replaced, first the one whose presence makes the others count. All else in the
        folder stays.

    Raises
    ------
    OSError
        If it cannot be written; what was there before stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    beside = not (os.path.ismount(folder) or _holds_cwd(folder)) and os.access(folder.parent, os.W_OK)
    with _part(folder if beside else folder / folder.name, folder=True) as part:
        yield part
        for path in part.iterdir():
            _sync(path)
        _sync(part)
        with _locked(folder):
            if not (beside and _exchange(part, folder, owned)):
                log.info("%s cannot be exchanged as a whole: its files are replaced one by one", folder)
                _move_files(part, folder, owned)
            _sync(folder.parent)
            if beside and part.is_dir():
                shutil.rmtree(part, ignore_errors=True)  # the old folder, while its lock is held


def _exchange(part: Path, folder: Path, owned: Sequence[str]) -> bool:
    """Whether ``part`` and ``folder`` have changed places, with all in ``folder`` that is not ``owned`` in both."""
    try:
        carried = [p for p in folder.iterdir() if not _is_owned(p.name, owned)]
        for path in carried:
            if path.is_dir() and not path.is_symlink():
                # Hard links: no byte is copied, and who writes to the old file writes to the new one.
                shutil.copytree(path, part / path.name, symlinks=True, copy_function=os.link)
            else:
                os.link(path, part / path.name, follow_symlinks=False)
        part.chmod(folder.stat().st_mode & 0o7777)
        for where, folders, _ in os.walk(part):
            for name in folders:
                _sync(Path(where, name))
        _sync(part)
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another file system below, files that may not be linked, or another libc
        return False
    return renameat2(_AT_FDCWD, os.fsencode(part), _AT_FDCWD, os.fsencode(folder), _RENAME_EXCHANGE) == 0


def _move_files(part: Path, folder: Path, owned: Sequence[str]) -> None:
    def named(where: Path, patterns: Sequence[str]) -> list[Path]:
        return [path for path in where.iterdir() if _is_owned(path.name, patterns)]

    for patterns in (owned[:1], owned[1:]):
        for path in named(folder, patterns):
            path.unlink()
        _sync(folder)
    for patterns in (owned[1:], owned[:1]):
        for path in named(part, patterns):
            path.replace(folder / path.name)
        _sync(folder)


def _is_owned(name: str, owned: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in owned)


def _holds_cwd(folder: Path) -> bool:
    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        return False
    return folder == cwd or folder in cwd.parents


@contextlib.contextmanager
def _part(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new and locked file or folder beside ``path``, gone when the block ends unless it was put elsewhere."""
    _remove_leftovers(path)
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        part.mkdir() if folder else part.touch(exist_ok=False)
        # Another writer may have taken it for a leftover before it was locked.
        with contextlib.suppress(FileNotFoundError):
            descriptor = _lock(part)
            break
    try:
        yield part
    finally:
        _remove(part)
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    for part in path.parent.iterdir():
        if not (part.name.startswith(f".{path.name}.") and part.name.endswith(".part")):
            continue
        with contextlib.suppress(OSError):  # it is another writer's, or not ours to remove
            descriptor = _lock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(part)
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder that is at this path now."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, how: int = fcntl.LOCK_EX) -> int:
    """Lock what is at a path, and return the descriptor that holds the lock until it is closed.

    Some network file systems lock no folders: there a writer goes on without, and removes nothing that others left.
    """
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, how)
            except OSError:
                if how & fcntl.LOCK_NB:
                    raise
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
