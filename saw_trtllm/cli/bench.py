"""``saw-bench``: the throughput or the latency of an engine, with requests of a dataset or of random tokens."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from pydantic import Field

from saw_trtllm.bench.load import Limits, Percentiles, Report, check_load, run_load
from saw_trtllm.bench.workload import Conversation, Turn, random_conversations, read_dataset
from saw_trtllm.cli.common import (
    TierOptions,
    add_fields,
    add_log_level,
    add_parallel,
    parallel_config,
    parse_fields,
    print_table,
    run,
    set_log_level,
)
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.llm import LLM
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.progress import progress
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

_EXAMPLES = """\
examples:
  saw-bench throughput --engine_dir engine --input_len 1024 --output_len 128 --num_requests 256 --concurrency 64
  saw-bench throughput --engine_dir engine --dataset requests.jsonl --json
  saw-bench throughput --engine_dir engine --turns 6 --input_len 1500 --turn_len 100 --output_len 150 --num_requests 128
  saw-bench latency --engine_dir engine --input_len 128 --output_len 128
"""


class LoadOptions(TierOptions):
    """The flags of both commands."""

    engine_dir: Path = Field(description="what saw-build wrote")
    dataset: Path | None = Field(
        None,
        description='JSONL, a request a line: {"prompt": TEXT, "output_tokens": N}, or input_ids for the prompt, or '
        "Mooncake's timestamp, input_length, output_length and hash_ids; or a JSON file of ShareGPT's conversations",
    )
    input_len: int | None = Field(None, ge=1, description="tokens of a prompt, drawn at random, without --dataset")
    output_len: int | None = Field(None, ge=1, description="tokens generated for each, without --dataset")
    turns: int = Field(1, ge=1, description="turns of a conversation, each with all said before, without --dataset")
    turn_len: int = Field(100, ge=1, description="tokens of each turn after the first")
    system_len: int = Field(0, ge=0, description="tokens with which all prompts begin, without --dataset")
    think_time: float = Field(0.0, ge=0, description="seconds from an answer to the next turn")
    num_requests: int | None = Field(
        None, ge=1, description="requests, or conversations, in all; by default the dataset's, or 64"
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="requests in flight at a time; by default all of a trace with timestamps, of others the engine's "
        "max_batch_size, and for latency 1",
    )
    kv_cache_max_tokens: int | None = Field(None, description="tokens of the KV cache; by default what fits")
    kv_cache_bytes: int | None = Field(None, ge=1, description="the KV cache in bytes instead")
    max_ttft_ms: float = Field(math.inf, gt=0, description="first token within so many ms, to count for the goodput")
    max_tpot_ms: float = Field(math.inf, gt=0, description="and so many ms a token after it, on average")
    warmup: int = Field(2, ge=0, description="requests that are sent before, and not counted")
    seed: int = Field(0, description="of the random prompts")


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-bench", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("throughput", "Send requests at the engine's full batch, and report tokens per second."),
        ("latency", "Send one request after the other, and report how long each takes."),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add_fields(command, LoadOptions)
        add_parallel(command, server=False)
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        add_log_level(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-bench --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: _bench(parse_fields(args, LoadOptions), parallel_config(args), args.command, args.json))


def _bench(options: LoadOptions, parallel: ParallelConfig, command: str, as_json: bool) -> None:
    with LLM(options.engine_dir, kv_cache_config=_kv_cache(options), parallel_config=parallel) as llm:
        batch = llm.config.build_config.max_batch_size
        conversations = _conversations(options, llm)
        check_load(llm, conversations)
        timed = any(conversation[0].delay for conversation in conversations)
        most = 1 if command == "latency" else len(conversations) if timed else batch
        concurrency = options.concurrency or most
        if options.warmup:
            turn = max((c[0] for c in conversations), key=lambda turn: turn.output_len)
            run_load(llm, [[Turn(turn.prompt, min(4, turn.output_len))]] * options.warmup, concurrency)
        limits = Limits(options.max_ttft_ms, options.max_tpot_ms)
        with progress(sum(map(len, conversations)), f"saw-bench {command}", "requests") as bar:
            report = run_load(llm, conversations, concurrency, bar.update, limits)
    if as_json:
        print(report.model_dump_json())
    else:
        print_table(describe(report))


def _kv_cache(options: LoadOptions) -> KvCacheConfig:
    tokens = options.kv_cache_max_tokens
    if options.kv_cache_bytes is not None:
        if tokens is not None:
            raise ConfigError("--kv_cache_bytes came with --kv_cache_max_tokens: give one of the two")
        config = EngineConfig.load(options.engine_dir)
        num_blocks = options.kv_cache_bytes // config.block_bytes
        if num_blocks == 0:
            raise ConfigError(
                f"--kv_cache_bytes {options.kv_cache_bytes} holds no block, of {config.block_bytes} bytes: give more"
            )
        tokens = config.tokens_of_blocks(num_blocks)
    return KvCacheConfig(tokens, **options.model_dump(include=set(TierOptions.model_fields)))


def _conversations(options: LoadOptions, llm: LLM) -> list[Conversation]:
    input_len, output_len = options.input_len, options.output_len
    vocab_size = llm.config.pretrained_config.vocab_size
    if options.dataset is not None:
        if input_len is not None or output_len is not None or options.turns > 1 or options.system_len:
            raise ConfigError(
                "--dataset was given with --input_len, --output_len, --turns or --system_len: give the one or the "
                "others"
            )
        return read_dataset(options.dataset, options.num_requests, vocab_size, lambda text: _encode(llm, text))
    if input_len is None or output_len is None:
        raise ConfigError("neither --dataset nor both of --input_len and --output_len were given: give one of the two")
    return random_conversations(
        options.num_requests or 64,
        input_len,
        output_len,
        vocab_size,
        options.seed,
        options.turns,
        options.turn_len,
        options.system_len,
        options.think_time,
    )


def _encode(llm: LLM, text: str) -> list[int]:
    if llm.tokenizer is None:
        raise ConfigError("the dataset holds text and the engine has no tokenizer: give a dataset of token ids")
    return llm.tokenizer.encode(text)


_TIERS = {"pool": "the pool", "host": "host memory", "disk": "files"}


def describe(report: Report) -> dict[str, str]:
    """A report, line by line."""
    return {
        "requests": f"{report.num_requests}, {report.concurrency} at a time, in {report.duration_s:.2f} s",
        "tokens": f"{report.input_tokens:,} in, {report.reused_tokens:,} of them from the cache, "
        f"{report.output_tokens:,} out",
        "found": ", ".join(f"{100 * rate:.1f} % in {_TIERS[tier]}" for tier, rate in report.hit_rates.items()),
        "moved": f"{report.moved_bytes['stored']:,} bytes to the host, {report.moved_bytes['loaded']:,} back, "
        f"{report.moved_bytes['disk_written']:,} to files, {report.moved_bytes['disk_read']:,} back; "
        f"{report.evicted_blocks:,} blocks of the pool given up",
        "throughput": f"{report.output_tokens_per_s:,.1f} tokens/s out, {report.total_tokens_per_s:,.1f} in all, "
        f"{report.requests_per_s:,.2f} requests/s",
        "goodput": f"{report.goodput_requests_per_s:,.2f} requests/s within the limits",
        "time to first token": _line(report.time_to_first_token_ms),
        "time between tokens": _line(report.time_between_tokens_ms),
        "request latency": _line(report.request_latency_ms),
    }


def _line(times: Percentiles | None) -> str:
    if times is None:
        return "none: texts of one token"
    return f"mean {times.mean:.2f} ms, p50 {times.p50:.2f}, p90 {times.p90:.2f}, p99 {times.p99:.2f}"


if __name__ == "__main__":
    sys.exit(main())
