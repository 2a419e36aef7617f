"""``python -m benchmarks streams``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.common.command import finish, parse_counts
from benchmarks.common.environment import cpu_name, describe, gpu_name
from benchmarks.common.null_executor import Pace
from benchmarks.serving.load import Load
from benchmarks.streams.clients import Texts
from benchmarks.streams.report import report
from benchmarks.streams.run import PATHS, measure
from saw_trtllm.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "streams",
        help="one engine under LLM, Triton and saw-serve, one after the other",
        description="Ask one engine for the same texts by way of LLM, of Triton's streams and whole answers, and of "
        "saw-serve: tokens/s, responses/s, time to the first token, and the CPU time of each process.",
    )
    parser.add_argument("--engine_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--clients", default="64,128,256", metavar="NUMBERS", help="at once (default: %(default)s)")
    parser.add_argument("--paths", default=",".join(PATHS), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--prompt_tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--output_tokens", type=int, default=512, metavar="N", help="of each text (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=2, metavar="N", help="of each client (default: %(default)s)")
    parser.add_argument(
        "--pace",
        metavar="MS,MS,MS",
        help="compute nothing, and let a step take so many milliseconds, and each of its sequences and of its prompts' "
        "tokens",
    )
    parser.add_argument(
        "--perf_analyzer",
        type=Path,
        default=Load.perf_analyzer,
        metavar="DIR",
        help="folder of the tool, or for it (default: build/perf_analyzer)",
    )
    finish(parser, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    clients = parse_counts(args.clients, "--clients")
    for name in ("prompt_tokens", "output_tokens", "requests"):
        if (number := getattr(args, name)) < 1:
            raise ConfigError(f"--{name} is {number}: it must be at least 1")
    paths = args.paths.split(",")
    if unknown := next((path for path in paths if path not in PATHS), None):
        raise ConfigError(f"--paths names {unknown!r}: the paths are {', '.join(PATHS)}")
    pace = None if args.pace is None else Pace.parse(args.pace)
    texts = Texts((), args.output_tokens, args.requests, args.perf_analyzer)
    environment = describe(command, args.commit, gpu=gpu_name(), cpu=cpu_name(), cores=os.cpu_count())
    for results in measure(args.engine_dir, texts, args.prompt_tokens, clients, paths, pace, environment):
        if args.output is not None:
            results.save(args.output)
    print(report(results).plain())
