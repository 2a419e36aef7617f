"""``saw-triton``: a Triton model repository for an engine, and a server for it."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from saw_trtllm.cli.common import (
    TierOptions,
    add_fields,
    add_log_level,
    add_no_verify,
    add_parallel,
    parse_fields,
    run,
    set_log_level,
)
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.llm import MAX_QUEUE_SIZE
from saw_trtllm.paths import is_file
from saw_trtllm.plan.checksums import verify_engine
from saw_trtllm.plugins.library import PRELOAD_LIBRARY, library_path
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve.installation import ADVICE, Installation, check_flags, find_server
from saw_trtllm.serve.launcher import launch
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.ports import Ports
from saw_trtllm.serve.repository import model_configs, write_repository
from saw_trtllm.serve.server import Server
from saw_trtllm.serve.tensorrtllm_repository import (
    BACKENDS,
    check_engine,
    fill_repository,
    find_template,
    template_values,
)

logger = logging.getLogger(__name__)

_SWITCH = ("enable", "disable")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-triton",
        description="Write a Triton model repository for an engine of saw-build, and start tritonserver with --launch.",
        formatter_class=_Defaults,
    )
    _add_folders_and_ports(parser)
    _add_cache(parser)
    _add_requests(parser)
    _add_watch(parser)
    add_no_verify(parser)
    add_parallel(parser)
    add_log_level(parser)
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags for tritonserver itself")
    return parser


def _add_folders_and_ports(parser: argparse.ArgumentParser) -> None:
    # None has no place in the help.
    unset: dict[str, Any] = {"type": Path, "metavar": "DIR", "default": argparse.SUPPRESS}
    parser.add_argument("--engine_dir", required=True, help="engine folder that saw-build wrote", **unset)
    parser.add_argument(
        "--backend",
        choices=("saw", *BACKENDS),
        default="saw",
        help="whose runtime: this project's, TensorRT-LLM's through its C++ backend, or that through Python",
    )
    parser.add_argument(
        "--template_repo",
        help="TensorRT-LLM's triton_backend/all_models/inflight_batcher_llm (default: the container's)",
        **unset,
    )
    parser.add_argument("--model_repo", help="folder to write (default: ENGINE_DIR/triton_model_repo)", **unset)
    parser.add_argument("--tokenizer_dir", help="folder of tokenizer.json (default: ENGINE_DIR)", **unset)
    parser.add_argument("--launch", action="store_true", help="start the server and stay until it is stopped")
    parser.add_argument(
        "--tritonserver",
        help="the server to start (default: that on PATH, else nvidia-pytriton's)",
        **{**unset, "metavar": "FILE"},
    )
    parser.add_argument(
        "--host",
        default=Ports.host,
        help=f"address to listen on; 0.0.0.0 is all, but {ADVICE}",
    )
    parser.add_argument("--grpc_port", type=int, metavar="N", default=Ports.grpc, help="port for gRPC")
    parser.add_argument("--http_port", type=int, metavar="N", default=Ports.http, help="port for HTTP")
    parser.add_argument("--metrics_port", type=int, metavar="N", default=Ports.metrics, help="port for metrics")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv_cache_max_tokens",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="tokens that the KV cache holds (default: what the memory allows)",
    )
    parser.add_argument(
        "--kv_cache_free_gpu_memory_fraction",
        type=float,
        metavar="F",
        default=KvCacheConfig.free_gpu_memory_fraction,
        help="share of the free memory for the KV cache",
    )
    parser.add_argument(
        "--max_queue_size",
        type=int,
        metavar="N",
        default=MAX_QUEUE_SIZE,
        help="requests that may wait; beyond that they are rejected; 0 is any number",
    )
    parser.add_argument("--kv_cache_reuse", choices=_SWITCH, default="enable", help="share blocks of equal prefixes")
    add_fields(parser, TierOptions)


def _add_requests(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exclude_input_in_output", choices=_SWITCH, default="disable", help="for requests that do not say"
    )
    parser.add_argument(
        "--add_special_tokens", choices=_SWITCH, default="enable", help="whether a prompt gets the tokenizer's own"
    )
    parser.add_argument(
        "--decoupled_mode",
        choices=("true", "false"),
        default="true",
        help="true: requests may stream, over gRPC streams and generate_stream; false: each has one response, and "
        "clients that wait for one (infer over gRPC and HTTP) work",
    )
    parser.add_argument(
        "--triton_max_batch_size", type=int, metavar="N", default=64, help="prompts that one request may hold"
    )


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart",
        type=int,
        metavar="N",
        default=3,
        help="with --launch: how often in a row to start a server again that has crashed, lost a model's process or "
        "got stuck; 0 ends with code 1 instead",
    )
    parser.add_argument(
        "--canary_timeout",
        type=float,
        metavar="SECONDS",
        default=120.0,
        help="with --launch: without an answer or a token for so long, the server counts as stuck; 0 is never",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-triton --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: serve(args))


def serve(args: argparse.Namespace) -> int:
    """Write the repository, then start the server or say how to."""
    ports = Ports(args.host, args.grpc_port, args.http_port, args.metrics_port)
    ports.check_numbers()
    check_flags(args.flags)
    for name in ("restart", "canary_timeout"):
        if not getattr(args, name) >= 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}: it must be at least 0")
    if args.launch:
        ports.check()  # before anything is written
    repository = getattr(args, "model_repo", args.engine_dir / "triton_model_repo").absolute()
    if not 1 <= args.triton_max_batch_size < 2**31:  # Triton's own type
        raise ConfigError(f"triton_max_batch_size is {args.triton_max_batch_size}: it must be from 1 to {2**31 - 1}")
    if args.backend == "saw":
        write_repository(repository, model_configs(_parameters(args), args.triton_max_batch_size))
        installation = _installation(args, repository)
    else:
        installation = _tensorrtllm(args, repository)
    if not ports.local and installation.vulnerable():
        logger.warning("the server will listen on %s, and %s", ports.host, ADVICE)
    if not args.launch:
        command = _shell_command(installation, repository, ports, args.log_level, args.flags)
        print(f"wrote {repository}; to start the server:\n  {command}")
        return 0
    return launch(
        lambda: Server(installation, repository, ports, args.log_level, args.flags, args.canary_timeout), args.restart
    )


def _parameters(args: argparse.Namespace) -> Parameters:
    """The models' settings, once the engine and the tokenizer are known to be there."""
    EngineConfig.load(args.engine_dir)
    tiers = parse_fields(args, TierOptions)
    tokenizer = getattr(args, "tokenizer_dir", args.engine_dir)
    if tokenizer == args.engine_dir and not is_file(tokenizer / "tokenizer.json"):
        raise ConfigError(f"{tokenizer} has no tokenizer.json: give the folder of the model's with --tokenizer_dir")
    # Reading all of it takes long: it is done once, here where it ends before anything starts, else when a server does.
    verified_here = args.launch or args.backend != "saw"
    if verified_here and not args.no_verify:
        verify_engine(args.engine_dir, tokenizer=tokenizer == args.engine_dir)
    Tokenizer.load(tokenizer)
    return Parameters.of(
        gpt_model_path=args.engine_dir.absolute(),
        tokenizer_dir=tokenizer.absolute(),
        add_special_tokens=args.add_special_tokens == "enable",
        max_tokens_in_paged_kv_cache=getattr(args, "kv_cache_max_tokens", None),
        kv_cache_free_gpu_mem_fraction=args.kv_cache_free_gpu_memory_fraction,
        max_queue_size=args.max_queue_size,
        kv_cache_host_memory_bytes=tiers.host_cache_size,
        disk_cache_dir=tiers.disk_cache_dir and tiers.disk_cache_dir.absolute(),
        disk_cache_size=tiers.disk_cache_size,
        enable_kv_cache_reuse=args.kv_cache_reuse == "enable",
        deterministic=tiers.deterministic,
        decoupled_mode=args.decoupled_mode == "true",
        exclude_input_in_output=args.exclude_input_in_output == "enable",
        verify_engine=not (verified_here or args.no_verify),
        ranks=args.ranks,
        step_timeout=args.step_timeout,
        retry=args.retry,
    )


def _tensorrtllm(args: argparse.Namespace, repository: Path) -> Installation:
    """Fill in TensorRT-LLM's repository, and say how its server starts with the plugins."""
    config = check_engine(args.engine_dir)
    template = find_template(getattr(args, "template_repo", None))
    world_size = config.pretrained_config.mapping.world_size
    if args.launch and world_size > 1:
        raise ConfigError(
            f"the engine has {world_size} ranks, which MPI starts: leave out --launch and use TensorRT-LLM's "
            f"launch_triton_server.py --world_size {world_size} (docs/tensorrt_llm.md)"
        )
    values = template_values(_parameters(args), config, args.backend, args.triton_max_batch_size)
    # TensorRT-LLM's Python backend loads the plugins itself, in initialize.
    preload = (library_path(PRELOAD_LIBRARY),) if args.backend == "tensorrtllm" else ()
    fill_repository(template, repository, values)
    return replace(_installation(args, repository), preload=preload)


def _installation(args: argparse.Namespace, repository: Path) -> Installation:
    try:
        return find_server(getattr(args, "tritonserver", None), repository.with_name(f"{repository.name}_backends"))
    except BackendUnavailableError as e:
        if args.launch:
            raise
        logger.warning("%s", e)  # the repository may be for another machine
        return Installation(Path("tritonserver"))


def _shell_command(installation: Installation, repository: Path, ports: Ports, log_level: str, flags: list[str]) -> str:
    """The command to start the server, with the variables that it needs, for a shell."""
    variables = [
        f'{variable}="{":".join(map(str, folders))}${{{variable}:+:${variable}}}"'
        for variable, folders in installation.search_paths.items()
        if folders
    ]
    return " ".join([*variables, shlex.join(installation.command(repository, ports, log_level, flags))])


if __name__ == "__main__":
    sys.exit(main())
