"""What the commands of ``python -m benchmarks`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.record import check_writable
from saw_trtllm.cli.common import add_log_level
from saw_trtllm.errors import ConfigError

#: What a command does with its flags and with the line as it was typed.
Run = Callable[[argparse.Namespace, str], None]


def finish(parser: argparse.ArgumentParser, run: Run) -> None:
    """Add the flags that every measuring command has, and what it runs once its record may be written."""

    def checked(args: argparse.Namespace, command: str) -> None:
        if args.output is not None:
            check_writable(args.output)
        run(args, command)

    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write the record to")
    parser.add_argument("--commit", metavar="HASH", help="what is measured, where there is no git repository to say it")
    add_log_level(parser)
    parser.set_defaults(run=checked)


def parse_counts(text: str, flag: str) -> list[int]:
    """Numbers from 1 on, separated by commas.

    Raises
    ------
    ConfigError
        If one is none.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"{flag} is {text!r}: give numbers from 1 on, separated by commas")
    return list(map(int, words))
