"""``python -m benchmarks engine``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.common.command import finish
from benchmarks.common.vllm import chosen_caches
from benchmarks.engine import cases
from saw_trtllm.backends.registry import choose_backend
from saw_trtllm.errors import ConfigError, EngineError
from saw_trtllm.plan.plan import split_over_ranks


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    engine = commands.add_parser(
        "engine",
        help="time whole decode steps of TensorRT engines by the format of their cache",
        description="Build TensorRT engines of a model's shape with random weights, one for each format of the "
        "cache, and time their decode steps, their parts, the whole runtime and the start.",
    )
    models = {cases.flag_of(model): model for model in cases.MODELS}
    engine.add_argument(
        "--model", choices=models, default=next(iter(models)), help="the shape of the engines (default: %(default)s)"
    )
    engine.add_argument("--kv", default=",".join(cases.KVS), metavar="NAMES", help="default: %(default)s")
    engine.add_argument(
        "--num_layers",
        type=int,
        metavar="N",
        help="of the engines; fewer are built sooner, and the record says how many (default: the model's)",
    )
    engine.add_argument(
        "--vocab_size",
        type=int,
        metavar="N",
        help="of the engines (default: the model's)",
    )
    engine.add_argument(
        "--tp_size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that each engine is split over, a GPU each; then only steps are timed (default: %(default)s)",
    )
    engine.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        default="float16",
        help="of the engines; bfloat16 is for TensorRT 10 and newer (default: %(default)s)",
    )
    for name, known in (("batch", cases.BATCHES), ("context", cases.CONTEXTS)):
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
    engine.add_argument(
        "--qformat",
        choices=("full_prec", "fp8", "int4_wo"),
        default="full_prec",
        help="as saw-build's, for all engines",
    )
    engine.add_argument(
        "--vllm", default="", metavar="NAMES", help="where vLLM is installed: its steps too, with fp16, fp8 or both"
    )
    finish(engine, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    kvs = cases.parse_kvs(args.kv)
    vllm = chosen_caches(args.vllm)
    numbers = {}
    for name, all_of, few in (
        ("batch", cases.BATCHES, cases.QUICK_BATCHES),
        ("context", cases.CONTEXTS, cases.QUICK_CONTEXTS),
    ):
        given = getattr(args, name)
        chosen = few if args.quick else all_of
        numbers[name] = chosen if given is None else cases.parse_numbers(given, all_of, f"--{name}")
    for name in ("num_layers", "vocab_size", "tp_size", "build_workers"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ConfigError(f"--{name} is {number}: it must be at least 1")
    model = next(name for name in cases.MODELS if cases.flag_of(name) == args.model)
    choose_backend("tensorrt")
    from benchmarks.engine.plan import Plan
    from benchmarks.engine.report import report
    from benchmarks.engine.run import run_engines

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
        plan = Plan.of(
            args.engine_dir or Path(temporary),
            kvs,
            split_over_ranks(cases.model_config(model, args.num_layers, args.vocab_size, args.dtype), args.tp_size),
            batches=numbers["batch"],
            contexts=numbers["context"],
            optimization_level=args.builder_optimization_level,
            decode_profile=None if args.multiple_profiles is None else args.multiple_profiles == "enable",
            gemm_plugin=args.gemm_plugin,
            qformat=args.qformat,
            build_timeout_s=args.build_timeout,
            build_workers=args.build_workers,
            vllm=vllm,
        )
        results = run_engines(plan, command, args.commit, args.output)
    print(report(results).plain())
    if results.aborted:
        raise EngineError(results.aborted)
