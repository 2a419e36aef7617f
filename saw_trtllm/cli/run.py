"""``saw-run``: answer prompts with an engine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from saw_trtllm.cli.common import add_log_level, add_no_verify, add_parallel, parallel_config, run, set_log_level
from saw_trtllm.cli.conversation import Conversation, typed_lines
from saw_trtllm.errors import ConfigError, RequestError
from saw_trtllm.llm import LLM
from saw_trtllm.model.config import MAX_POSITIONS
from saw_trtllm.progress import progress
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.outputs import RequestOutput
from saw_trtllm.runtime.sampling_params import SamplingParams


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-run", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    unset = argparse.SUPPRESS
    parser.add_argument(
        "--engine_dir", type=Path, required=True, metavar="DIR", default=unset, help="what saw-build wrote"
    )
    parser.add_argument("--tokenizer_dir", type=Path, metavar="DIR", default=unset, help="by default the engine folder")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="apply the model's chat template: to --input_text or --input_file, or to what is typed, as a conversation",
    )
    parser.add_argument("--system_prompt", metavar="TEXT", default=unset, help="what a conversation begins with")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input_text", nargs="+", metavar="TEXT", default=unset, help="prompts, each an argument")
    source.add_argument(
        "--input_file", type=Path, metavar="FILE", default=unset, help="prompts, each a line; - is stdin"
    )
    parser.add_argument(
        "--max_output_len",
        type=int,
        metavar="N",
        default=unset,
        help="tokens to generate at most; by default 64, and in a conversation what the engine holds",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", default=unset, help="by default the likeliest token is taken"
    )
    parser.add_argument("--top_k", type=int, metavar="K", default=unset, help="choose among so many")
    parser.add_argument(
        "--top_p", type=float, metavar="P", default=unset, help="choose among this share of the probability"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=unset, help="seed of the choice")
    parser.add_argument("--stop_words", nargs="+", metavar="TEXT", default=unset, help="strings that end the text")
    parser.add_argument("--min_tokens", type=int, default=0, metavar="N", help="tokens before the text may end")
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, metavar="F", help="above 1 discourages repetition"
    )
    parser.add_argument("--kv_cache_max_tokens", type=int, metavar="N", default=unset, help="tokens of the KV cache")
    parser.add_argument(
        "--kv_cache_free_gpu_memory_fraction",
        type=float,
        default=KvCacheConfig.free_gpu_memory_fraction,
        metavar="F",
        help="its share of the free memory",
    )
    add_parallel(parser, server=False)
    add_no_verify(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    add_log_level(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-run --help``."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = vars(args)
    if not args.chat and not given.keys() & {"input_text", "input_file"}:
        parser.error("one of the arguments --input_text --input_file --chat is required")
    set_log_level(args.log_level)
    return run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    given = vars(args)
    if "system_prompt" in given and not args.chat:
        raise ConfigError("--system_prompt is part of a conversation: give --chat too")
    talks = not given.keys() & {"input_text", "input_file"}
    if talks and args.json:
        raise ConfigError("--json prints answers to prompts: give --input_text or --input_file too")
    params = SamplingParams(
        max_tokens=given.get("max_output_len", MAX_POSITIONS if args.chat else 64),
        min_tokens=args.min_tokens,
        temperature=given.get("temperature"),
        top_k=given.get("top_k"),
        top_p=given.get("top_p"),
        seed=given.get("seed"),
        stop=given.get("stop_words"),
        repetition_penalty=args.repetition_penalty,
    )
    prompts = [] if talks else given.get("input_text") or _read_prompts(args.input_file)
    cache = KvCacheConfig(given.get("kv_cache_max_tokens"), args.kv_cache_free_gpu_memory_fraction)
    options: dict[str, Any] = {
        "max_queue_size": 0,
        "verify": not args.no_verify,
        "parallel_config": parallel_config(args),
    }
    with LLM(args.engine_dir, given.get("tokenizer_dir"), cache, **options) as llm:
        if args.chat and not args.json:
            _chat(llm, params, given.get("system_prompt"), prompts)
            return
        start = time.monotonic()
        unit = "prompt" if "input_text" in given else "line"
        results = []
        for number, prompt in enumerate(prompts, 1):
            try:
                if args.chat:
                    results.append(Conversation(llm, params, given.get("system_prompt")).begin(prompt, False))
                else:
                    results.append(llm.generate_async(prompt, params, streaming=not args.json))
            except RequestError as e:
                raise (RequestError(f"{unit} {number}: {e}") if len(prompts) > 1 else e) from None
        if args.json:
            _print_json(results, start)
            return
        for prompt, result in zip(prompts, results, strict=True):
            _stream(prompt, result)
            if len(prompts) > 1:
                print()


def _chat(llm: LLM, params: SamplingParams, system_prompt: str | None, prompts: list[str]) -> None:
    """One conversation of what is typed, or one of each prompt."""
    if not prompts:
        Conversation(llm, params, system_prompt).run(typed_lines())
    for prompt in prompts:
        Conversation(llm, params, system_prompt).ask(prompt)
        if len(prompts) > 1:
            print()


def _read_prompts(path: Path | str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        path = "stdin" if str(path) == "-" else path
        prompts = [line.rstrip("\r") for line in data.decode("utf-8").removesuffix("\n").split("\n")] if data else []
    except OSError as e:
        raise RequestError(f"{path} cannot be read ({e.strerror}): give a file of prompts, one a line") from e
    except UnicodeDecodeError as e:
        raise RequestError(f"{path} is not valid UTF-8 at byte {e.start}: save it as UTF-8") from e
    if not prompts:
        raise RequestError(f"{path} holds no prompt: write one a line")
    if "" in prompts:
        raise RequestError(f"line {prompts.index('') + 1} of {path} is empty: write a prompt there, or delete the line")
    return prompts


def _stream(prompt: str, result: GenerationResult) -> None:
    """Print a prompt, and its text as it grows: to a pipe too."""
    print(prompt, end="", flush=True)
    begun = False
    for output in result:
        completion = output.outputs[0]
        if not begun and (completion.text or output.finished):
            print(completion.leading_space, end="")
            begun = True
        print(completion.text_diff, end="", flush=True)
    print()


def _print_json(results: list[GenerationResult], start: float) -> None:
    outputs = []
    with progress(len(results), "saw-run", "prompts") as bar:
        for result in results:
            outputs.append(result.result())
            bar.update()
    seconds = time.monotonic() - start
    for output in outputs:
        print(_as_json(output, seconds))


def _as_json(output: RequestOutput, seconds: float) -> str:
    completion = output.outputs[0]
    return json.dumps(
        {
            "prompt": output.prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "num_input_tokens": len(output.prompt_token_ids),
            "num_output_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "batch_seconds": round(seconds, 3),
        },
        ensure_ascii=sys.stdout.encoding.lower() != "utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
