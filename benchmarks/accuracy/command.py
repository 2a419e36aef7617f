"""``python -m benchmarks accuracy``."""

from __future__ import annotations

import argparse
import os

from benchmarks.accuracy.record import AccuracyResults
from benchmarks.common.command import finish
from benchmarks.common.record import check_writable
from saw_trtllm.errors import BackendUnavailableError, ConfigError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    accuracy = commands.add_parser(
        "accuracy",
        help="perplexity and divergence of 4-bit caches on the example model",
        description="Measure every cache on the example model and on variants of it with planted outliers, on any CPU: "
        "half an hour on two cores.",
    )
    accuracy.add_argument(
        "--models",
        metavar="NAMES",
        help="comma-separated: others keep the numbers that --output's file has (default: all)",
    )
    accuracy.add_argument(
        "--max_tokens",
        type=int,
        default=32768,
        metavar="N",
        help="held-out tokens, a multiple of 2048 (default: %(default)s)",
    )
    finish(accuracy, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    if args.output is not None:
        check_writable(args.output)
    try:
        from benchmarks.accuracy.run import MODELS, run_accuracy
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(
            f"the accuracy benchmark needs {e.name}, which is not installed: pip install 'saw-trtllm[eval]'"
        ) from e
    from benchmarks.accuracy.report import report

    names = list(MODELS) if args.models is None else args.models.split(",")
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"--models names {name!r}: choose among {', '.join(MODELS)}")
    there = args.output is not None and os.path.exists(args.output)
    previous = AccuracyResults.load(args.output) if there else None
    for results in run_accuracy(names, args.max_tokens, command, args.commit, previous):
        if args.output is not None:
            results.save(args.output)
    print(report(results).plain())
