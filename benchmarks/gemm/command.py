"""``python -m benchmarks gemm``."""

from __future__ import annotations

import argparse

from benchmarks.common.command import finish
from benchmarks.gemm.record import PEERS, ROWS, SHAPES
from saw_trtllm.errors import BackendUnavailableError, ConfigError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    gemm = commands.add_parser(
        "gemm",
        help="time products with weights of 4 and 8 bits on this machine's GPU",
        description="Time the products of an 8B Llama's linear layers on this machine's GPU, with weights of 4 and 8 "
        "bits, beside cuBLAS and TensorRT: launches that follow each other in a CUDA graph, weights that L2 does not "
        "hold, all contenders of a case in turn.",
    )
    gemm.add_argument("--shapes", default=",".join(SHAPES), metavar="NAMES", help="comma-separated (default: all)")
    gemm.add_argument(
        "--rows", default=",".join(map(str, ROWS)), metavar="NUMBERS", help="comma-separated (default: %(default)s)"
    )
    gemm.add_argument(
        "--peers", default=",".join(PEERS), metavar="NAMES", help="comma-separated, or none (default: %(default)s)"
    )
    finish(gemm, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    shapes, peers = args.shapes.split(","), [] if args.peers == "none" else args.peers.split(",")
    for flag, names, known in (("--shapes", shapes, SHAPES), ("--peers", peers, PEERS)):
        for name in names:
            if name not in known:
                raise ConfigError(f"{flag} names {name!r}: choose among {', '.join(known)}")
    rows = [int(n) if n.isdecimal() else 0 for n in args.rows.split(",")]
    if 0 in rows:
        raise ConfigError(f"--rows is {args.rows!r}: give numbers above 0 with commas")
    try:
        from benchmarks.gemm.run import run_gemm
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(
            f"the products' benchmark needs {e.name}, which is not installed: see pytorch.org for a GPU's build"
        ) from e
    from benchmarks.gemm.report import report

    results = run_gemm(shapes, rows, peers, command, args.commit)
    print(report(results).plain())
    if args.output is not None:
        results.save(args.output)
