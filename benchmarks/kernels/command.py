"""``python -m benchmarks kernels``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.command import finish
from benchmarks.kernels.cases import FLASHINFER_PEERS, PEERS, SUITES
from saw_trtllm.errors import BackendUnavailableError, ConfigError, KernelError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    kernels = commands.add_parser(
        "kernels",
        help="time the CUDA kernels on this machine's GPU",
        description="Time the CUDA kernels on this machine's GPU, beside FlashInfer, TensorRT-LLM's XQA and the "
        "SAW-INT4 paper's own kernels: cold L2, CUDA graphs, all contenders of a case in turn.",
    )
    kernels.add_argument(
        "--suite", default=",".join(SUITES), metavar="NAMES", help="comma-separated (default: %(default)s)"
    )
    kernels.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(PEERS)}; or none (default: all, without official if --official is "
        "not given)",
    )
    kernels.add_argument(
        "--official", type=Path, metavar="DIR", help="checkout that holds the paper's official Triton kernels"
    )
    kernels.add_argument("--quick", action="store_true", help="a few cases, fewer repetitions")
    finish(kernels, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    peers = _peers(args.peers, args.official)
    suites = args.suite.split(",")
    try:
        from benchmarks.kernels.suite import run_kernels
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise BackendUnavailableError(
            "the kernels' benchmark needs PyTorch with CUDA, which is not installed: see pytorch.org for a GPU's build"
        ) from e
    from benchmarks.kernels.report import report

    results = run_kernels(suites, peers, args.official, quick=args.quick, commit=args.commit, command=command)
    print(report(results).plain())
    if args.output is not None:
        results.save(args.output)
    if results.aborted:
        raise KernelError(results.aborted)


def _peers(given: str | None, official: Path | None) -> list[str]:
    if given == "none":
        return []
    names = given.split(",") if given is not None else [*FLASHINFER_PEERS, *(["official"] if official else [])]
    if "official" in names and official is None:
        raise ConfigError("--peers official needs --official DIR: a checkout that holds the paper's Triton kernels")
    return names
