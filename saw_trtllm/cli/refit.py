"""``saw-refit``: other weights, or another calibration, for an engine that was built without weights."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from saw_trtllm.cli.common import add_log_level, print_table, run, set_log_level
from saw_trtllm.progress import progress
from saw_trtllm.refit import plan_refit, refit

_EXAMPLES = """\
examples:
  saw-refit --engine_dir engine --checkpoint_dir Llama-3.1-8B-Finetuned --output_dir finetuned
  saw-refit --engine_dir engine --checkpoint_dir /new/place/of/Llama-3.1-8B-Instruct --output_dir engine
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-refit", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR"}
    parser.add_argument("--engine_dir", **folder, help="what saw-build --strip_plan wrote")
    parser.add_argument("--checkpoint_dir", **folder, help="a Hugging Face or TensorRT-LLM folder of the same shape")
    parser.add_argument("--output_dir", **folder, help="folder to write the engine to; may be --engine_dir")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="file of saw-calibrate for these weights; by default the engine's",
    )
    add_log_level(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-refit --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: _refit(args))


def _refit(args: argparse.Namespace) -> None:
    start = time.monotonic()
    weights = plan_refit(args.engine_dir, args.checkpoint_dir, args.calibration)
    with progress(len(weights.shapes), "saw-refit", "tensors") as bar:
        config = refit(args.engine_dir, weights, args.output_dir, lambda _: bar.update())
    rows = {
        "engine": args.output_dir,
        "weights": config.saw_int4.weights and config.saw_int4.weights.checkpoint_dir,
        "calibration": "none" if weights.calibration is None else weights.calibration.describe(),
        "wall time": f"{time.monotonic() - start:.1f} s",
        "next": shlex.join(["saw-run", "--engine_dir", str(args.output_dir), "--input_text", "Hello"]),
    }
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
