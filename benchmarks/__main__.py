"""``python -m benchmarks``: kernels beside their peers, whole engines, what 4-bit caches cost, loaded servers."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from benchmarks.accuracy import command as accuracy
from benchmarks.accuracy.record import AccuracyResults
from benchmarks.common import report
from benchmarks.common.record import Record
from benchmarks.engine import command as engine
from benchmarks.engine.record import EngineResults
from benchmarks.gemm import command as gemm
from benchmarks.gemm.record import GemmResults
from benchmarks.goodput import command as goodput
from benchmarks.goodput.record import GoodputResults
from benchmarks.kernels import command as kernels
from benchmarks.kernels.record import Results
from benchmarks.scaling import command as scaling
from benchmarks.scaling.record import ScalingResults
from benchmarks.serving import command as serving
from benchmarks.serving.record import ServingResults
from benchmarks.streams import command as streams
from benchmarks.streams.record import StreamsResults
from benchmarks.weights import command as weights
from benchmarks.weights.record import WeightsResults
from saw_trtllm.cli.common import run, set_log_level
from saw_trtllm.errors import ConfigError
from saw_trtllm.paths import is_folder, read_json

_EXAMPLES = """\
examples:
  python -m benchmarks kernels --official sglang-fork --output benchmarks/results/kernels_h200.json
  python -m benchmarks kernels --suite decode --peers none --quick
  python -m benchmarks gemm --output benchmarks/results/gemm_h200.json
  python -m benchmarks engine --output benchmarks/results/engine_h200.json
  python -m benchmarks scaling --tp_size 1,2 --output benchmarks/results/scaling_h200.json
  python -m benchmarks accuracy --output benchmarks/results/accuracy.json
  python -m benchmarks weights --model_dir Llama-3.2-1B --quantized Llama-3.2-1B-W4A16 --text book.txt
  python -m benchmarks serving --engine_dir engine_fp16 engine_saw_int4 --output load.json
  python -m benchmarks goodput --engine_dir engine_fp16 engine_saw_int4 --output goodput.json
  python -m benchmarks streams --engine_dir engine --pace 5,0.02,0.03 --output streams.json
  python -m benchmarks report benchmarks/results/*.json
"""

#: The records that there are; each kind is named by its command, whose package has the report.
RECORDS: dict[str, type[Record]] = {
    record.model_fields["kind"].default: record
    for record in (
        Results,
        GemmResults,
        EngineResults,
        ScalingResults,
        AccuracyResults,
        WeightsResults,
        ServingResults,
        GoodputResults,
        StreamsResults,
    )
}


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (kernels, gemm, engine, scaling, accuracy, weights, serving, goodput, streams):
        command.add_parser(commands)
    reporting = commands.add_parser(
        "report",
        help="draw plots and fill in documents from records",
        description="Fill the places in DIR/*.md and in the README beside DIR that name the records, and draw "
        "DIR/plots/RECORD_PLOT.svg.",
    )
    reporting.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what --output of the others wrote")
    reporting.add_argument(
        "--output", type=Path, default=Path("docs"), metavar="DIR", help="folder (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``python -m benchmarks --help``."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    if args.command == "report":
        return run(lambda: _report(args))
    set_log_level(args.log_level)
    return run(lambda: args.run(args, shlex.join(["python", "-m", "benchmarks", *argv])))


def load_report(path: Path) -> report.Report:
    """Read a record of any kind; what it says.

    Raises
    ------
    ConfigError
        If the file is no record.
    """
    raw = read_json(path)
    kind = raw.get("kind")
    if kind not in RECORDS:
        raise ConfigError(f"{path} has kind {kind!r}: give a record of python -m benchmarks {', '.join(RECORDS)}")
    results = RECORDS[kind].parse(raw, path)
    return importlib.import_module(f"benchmarks.{kind}.report").report(results)


def _report(args: argparse.Namespace) -> None:
    if not is_folder(args.output):
        raise ConfigError(f"--output {args.output} is not a folder: give the docs folder, or make one")
    reports = {path.stem: load_report(path) for path in args.results}
    for path in report.write(args.output, reports):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
