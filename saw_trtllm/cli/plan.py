"""``saw-plan``: what fits a GPU that is not there, with which weights and which cache."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from saw_trtllm.build import tokens_that_fit
from saw_trtllm.checkpoint import NUMPY_DTYPES, Checkpoint
from saw_trtllm.checkpoint.layout import EMBEDDING
from saw_trtllm.cli.common import add_log_level, format_bytes, print_columns, run, set_log_level
from saw_trtllm.errors import ConfigError
from saw_trtllm.paths import is_folder
from saw_trtllm.plan.gpus import GPUS, GpuModel, PlannedGpu
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan, plan_engine

_EXAMPLES = """\
examples:
  saw-plan Qwen3-8B --gpu 4090 --context 32768 --concurrency 8
  saw-plan Qwen3-8B/config.json --gpu L4
"""
#: Of a sequence, where no flag says it.
_CONTEXT = 8192


@dataclass(frozen=True)
class Choice:
    """A pair of weights and cache on a GPU.

    Attributes
    ----------
    qformat, kv : str
        As ``saw-build`` takes them.
    weights : dict of str to int
        Bytes by kind.
    bytes_per_token : int
        Of the cache, of a sequence of the context, which windows bound.
    tokens : int
        That fit in such sequences, by ``saw-build``'s count.
    sequences : int
        Of the context that they make.
    step_microseconds : float
        What reading the weights and the sequences' cache once takes: no decode step is shorter.
    fits : bool
        Whether the sequences that are asked for do.
    """

    qformat: str
    kv: str
    weights: dict[str, int]
    bytes_per_token: int
    tokens: int
    sequences: int
    step_microseconds: float
    fits: bool


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-plan", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model's folder, or its config.json alone")
    parser.add_argument("--gpu", choices=GPUS, required=True, help="what it is to run on")
    parser.add_argument(
        "--context", type=int, metavar="N", help=f"tokens of a sequence; by default {_CONTEXT}, or what the model has"
    )
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="sequences at a time (default: 1)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_log_level(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-plan --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: _plan(args))


def _plan(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(args.model) if is_folder(args.model) else Checkpoint.of_config(args.model)
    gpu, longest = GPUS[args.gpu], checkpoint.config.max_positions
    context = min(_CONTEXT, longest) if args.context is None else args.context
    if not 2 <= context <= longest:
        raise ConfigError(f"--context is {context}: it must be from 2 to the model's {longest} positions")
    if args.concurrency < 1:
        raise ConfigError(f"--concurrency is {args.concurrency}: it must be at least 1")
    choices, left_out = _choices(checkpoint, gpu, args.context, context, args.concurrency)
    if not choices:
        raise ConfigError(left_out[0])
    best = min(choices, key=lambda c: (not c.fits, c.step_microseconds if c.fits else -c.tokens))
    command = shlex.join(_command(checkpoint, best, None if args.context is None else context))
    if args.json:
        about = {"model": str(args.model), "gpu": gpu.name, "context": context, "concurrency": args.concurrency}
        print(json.dumps({**about, "choices": [dataclasses.asdict(c) for c in choices], "best": command}))
        return
    print(f"{gpu.name}: {format_bytes(gpu.memory)} at {gpu.bandwidth / 1e9:,.0f} GB/s\n")
    header = ["weights", "cache", "bytes", "KV per token", "tokens that fit", f"sequences of {context}"]
    print_columns([*header, f"step of {args.concurrency}, at least"], [_row(c) for c in choices])
    for reason in left_out:
        print(f"\n{reason}")
    if not best.fits:
        print(f"\nnone of them holds {args.concurrency} sequences of {context} tokens; the most tokens are had by")
    print(f"\nbuild: {command}")


def _choices(
    checkpoint: Checkpoint, gpu: GpuModel, longest: int | None, context: int, concurrency: int
) -> tuple[list[Choice], list[str]]:
    """All pairs that the GPU has layers for, and sentences on the others; ``longest`` as ``--max_seq_len``."""
    choices, left_out = [], []
    for qformat in ("auto", "full_prec") if checkpoint.formats else ("full_prec", "fp8", "int4_wo"):
        for kv in ("fp16", "saw_int4"):
            options = BuildOptions(kv=kv, qformat=qformat, max_seq_len=longest)
            try:
                plan = plan_engine(options, PlannedGpu(gpu), gpu.name, checkpoint)
            except ConfigError as e:
                left_out.append(str(e))
                break
            choices.append(_choice(plan, options, gpu, context, concurrency))
    return choices, left_out


def _choice(plan: BuildPlan, options: BuildOptions, gpu: GpuModel, context: int, concurrency: int) -> Choice:
    weights, cache = plan.weights.bytes_by_kind(), plan.sequence_bytes(context)
    tokens = tokens_that_fit(plan, context=context)
    read = sum(weights.values()) + concurrency * cache
    model = plan.config.pretrained_config
    if not model.share_embedding_table:
        # A step reads a row of it for each sequence, and all of a tied one as lm_head.
        read -= math.prod(plan.checkpoint.shape(EMBEDDING)) * NUMPY_DTYPES[model.dtype].itemsize
    sequences = tokens // context
    step = read / gpu.bandwidth * 1e6
    per_token, fits = cache // context, sequences >= concurrency
    return Choice(options.qformat, options.kv, weights, per_token, tokens, sequences, step, fits)


def _row(choice: Choice) -> list[str]:
    names = {"auto": "as they are", "full_prec": next(iter(choice.weights))}
    return [
        names.get(choice.qformat, choice.qformat),
        choice.kv,
        format_bytes(sum(choice.weights.values())),
        f"{choice.bytes_per_token:,}",
        f"{choice.tokens:,}",
        f"{choice.sequences:,}",
        f"{choice.step_microseconds:,.0f} µs" if choice.fits else "-",
    ]


def _command(checkpoint: Checkpoint, choice: Choice, context: int | None) -> list[str]:
    flag = "--checkpoint_dir" if checkpoint.is_tensorrt_llms else "--model_dir"
    command = ["saw-build", flag, str(checkpoint.folder), "--kv", choice.kv, "--qformat", choice.qformat]
    command += [] if context is None else ["--max_seq_len", str(context)]
    return [*command, "--output_dir", "engine"]


if __name__ == "__main__":
    sys.exit(main())
