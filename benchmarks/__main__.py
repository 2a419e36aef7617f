"""``python -m benchmarks``: the kernels beside their peers, and engines by the format of their cache."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.common.record import check_writable
from benchmarks.engine import cases as engine_cases
from benchmarks.engine.record import EngineResults
from benchmarks.kernels.cases import PEERS, SUITES
from benchmarks.kernels.record import Results
from saw_trtllm.backends.registry import choose_backend
from saw_trtllm.cli.common import add_log_level, run, set_log_level
from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError, KernelError
from saw_trtllm.paths import is_folder, read_json

_EXAMPLES = """\
examples:
  python -m benchmarks kernels --official sglang-fork --output benchmarks/results/h200.json.gz
  python -m benchmarks kernels --suite decode --peers none --quick
  python -m benchmarks engine --output benchmarks/results/h200_engine.json.gz
  python -m benchmarks report benchmarks/results/h200.json.gz --output docs
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    _add_engine(commands)
    report = commands.add_parser(
        "report",
        help="draw plots and tables from a record",
        description="Draw plots/*.svg from a record and fill in its tables, in the output folder: those of "
        "benchmarks.md, or of engine_benchmarks.md.",
    )
    report.add_argument("results", type=Path, metavar="FILE", help="what kernels --output or engine --output wrote")
    report.add_argument(
        "--output", type=Path, default=Path("docs"), metavar="DIR", help="folder (default: %(default)s)"
    )
    return parser


def _add_engine(commands: argparse._SubParsersAction) -> None:
    engine = commands.add_parser(
        "engine",
        help="time whole decode steps of TensorRT engines by the format of their cache",
        description="Build TensorRT engines of Llama 3 8B's shape with random weights, one for each format of the "
        "cache, and time their decode steps, their parts, the whole runtime and the start.",
    )
    engine.add_argument("--kv", default=",".join(engine_cases.KVS), metavar="NAMES", help="default: %(default)s")
    engine.add_argument(
        "--num_layers",
        type=int,
        default=engine_cases.LLAMA_LAYERS,
        metavar="N",
        help="of the engines; fewer are built sooner, and the record says how many (default: %(default)s)",
    )
    engine.add_argument(
        "--vocab_size",
        type=int,
        default=engine_cases.LLAMA_VOCAB,
        metavar="N",
        help="of the engines (default: %(default)s)",
    )
    engine.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        default="float16",
        help="of the engines; bfloat16 is for TensorRT 10 and newer (default: %(default)s)",
    )
    for name, known in (("batch", engine_cases.BATCHES), ("context", engine_cases.CONTEXTS)):
        default = ",".join(map(str, known))
        engine.add_argument(f"--{name}", metavar="NUMBERS", help=f"comma-separated (default: {default})")
    engine.add_argument("--quick", action="store_true", help="a few batches and contexts")
    engine.add_argument(
        "--engine_dir",
        type=Path,
        metavar="DIR",
        help="keep the engines there, in a folder for each format, and take those that are there already, of any shape",
    )
    engine.add_argument("--build_timeout", type=float, metavar="S", help="end the run if a build takes longer")
    engine.add_argument(
        "--build_workers",
        type=int,
        default=1,
        metavar="N",
        help="engines built at once, each with its own weights in memory (default: %(default)s)",
    )
    engine.add_argument(
        "--builder_optimization_level", type=int, choices=range(6), metavar="N", help="as saw-build's, for all engines"
    )
    engine.add_argument("--multiple_profiles", choices=("enable", "disable"), help="as saw-build's")
    engine.add_argument(
        "--gemm_plugin", choices=("auto", "float16", "bfloat16", "disable"), default="auto", help="as saw-build's"
    )
    engine.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write the record to")
    engine.add_argument("--commit", metavar="HASH", help="what is measured, where there is no git repository to say it")
    add_log_level(engine)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``python -m benchmarks --help``."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    if args.command == "report":
        return run(lambda: _report(args))
    set_log_level(args.log_level)
    measure = _engine if args.command == "engine" else _kernels
    return run(lambda: measure(args, shlex.join(["python", "-m", "benchmarks", *argv])))


def _kernels(args: argparse.Namespace, command: str) -> None:
    peers = _peers(args.peers, args.official)
    suites = args.suite.split(",")
    if args.output is not None:
        check_writable(args.output)
    try:
        from benchmarks.kernels.suite import run_kernels
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise BackendUnavailableError(
            "the kernels' benchmark needs PyTorch with CUDA, which is not installed: see pytorch.org for a GPU's build"
        ) from e
    from benchmarks.kernels.report import plain

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


def _engine(args: argparse.Namespace, command: str) -> None:
    kvs = args.kv.split(",")
    for kv in kvs:
        if kv not in engine_cases.KVS:
            raise ConfigError(f"--kv names {kv!r}: choose among {', '.join(engine_cases.KVS)}")
    numbers = {}
    for name, all_of, few in (
        ("batch", engine_cases.BATCHES, engine_cases.QUICK_BATCHES),
        ("context", engine_cases.CONTEXTS, engine_cases.QUICK_CONTEXTS),
    ):
        given = getattr(args, name)
        chosen = few if args.quick else all_of
        numbers[name] = chosen if given is None else engine_cases.parse_numbers(given, all_of, f"--{name}")
    for name in ("num_layers", "vocab_size", "build_workers"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    if args.output is not None:
        check_writable(args.output)
    choose_backend("tensorrt")
    from benchmarks.engine.plan import Plan
    from benchmarks.engine.report import plain
    from benchmarks.engine.run import run_engines

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
        plan = Plan.of(
            args.engine_dir or Path(temporary),
            kvs,
            engine_cases.llama_config(args.num_layers, args.vocab_size, args.dtype),
            batches=numbers["batch"],
            contexts=numbers["context"],
            optimization_level=args.builder_optimization_level,
            decode_profile=None if args.multiple_profiles is None else args.multiple_profiles == "enable",
            gemm_plugin=args.gemm_plugin,
            build_timeout_s=args.build_timeout,
            build_workers=args.build_workers,
        )
        results = run_engines(plan, command, args.commit, args.output)
    print(plain(results))
    if results.aborted:
        raise EngineError(results.aborted)


def _report(args: argparse.Namespace) -> None:
    if not is_folder(args.output):
        raise ConfigError(f"--output {args.output} is not a folder: give the docs folder, or make one")
    raw = read_json(args.results)
    if raw.get("kind") == "engine":
        from benchmarks.engine import plots, report

        results, document = EngineResults.parse(raw, args.results), args.output / "engine_benchmarks.md"
    else:
        from benchmarks.kernels import plots, report

        results, document = Results.load(args.results), args.output / "benchmarks.md"
    for path in plots.draw(results, args.output / "plots"):
        print(path)
    if document.exists():
        report.fill_in(document, results)
        print(document)


if __name__ == "__main__":
    sys.exit(main())
