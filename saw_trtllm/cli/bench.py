"""``saw-bench``: the throughput or the latency of an engine, with requests of a dataset or of random tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pydantic import BaseModel, Field

from saw_trtllm.bench.load import Percentiles, Report, run_load
from saw_trtllm.bench.workload import Job, random_jobs, read_dataset
from saw_trtllm.cli.common import add_fields, add_log_level, parse_fields, print_table, run, set_log_level
from saw_trtllm.errors import ConfigError
from saw_trtllm.llm import LLM
from saw_trtllm.progress import progress
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

_EXAMPLES = """\
examples:
  saw-bench throughput --engine_dir engine --input_len 1024 --output_len 128 --num_requests 256 --concurrency 64
  saw-bench throughput --engine_dir engine --dataset requests.jsonl --json
  saw-bench latency --engine_dir engine --input_len 128 --output_len 128
"""


class LoadOptions(BaseModel):
    """The flags of both commands."""

    engine_dir: Path = Field(description="what saw-build wrote")
    dataset: Path | None = Field(
        None,
        description='JSONL, a request a line: {"prompt": TEXT, "output_tokens": N}, or input_ids for the prompt',
    )
    input_len: int | None = Field(None, ge=1, description="tokens of a prompt, drawn at random, without --dataset")
    output_len: int | None = Field(None, ge=1, description="tokens generated for each, without --dataset")
    num_requests: int | None = Field(None, ge=1, description="requests in all; by default the dataset's, or 64")
    concurrency: int | None = Field(
        None, ge=1, description="requests in flight at a time; by default the engine's max_batch_size, for latency 1"
    )
    kv_cache_max_tokens: int | None = Field(None, description="tokens of the KV cache; by default what fits")
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
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        add_log_level(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-bench --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: _bench(parse_fields(args, LoadOptions), args.command, args.json))


def _bench(options: LoadOptions, command: str, as_json: bool) -> None:
    with LLM(options.engine_dir, kv_cache_config=KvCacheConfig(options.kv_cache_max_tokens)) as llm:
        vocab_size, batch = llm.config.pretrained_config.vocab_size, llm.config.build_config.max_batch_size
        jobs = _jobs(options, vocab_size)
        concurrency = options.concurrency or (1 if command == "latency" else batch)
        if options.warmup:
            shape = max(jobs, key=lambda job: job.output_len)
            run_load(llm, [shape._replace(output_len=min(4, shape.output_len))] * options.warmup, concurrency)
        with progress(len(jobs), f"saw-bench {command}", "requests") as bar:
            report = run_load(llm, jobs, concurrency, bar.update)
    if as_json:
        print(report.model_dump_json())
    else:
        print_table(describe(report))


def _jobs(options: LoadOptions, vocab_size: int) -> list[Job]:
    input_len, output_len = options.input_len, options.output_len
    if options.dataset is not None:
        if input_len is not None or output_len is not None:
            raise ConfigError("--dataset was given with --input_len or --output_len: give the one or the others")
        return read_dataset(options.dataset, options.num_requests)
    if input_len is None or output_len is None:
        raise ConfigError("neither --dataset nor both of --input_len and --output_len were given: give one of the two")
    return random_jobs(options.num_requests or 64, input_len, output_len, vocab_size, options.seed)


def describe(report: Report) -> dict[str, str]:
    """A report, line by line."""
    return {
        "requests": f"{report.num_requests}, {report.concurrency} at a time, in {report.duration_s:.2f} s",
        "tokens": f"{report.input_tokens:,} in, {report.output_tokens:,} out",
        "throughput": f"{report.output_tokens_per_s:,.1f} tokens/s out, {report.total_tokens_per_s:,.1f} in all, "
        f"{report.requests_per_s:,.2f} requests/s",
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
