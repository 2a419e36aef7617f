"""What the commands share: flags from a model's fields, logging, tables, exit codes."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError

from saw_trtllm.errors import ConfigError, SawError, first_error
from saw_trtllm.parallel.config import ParallelConfig

LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug")
_PYTHON_LEVELS = {"internal_error": "critical", "verbose": "debug"}

M = TypeVar("M", bound=BaseModel)


def add_log_level(parser: argparse.ArgumentParser, default: str = "warning") -> None:
    """Add ``--log_level`` with TensorRT-LLM's level names."""
    parser.add_argument("--log_level", choices=LOG_LEVELS, default=default, help="what to log to stderr")


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the commands that open an engine."""
    parser.add_argument("--no_verify", action="store_true", help="open the engine without checking its checksums")


def add_parallel(parser: argparse.ArgumentParser, server: bool = True) -> None:
    """Add the flags of the commands that open an engine which may be split over ranks."""
    group = parser.add_argument_group("engines of saw-build --tp_size")
    group.add_argument(
        "--ranks",
        choices=("ray", "processes"),
        default=ParallelConfig.ranks,
        help="who starts the ranks: Ray, joined at RAY_ADDRESS or started here, or plain processes of this machine "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--step_timeout",
        type=float,
        default=ParallelConfig.step_timeout,
        metavar="SECONDS",
        help="a rank that has not answered a step by then counts as lost (default: %(default)s)",
    )
    if server:
        group.add_argument(
            "--retry",
            type=int,
            default=0,
            metavar="N",
            help="how often a request is computed once more when a rank that computed it is lost; 0 answers it with an "
            "error",
        )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """The flags of :func:`add_parallel`, but for ``--retry``."""
    return ParallelConfig(ranks=args.ranks, step_timeout=args.step_timeout)


def set_log_level(name: str) -> None:
    """Log to stderr at one of TensorRT-LLM's level names."""
    level = _PYTHON_LEVELS.get(name, name).upper()
    logging.basicConfig(level=level, format="[%(levelname)s] %(message)s", stream=sys.stderr, force=True)


def add_fields(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, model: type[BaseModel], only: Sequence[str] | None = None
) -> None:
    """Add a flag for each field of a pydantic model, with its type, choices, default and description."""
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        kind, choices = _kind(field.annotation)
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=field.description)
            continue
        required = field.is_required()
        default = None if required else field.default
        shown = "" if default in (None, "") else " (default: %(default)s)"
        metavar = None if choices else name.rsplit("_", 1)[-1].upper() if kind is Path else "N" if kind is int else None
        text = str(field.description).replace("%", "%%") + shown
        parser.add_argument(
            f"--{name}", type=kind, choices=choices, default=default, required=required, metavar=metavar, help=text
        )


class TierOptions(BaseModel):
    """The flags of what outlives the KV cache's own blocks."""

    host_cache_size: int = Field(0, ge=0, description="bytes of host memory for blocks that leave the KV cache")
    disk_cache_dir: Path | None = Field(
        None, description="folder for blocks that outlive the process, by way of the host's: users' texts are in it"
    )
    disk_cache_size: int = Field(0, ge=0, description="bytes that its files may have")
    deterministic: bool = Field(
        False, description="let no text depend on what is in the cache: less of it is reused then"
    )


def parse_fields(args: argparse.Namespace, model: type[M]) -> M:
    """The flags of :func:`add_fields` as the model."""
    try:
        return model(**{name: getattr(args, name) for name in model.model_fields})
    except ValidationError as e:
        raise ConfigError(first_error(e)) from e


def print_table(rows: dict[str, Any]) -> None:
    """Print results as aligned lines of name and value."""
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name:<{width}}{value}")


def print_columns(header: list[str], rows: list[list[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def format_bytes(count: float) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def run(command: Callable[[], int | None]) -> int:
    """Run a command's body: 0 when it is well, 2 with one sentence on stderr for a user's mistake, 130 on Ctrl-C.

    A reader that has closed our output, as ``| head`` does, has seen enough: that is well too.
    """
    _open_streams()
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except SawError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _give_up_stdout()
        return 0
    except OSError as e:
        if e.errno not in _FULL:
            raise
        _give_up_stdout()
        print(f"error: the output cannot be written ({e.strerror}): make room, or write it elsewhere", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


#: How the medium of an output fails.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _open_streams() -> None:
    """See to it that there are standard streams, and that no character ends the command.

    What is opened in the place of one that was closed would get what C libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
    # Of a terminal that is not UTF-8, say; tests have streams of their own.
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper) and sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")


def _give_up_stdout() -> None:
    """Let nobody write to it any more: the interpreter flushes once more at its end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _kind(annotation: Any) -> tuple[type, list[str] | None]:
    """A field's Python type and its choices, looking through Optional and Literal."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_kind(a) for a in get_args(annotation) if a is not type(None)]
        choices = [c for _, cs in parts for c in cs or ()]
        return parts[0][0], choices or None
    if get_origin(annotation) is Literal:
        return str, list(get_args(annotation))
    return annotation, None
