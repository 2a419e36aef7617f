"""``saw-serve``: an engine, or a model of Hugging Face, with OpenAI's API."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from saw_trtllm.build import tokens_that_fit
from saw_trtllm.cli.common import (
    TierOptions,
    add_fields,
    add_log_level,
    add_no_verify,
    add_parallel,
    parallel_config,
    parse_fields,
    run,
    set_log_level,
)
from saw_trtllm.engine.config import CONFIG_FILE
from saw_trtllm.errors import ConfigError
from saw_trtllm.llm import MAX_QUEUE_SIZE
from saw_trtllm.paths import is_file, is_folder, read_json
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.serve.engine_cache import cached_engine, default_folder, uncached_engine
from saw_trtllm.serve.garbage import set_start_aside
from saw_trtllm.serve.ready import say

try:
    from saw_trtllm.serve.openai.app import make_app
    from saw_trtllm.serve.openai.model import ModelSpec
    from saw_trtllm.serve.openai.replicas import replicas
    from saw_trtllm.serve.openai.server import ServerOptions, listen, make_server
except ImportError as e:
    sys.exit(f"error: saw-serve needs {e.name}, which is not installed: pip install 'saw-trtllm[serve]'")

log = logging.getLogger(__name__)

#: Of saw-build's flags, those that make sense here.
_BUILD = (
    "kv",
    "backend",
    "hadamard_order",
    "rotate_v",
    "range_factor",
    "calibration",
    "kv_skip_layers",
    "kv_bits",
    "dtype",
    "max_batch_size",
    "max_input_len",
    "max_seq_len",
    "max_num_tokens",
    "tokens_per_block",
    "gather_context_logits",
    "gemm_plugin",
)

_HINT = (
    "the 4-bit cache has no calibration: a prompt that is found again is read in 4 bits, and its answer may be worse "
    "than when it was new. saw-calibrate makes one of a text of your use: give its file with --calibration "
    "(docs/accuracy.md)"
)

_EXAMPLES = """\
examples:
  saw-serve SmolLM2-135M-Instruct                       # builds an engine, keeps it, and serves
  saw-serve --engine_dir engine --port 8000 --api_key $KEY
  saw-serve --engine_dir engine_fp16 --engine_dir engine_int4     # side by side on the page
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-serve", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="an engine's folder, a Hugging Face folder, or a name on its hub")
    parser.add_argument(
        "--engine_dir", type=Path, action="append", default=[], metavar="DIR", help="what saw-build wrote"
    )
    parser.add_argument(
        "--served_model_name", action="append", default=[], metavar="NAME", help="by default the folder's"
    )
    parser.add_argument("--tokenizer_dir", type=Path, metavar="DIR", help="by default the engine's folder")
    parser.add_argument("--chat_template", type=Path, metavar="FILE", help="in the place of the tokenizer's own")
    parser.add_argument(
        "--api_key", action="append", default=[], metavar="KEY", help="one that clients must send; also SAW_API_KEY"
    )
    parser.add_argument(
        "--cors_origins", nargs="*", default=[], metavar="URL", help="sites whose pages may call the server"
    )
    parser.add_argument(
        "--max_queue_size", type=int, default=MAX_QUEUE_SIZE, metavar="N", help="requests that may wait; more get 429"
    )
    parser.add_argument("--kv_cache_max_tokens", type=int, metavar="N", help="tokens of the KV cache")
    parser.add_argument(
        "--kv_cache_free_gpu_memory_fraction",
        type=float,
        default=KvCacheConfig.free_gpu_memory_fraction,
        metavar="F",
        help="its share of the free memory, of several engines together",
    )
    add_fields(parser, TierOptions)
    add_no_verify(parser)
    add_parallel(parser)
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="servers behind this address, on a Ray cluster"
    )
    parser.add_argument(
        "--route_by",
        choices=("load", "prefix"),
        default="load",
        help="how Ray Serve chooses a replica: the one with fewer requests, or that which has computed a prompt's "
        "beginning (default: %(default)s)",
    )
    network = parser.add_argument_group("network")
    add_fields(network, ServerOptions)
    cache = parser.add_argument_group("engines that are built here")
    cache.add_argument(
        "--cache_dir",
        type=Path,
        default=default_folder(),
        metavar="DIR",
        help="where they are kept; also SAW_CACHE_DIR",
    )
    cache.add_argument("--cache_size", type=float, default=100.0, metavar="GIB", help="what may be kept there")
    cache.add_argument("--no_cache", action="store_true", help="build anew, and keep nothing")
    add_fields(cache, BuildOptions, _BUILD)
    add_log_level(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-serve --help``."""
    parser = make_parser()
    args = parser.parse_args(argv)
    # What was typed, be it the default: argparse fills that in only where nothing is.
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(_BUILD, ...)))
    args.build_flags = [name for name in _BUILD if getattr(typed, name) is not ...]
    set_log_level(args.log_level)
    return run(lambda: _serve(args))


def _serve(args: argparse.Namespace) -> None:
    options = parse_fields(args, ServerOptions)
    if not 0 <= args.cache_size < math.inf:
        raise ConfigError(f"--cache_size is {args.cache_size}: give the GiB that engines may take, or --no_cache")
    if args.replicas < 1:
        raise ConfigError(f"--replicas is {args.replicas}: it must be at least 1")
    keys = [*args.api_key, *filter(None, [os.environ.get("SAW_API_KEY")])]
    if any(key != key.strip() or not key for key in keys):
        raise ConfigError("an API key is empty, or begins or ends with a space: give --api_key a key that can be sent")
    if options.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        log.warning("anybody who reaches %s may use the model: give --api_key", options.host)
    with ExitStack() as stack:
        stack.enter_context(_ending_well())
        folders = _names(args, [stack.enter_context(engine) for engine in _engines(args)])
        specs = _specs(args, folders)
        if args.replicas == 1:
            models = []
            for spec in specs:
                models.append(spec.open())
                stack.callback(models[-1].llm.shutdown)
            app = make_app(models, keys, args.cors_origins)
        else:
            settings = (keys, args.cors_origins, args.retry, args.route_by)
            app = stack.enter_context(replicas(specs, args.replicas, *settings))
        socket, url = listen(options)
        server = make_server(app, options, _UVICORN_LEVELS.get(args.log_level, args.log_level))
        served = ", ".join(spec.name for spec in specs)
        set_start_aside()
        say(f"ready: {url} serves {served}; OpenAI's API is at {url}/v1, a page to look at at {url}/")
        server.run([socket])


def _specs(args: argparse.Namespace, folders: list[tuple[str, Path]]) -> list[ModelSpec]:
    specs = []
    tiers = parse_fields(args, TierOptions).model_dump()
    # A replica has another working directory.
    tiers["disk_cache_dir"] = _absolute(tiers["disk_cache_dir"])
    tokenizer, template = _absolute(args.tokenizer_dir), _absolute(args.chat_template)
    for i, (name, folder) in enumerate(folders):
        share = args.kv_cache_free_gpu_memory_fraction / (len(folders) - i)
        options = {
            "kv_cache_config": KvCacheConfig(args.kv_cache_max_tokens, share, **tiers),
            "max_queue_size": args.max_queue_size,
            "verify": not args.no_verify,
            "parallel_config": parallel_config(args),
            "retry": args.retry,
        }
        specs.append(ModelSpec(name, folder.absolute(), tokenizer, template, options))
    return specs


def _absolute(path: Path | None) -> Path | None:
    return path and path.absolute()


@contextlib.contextmanager
def _ending_well() -> Iterator[None]:
    """SIGTERM closes what is open, be it in the middle of a build; uvicorn raises it again when it has ended."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _engines(args: argparse.Namespace) -> list[AbstractContextManager[Path]]:
    """The engines' folders, of which some may have to be built."""
    folders = [*args.engine_dir, *([_local(args.model)] if args.model else [])]
    if not folders:
        raise ConfigError("there is nothing to serve: give a model, or --engine_dir")
    if args.build_flags and not any(map(_is_model, folders)):
        what = f"--{args.build_flags[0]} says how an engine is built, and {folders[0]} is one already"
        raise ConfigError(f"{what}: leave it out, or give the model")
    return [_engine(args, folder) for folder in folders]


def _is_model(folder: Path) -> bool:
    return is_file(folder / CONFIG_FILE) and "build_config" not in read_json(folder / CONFIG_FILE)


def _engine(args: argparse.Namespace, folder: Path) -> AbstractContextManager[Path]:
    if not _is_model(folder):
        return contextlib.nullcontext(folder)
    options = BuildOptions(model_dir=folder, **{name: getattr(args, name) for name in _BUILD})
    if args.no_cache:
        return uncached_engine(options, _announce)
    return cached_engine(options, args.cache_dir, int(args.cache_size * 2**30), _announce)


def _announce(plan: BuildPlan, found: bool) -> None:
    """Say what is served, and what is built first."""
    config = plan.config
    fits = f"about {tokens_that_fit(plan):,} tokens will fit, {tokens_that_fit(plan, 'fp16'):,} in 16 bits"
    how = "the engine is in the cache" if found else "the engine is being built"
    say(f"{plan.checkpoint.folder}: {config.saw_int4.backend}, KV cache {config.saw_int4.kv}; {fits}; {how}")
    for warning in plan.warnings:
        log.warning("%s", warning)
    if config.saw_int4.kv == "saw_int4" and not config.saw_int4.k_frame:
        log.warning(_HINT)


def _local(model: str) -> Path:
    """A model's folder, fetched from the hub if it is a name there.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    folder = Path(model)
    if is_folder(folder):
        return folder
    if len(folder.parts) != 2 or folder.is_absolute():
        raise ConfigError(
            f"{folder} is not a folder: give a Hugging Face folder, the --output_dir of saw-build, or a name on "
            "the hub, as in ORGANIZATION/MODEL"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{model} is no folder, and names on the hub need huggingface_hub: give a folder") from None
    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as e:  # the library's own, of the network, of the name
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(f"{model} is no folder, and the hub does not give it ({reason}): give a folder") from e


def _names(args: argparse.Namespace, folders: list[Path]) -> list[tuple[str, Path]]:
    """A name for each folder.

    Raises
    ------
    ConfigError
        If two have the same, or there are more names than engines.
    """
    given = [folder.resolve().name for folder in args.engine_dir]
    names = args.served_model_name or [*given, *([Path(args.model).name or args.model] if args.model else [])]
    if len(names) != len(folders):
        raise ConfigError(f"{len(names)} names came for {len(folders)} engines: give --served_model_name for each")
    if len(set(names)) != len(names):
        raise ConfigError(f"two engines are called {max(names, key=names.count)}: give each a --served_model_name")
    return list(zip(names, folders, strict=True))


_UVICORN_LEVELS = {"internal_error": "critical", "verbose": "debug"}


if __name__ == "__main__":
    sys.exit(main())
