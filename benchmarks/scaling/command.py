"""``python -m benchmarks scaling``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.common.command import finish, parse_counts
from benchmarks.engine import cases
from saw_trtllm.backends.registry import choose_backend
from saw_trtllm.errors import ConfigError, EngineError
from saw_trtllm.plan.plan import split_over_ranks


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    scaling = commands.add_parser(
        "scaling",
        help="time decode steps of a model's engines over several numbers of GPUs",
        description="Build TensorRT engines of a model's shape with random weights, one for each number of GPUs and "
        "each format of the cache, and time their decode steps, what goes between the GPUs, and the sums alone.",
    )
    models = {cases.flag_of(model): model for model in cases.MODELS}
    scaling.add_argument(
        "--model", choices=models, default=next(iter(models)), help="the shape of the engines (default: %(default)s)"
    )
    scaling.add_argument("--tp_size", default="1,2", metavar="NUMBERS", help="of GPUs (default: %(default)s)")
    scaling.add_argument("--kv", default="fp16,saw_int4", metavar="NAMES", help="default: %(default)s")
    scaling.add_argument("--num_layers", type=int, metavar="N", help="of the engines (default: the model's)")
    scaling.add_argument("--batch", default="1,8,64", metavar="NUMBERS", help="default: %(default)s")
    scaling.add_argument("--context", default="1024,8192", metavar="NUMBERS", help="default: %(default)s")
    scaling.add_argument(
        "--engine_dir",
        type=Path,
        metavar="DIR",
        help="keep the engines there, in a folder for each number of GPUs and format, and take those that are there",
    )
    scaling.add_argument(
        "--build_workers", type=int, default=2, metavar="N", help="formats built at once (default: %(default)s)"
    )
    scaling.add_argument("--build_only", action="store_true", help="build what --engine_dir lacks, and time nothing")
    finish(scaling, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    kvs, sizes = cases.parse_kvs(args.kv), parse_counts(args.tp_size, "--tp_size")
    if sizes != sorted(set(sizes)):
        raise ConfigError(f"--tp_size is {args.tp_size!r}: give each number of GPUs once, the fewest first")
    batches = cases.parse_numbers(args.batch, cases.BATCHES, "--batch")
    contexts = cases.parse_numbers(args.context, cases.CONTEXTS, "--context")
    for name in ("num_layers", "build_workers"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ConfigError(f"--{name} is {number}: it must be at least 1")
    if args.build_only and args.engine_dir is None:
        raise ConfigError("--build_only was given without --engine_dir: say where the engines are to be kept")
    model = cases.model_config(next(m for m in cases.MODELS if cases.flag_of(m) == args.model), args.num_layers)
    shapes = [split_over_ranks(model, size) for size in sizes]
    choose_backend("tensorrt")
    from benchmarks.engine.plan import Plan
    from benchmarks.scaling.report import report
    from benchmarks.scaling.run import build_all, run_scaling

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
        folder = args.engine_dir or Path(temporary)
        plans = [
            Plan.of(
                folder / f"tp{shape.mapping.tp_size}",
                kvs,
                shape,
                batches=batches,
                contexts=contexts,
                build_workers=args.build_workers,
            )
            for shape in shapes
        ]
        if args.build_only:
            build_all(plans)
            return
        results = run_scaling(plans, command, args.commit, args.output)
    print(report(results).plain())
    if results.aborted:
        raise EngineError(results.aborted)
