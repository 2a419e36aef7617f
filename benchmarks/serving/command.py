"""``python -m benchmarks serving``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.command import finish, parse_counts
from benchmarks.common.environment import describe, gpu_name
from benchmarks.serving.load import Load, run_load
from benchmarks.serving.report import report


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    serving = commands.add_parser(
        "serving",
        help="tritonserver under NVIDIA's perf_analyzer at rising concurrency",
        description="Serve engines one after the other with tritonserver and load each with perf_analyzer, at rising "
        "concurrency. Engines of random weights take --prompt_words.",
    )
    defaults = Load()
    serving.add_argument("--engine_dir", type=Path, nargs="+", required=True, metavar="DIR")
    serving.add_argument(
        "--concurrency", default="1,2,4,8,16,32,64,128", metavar="NUMBERS", help="default: %(default)s"
    )
    serving.add_argument(
        "--output_tokens",
        type=int,
        default=defaults.output_tokens,
        metavar="N",
        help="of each text (default: %(default)s)",
    )
    serving.add_argument(
        "--prompt_words", type=int, metavar="N", help="prompts of N random words, for engines of random weights"
    )
    serving.add_argument(
        "--requests",
        type=int,
        default=defaults.requests,
        metavar="N",
        help="of each client, after its first (default: %(default)s)",
    )
    serving.add_argument("--whole", action="store_true", help="ask for texts in one piece instead of token by token")
    serving.add_argument(
        "--perf_analyzer",
        type=Path,
        default=defaults.perf_analyzer,
        metavar="DIR",
        help="folder of the tool, or for it (default: build/perf_analyzer)",
    )
    finish(serving, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    concurrency = parse_counts(args.concurrency, "--concurrency")
    load = Load(args.output_tokens, args.prompt_words, args.requests, not args.whole, args.perf_analyzer)
    environment = describe(command, args.commit, gpu=gpu_name())
    for results in run_load(args.engine_dir, load, concurrency, environment):
        if args.output is not None:
            results.save(args.output)
    print(report(results).plain())
