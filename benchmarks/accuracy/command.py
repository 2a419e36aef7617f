"""``python -m benchmarks accuracy``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.accuracy.record import AccuracyResults
from benchmarks.common.command import finish
from saw_trtllm.errors import BackendUnavailableError, ConfigError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    accuracy = commands.add_parser(
        "accuracy",
        help="perplexity and divergence of 4-bit caches on a model",
        description="Measure every cache on a real checkpoint, or on the example model and variants of it with planted "
        "outliers: half an hour on two cores, minutes on a GPU.",
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
    accuracy.add_argument("--device", default="auto", help="cpu, cuda ...; auto takes a GPU where there is one")
    real = accuracy.add_argument_group("a real checkpoint, instead of the example model")
    real.add_argument("--model_dir", type=Path, help="Hugging Face folder")
    real.add_argument("--text", type=Path, help="UTF-8 text to measure on")
    real.add_argument("--calibration_text", type=Path, help="UTF-8 text that shares nothing with it")
    real.add_argument(
        "--max_seq_len", type=int, default=2048, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    real.add_argument(
        "--calibration_tokens", type=int, default=16384, metavar="N", help="of that text (default: %(default)s)"
    )
    real.add_argument(
        "--no_own_text", action="store_true", help="calibrate on that text alone, and on none that the model makes up"
    )
    finish(accuracy, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    try:
        from benchmarks.accuracy.real import run_real
        from benchmarks.accuracy.run import MODELS, run_accuracy
        from saw_trtllm.eval.session import choose_device
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(
            f"the accuracy benchmark needs {e.name}, which is not installed: pip install 'saw-trtllm[eval]'"
        ) from e
    from benchmarks.accuracy.report import report

    if args.model_dir is not None:
        if args.text is None or args.calibration_text is None:
            raise ConfigError("--model_dir needs two texts: give --text and --calibration_text")
        lengths = (args.max_tokens, args.max_seq_len, args.calibration_tokens)
        run = (args.device, command, args.commit, not args.no_own_text)
        results = run_real(args.model_dir, args.text, args.calibration_text, *lengths, *run)
        if args.output is not None:
            results.save(args.output)
        print(report(results).plain())
        return
    names = list(MODELS) if args.models is None else args.models.split(",")
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"--models names {name!r}: choose among {', '.join(MODELS)}")
    there = args.output is not None and os.path.exists(args.output)
    previous = AccuracyResults.load(args.output) if there else None
    for results in run_accuracy(
        names, args.max_tokens, str(choose_device(args.device)), command, args.commit, previous
    ):
        if args.output is not None:
            results.save(args.output)
    if "example" in results.models:  # what the others are compared with
        print(report(results).plain())
