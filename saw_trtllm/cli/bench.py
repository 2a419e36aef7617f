"""``saw-bench``: how fast the kernels are, beside their peers."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from saw_trtllm.bench.cases import PEERS, SUITES
from saw_trtllm.bench.record import Results, check_writable
from saw_trtllm.cli.common import add_log_level, run, set_log_level
from saw_trtllm.errors import BackendUnavailableError, ConfigError, KernelError

_EXAMPLES = """\
examples:
  saw-bench kernels --official sglang-fork --output benchmarks/results/h200.json
  saw-bench kernels --suite decode --peers none --quick
  saw-bench plot benchmarks/results/h200.json --output docs
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-bench", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser(
        "kernels",
        help="time the CUDA kernels on this machine's GPU",
        description="Time the CUDA kernels on this machine's GPU, beside FlashInfer and the SAW-INT4 paper's own "
        "kernels: cold L2, CUDA graphs, all contenders of a case in turn.",
    )
    kernels.add_argument(
        "--suite", default=",".join(SUITES), metavar="NAMES", help="comma-separated (default: %(default)s)"
    )
    kernels.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(PEERS)}; or none (default: flashinfer, and official if --official is "
        "given)",
    )
    kernels.add_argument(
        "--official", type=Path, metavar="DIR", help="checkout that holds the paper's official Triton kernels"
    )
    kernels.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write the record to")
    kernels.add_argument("--quick", action="store_true", help="a few cases, fewer repetitions")
    kernels.add_argument(
        "--commit", metavar="HASH", help="what is measured, where there is no git repository to say it"
    )
    add_log_level(kernels)
    plot = commands.add_parser(
        "plot",
        help="draw plots and tables from a record",
        description="Draw plots/*.svg from a record and fill in the tables of benchmarks.md, in the output folder.",
    )
    plot.add_argument("results", type=Path, metavar="FILE", help="what kernels --output wrote")
    plot.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="folder (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-bench --help``."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    if args.command == "plot":
        return run(lambda: _plot(args))
    set_log_level(args.log_level)
    return run(lambda: _kernels(args, shlex.join(["saw-bench", *argv])))


def _kernels(args: argparse.Namespace, command: str) -> None:
    peers = _peers(args.peers, args.official)
    suites = args.suite.split(",")
    if args.output is not None:
        check_writable(args.output)
    try:
        from saw_trtllm.bench.kernels import run_kernels
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise BackendUnavailableError(
            "saw-bench kernels needs PyTorch with CUDA, which is not installed: see pytorch.org for the GPU's build"
        ) from e
    from saw_trtllm.bench.tables import plain

    results = run_kernels(suites, peers, args.official, quick=args.quick, commit=args.commit, command=command)
    print(plain(results))
    if args.output is not None:
        results.save(args.output)
    if results.aborted:
        raise KernelError(results.aborted)


def _peers(given: str | None, official: Path | None) -> list[str]:
    if given == "none":
        return []
    names = given.split(",") if given is not None else ["flashinfer", *(["official"] if official else [])]
    if "official" in names and official is None:
        raise ConfigError("--peers official needs --official DIR: a checkout that holds the paper's Triton kernels")
    return names


def _plot(args: argparse.Namespace) -> None:
    results = Results.load(args.results)
    from saw_trtllm.bench.plots import draw
    from saw_trtllm.bench.tables import fill_in

    if not args.output.is_dir():
        raise ConfigError(f"--output {args.output} is not a folder: give the docs folder, or make one")
    for path in draw(results, args.output / "plots"):
        print(path)
    document = args.output / "benchmarks.md"
    if document.exists():
        fill_in(document, results)
        print(document)


if __name__ == "__main__":
    sys.exit(main())
