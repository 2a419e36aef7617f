"""What the commands of ``python -m benchmarks`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from saw_trtllm.cli.common import add_log_level

#: What a command does with its flags and with the line as it was typed.
Run = Callable[[argparse.Namespace, str], None]


def finish(parser: argparse.ArgumentParser, run: Run) -> None:
    """Add the flags that every measuring command has, and what it runs."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write the record to")
    parser.add_argument("--commit", metavar="HASH", help="what is measured, where there is no git repository to say it")
    add_log_level(parser)
    parser.set_defaults(run=run)
