"""``python -m benchmarks goodput``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.common.command import finish
from benchmarks.common.environment import cpu_name, describe, gpu_name
from benchmarks.common.vllm import chosen_caches
from benchmarks.goodput.record import GoodputResults, Load
from benchmarks.goodput.report import report
from saw_trtllm.errors import ConfigError

_GIB = 2**30


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    goodput = commands.add_parser(
        "goodput",
        help="conversations that come back, by the bytes of the KV pool",
        description="Hold the same conversations with engines, one after the other, and with pools of several sizes. "
        "With --vllm, where vLLM is installed, with caches of its own in place of the engines; an --output that is "
        "there of the same load keeps its points.",
    )
    goodput.add_argument("--engine_dir", type=Path, nargs="+", required=True, metavar="DIR")
    goodput.add_argument("--vllm", default="", metavar="NAMES", help="fp16, fp8 or both, of the first engine's shape")
    goodput.add_argument(
        "--pool_gib", default="4,8,16,32", metavar="NUMBERS", help="of the KV pool (default: %(default)s)"
    )
    goodput.add_argument("--host_gib", type=float, default=0.0, metavar="N", help="of the host's tier, beside each")
    for name, default, text in (
        ("conversations", 128, "all at a time"),
        ("turns", 6, "of each"),
        ("first_len", 1500, "tokens of a first turn"),
        ("turn_len", 100, "tokens of each further one"),
        ("answer_len", 150, "tokens of an answer, 2 at least"),
    ):
        goodput.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    goodput.add_argument("--system_len", type=int, default=0, metavar="N", help="tokens that all begin with")
    goodput.add_argument("--think_time", type=float, default=0.0, metavar="S", help="from an answer to the next turn")
    goodput.add_argument(
        "--max_ttft_ms", type=float, default=1000.0, metavar="MS", help="to the first token (default: %(default)s)"
    )
    goodput.add_argument(
        "--max_tpot_ms", type=float, default=50.0, metavar="MS", help="then a token, on average (default: %(default)s)"
    )
    finish(goodput, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    from benchmarks.goodput.run import run_goodput

    for name, least in {"conversations": 1, "turns": 1, "first_len": 1, "turn_len": 1, "answer_len": 2}.items():
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}: give at least {least}")
    try:
        pools = [int(float(word) * _GIB) for word in args.pool_gib.split(",")]
    except ValueError:
        pools = []
    if not all(size > 0 for size in pools) or not pools:
        raise ConfigError(f"--pool_gib is {args.pool_gib!r}: give sizes in GiB, separated by commas")
    vllm = chosen_caches(args.vllm)
    load = Load(
        **{name: getattr(args, name) for name in ("conversations", "turns", "first_len", "turn_len", "answer_len")},
        system_len=args.system_len,
        think_time_s=args.think_time,
        max_ttft_ms=args.max_ttft_ms,
        max_tpot_ms=args.max_tpot_ms,
    )
    gpu = gpu_name()
    environment = describe(command, args.commit, gpu=gpu, **({} if gpu else {"cpu": cpu_name()}))
    there = args.output is not None and os.path.exists(args.output)
    previous = GoodputResults.load(args.output) if there else None
    run = run_goodput(args.engine_dir, vllm, pools, int(args.host_gib * _GIB), load, environment, previous)
    for results in run:
        if args.output is not None:
            results.save(args.output)
    print(report(results).plain())
