"""``saw-convert``: a Hugging Face model to a TensorRT-LLM checkpoint."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from saw_trtllm.checkpoint import NUMPY_DTYPES, Checkpoint, save_checkpoint
from saw_trtllm.checkpoint.families import family_of
from saw_trtllm.cli.common import LOG_LEVELS, run, set_log_level
from saw_trtllm.progress import progress


def build_parser() -> argparse.ArgumentParser:
    """Describe the command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-convert",
        description="Convert a Hugging Face model (Llama, Mistral, Qwen2, Qwen3) to TensorRT-LLM's checkpoint format. "
        "A TensorRT-LLM checkpoint is taken too, to split it otherwise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # A default of None has no place in the help, hence SUPPRESS.
    parser.add_argument(
        "--model_dir", type=Path, required=True, default=argparse.SUPPRESS, help="folder of the model to convert"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, default=argparse.SUPPRESS, help="folder to write the checkpoint to"
    )
    parser.add_argument("--tp_size", type=int, default=1, help="tensor parallel ranks to split the weights over")
    parser.add_argument(
        "--dtype", choices=("auto", *NUMPY_DTYPES), default="auto", help="dtype to write; auto keeps the model's own"
    )
    parser.add_argument("--log_level", choices=LOG_LEVELS, default="info", help="what to log to stderr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    start = time.perf_counter()
    ckpt = Checkpoint.open(args.model_dir)
    with progress(len(ckpt.names()), "saw-convert", "tensors") as bar:
        written = save_checkpoint(ckpt, args.output_dir, args.tp_size, args.dtype, lambda _: bar.update())
    config = ckpt.config
    next_command = ["saw-build", "--model", family_of(config).name, "--kv", "saw_int4"]
    next_command += ["--checkpoint_dir", str(args.output_dir), "--output_dir", "engine"]
    rows = {
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "parameters": f"{ckpt.num_parameters():,}",
        "dtype": config.dtype if args.dtype == "auto" else args.dtype,
        "tp_size": args.tp_size,
        "written": f"{written:,} bytes to {args.output_dir}",
        "wall time": f"{time.perf_counter() - start:.1f} s",
        "next": shlex.join(next_command),
    }
    for key, value in rows.items():
        print(f"{key:<14}{value}")


if __name__ == "__main__":
    sys.exit(main())
