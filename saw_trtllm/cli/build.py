"""``saw-build``: compile a checkpoint to an engine with a 4-bit KV cache."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time

from tqdm import tqdm

from saw_trtllm.build import build, plan_build, tokens_that_fit
from saw_trtllm.checkpoint.families import family_of
from saw_trtllm.cli.common import add_fields, add_log_level, format_bytes, parse_fields, print_table, run, set_log_level
from saw_trtllm.paths import is_file
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.progress import progress

log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  saw-build --model llama --kv saw_int4 --checkpoint_dir ckpt --output_dir engine
  saw-build --model_dir Llama-3.1-8B-Instruct --kv saw_int4 --max_seq_len 16384 --dry_run
  saw-build --model_dir Llama-3.1-8B-Instruct --backend tensorrt --dtype float16 --output_timing_cache llama.cache
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-build", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_fields(parser, BuildOptions)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and write nothing")
    add_log_level(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-build --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: _build(parse_fields(args, BuildOptions), args.dry_run))


def _build(options: BuildOptions, dry_run: bool) -> None:
    start = time.monotonic()
    plan = plan_build(options)
    if dry_run:
        print_table(describe(plan))
        print(f"dry run: nothing was written to {plan.output_dir}")
        _warn(plan)
        return
    with progress(plan.num_steps, "saw-build", "tensors") as bar:
        engine_bytes = build(plan, lambda _: bar.update(), PhaseBars() if sys.stderr.isatty() else None)
    rows = describe(plan)
    rows["engine"] = f"{format_bytes(engine_bytes)} in {plan.output_dir}"
    rows["wall time"] = f"{time.monotonic() - start:.1f} s"
    rows["next"] = shlex.join(_next_command(plan))
    print_table(rows)
    _warn(plan)


def _next_command(plan: BuildPlan) -> list[str]:
    """A command that works with the engine as it is."""
    folder, length = str(plan.output_dir), min(64, plan.config.build_config.max_seq_len // 2)
    has_tokenizer = is_file(plan.output_dir / "tokenizer.json")
    if plan.config.saw_int4.backend == "tensorrt_llm":
        tokenizer = [] if has_tokenizer else ["--tokenizer_dir", "FOLDER"]
        return ["saw-triton", "--backend", "tensorrtllm", "--engine_dir", folder, *tokenizer]
    if has_tokenizer:
        return ["saw-run", "--engine_dir", folder, "--input_text", "Hello", "--max_output_len", str(length)]
    generate = f"LLM({folder!r}).generate([0], SamplingParams({length})).outputs[0].token_ids"
    return ["python", "-c", f"from saw_trtllm import LLM, SamplingParams; print({generate})"]


def _warn(plan: BuildPlan) -> None:
    # At the end, where it is seen, and not in front of the sentence of a build that fails.
    for warning in plan.warnings:
        log.warning("%s", warning)


class PhaseBars:
    """A bar for each phase of TensorRT's build, below that of the phase it is in."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """Add a bar."""
        self._bars[name] = tqdm(total=num_steps, desc=name, unit="step", position=len(self._bars) + 1, leave=False)

    def step(self, name: str) -> None:
        """Move it on."""
        if name in self._bars:
            self._bars[name].update()

    def finish(self, name: str) -> None:
        """Take it away."""
        if name in self._bars:
            self._bars.pop(name).close()


def describe(plan: BuildPlan) -> dict[str, str]:
    """What a build gives, line by line."""
    model, limits, kv_format = plan.config.pretrained_config, plan.config.build_config, plan.config.kv_format
    if kv_format.rotated:
        rotated = "K and V" if kv_format.rotate_v else "K"
        detail = f", {rotated} rotated by Hadamard blocks of {kv_format.hadamard_order}"
    else:
        detail = ""
    saw = plan.config.saw_int4
    for layers, kept in ((saw.k8_layers, "with keys in 8 bits"), (saw.kv_skip_layers, f"in {model.dtype}")):
        if layers:
            detail += f", {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))} {kept}"
    sizes = sorted({kv_format.k_row_bytes, kv_format.row_bytes}, reverse=True)
    fp16, ours = plan.bytes_per_token("fp16"), plan.bytes_per_token()
    rows = {
        "model": f"{family_of(model).name}: {model.num_hidden_layers} layers, {model.num_attention_heads} query and "
        f"{model.num_key_value_heads} KV heads of {model.head_size}, vocabulary {model.vocab_size}, {model.dtype}",
        "backend": f"{plan.config.saw_int4.backend} ({plan.backend_reason})",
        **(
            {} if plan.config.tp_size == 1 else {"ranks": f"{plan.config.tp_size}; memory and tokens below are of each"}
        ),
        "limits": f"max_batch_size {limits.max_batch_size}, max_input_len {limits.max_input_len}, max_seq_len "
        f"{limits.max_seq_len}, max_num_tokens {limits.max_num_tokens}, tokens_per_block {limits.tokens_per_block}",
        "KV cache": f"{kv_format.kv}, rows of {' and '.join(map(str, sizes))} bytes{detail}",
        **({} if plan.calibration is None else {"calibration": plan.calibration.describe()}),
        "weights": describe_weights(plan.weights.of_rank(0).bytes_by_kind()),
        "KV per token": f"{ours:,} bytes"
        + (f", {fp16:,} in {model.dtype}: {fp16 / ours:.2f}x" if ours != fp16 else ""),
    }
    if any(plan.config.windows):
        longest = limits.max_seq_len
        size, whole = plan.sequence_bytes(longest), longest * plan.bytes_per_token("fp16")
        rows["KV per sequence"] = (
            f"{format_bytes(size)} of {longest} tokens, bounded by windows; {format_bytes(whole)} in {model.dtype} "
            f"without bounds: {whole / size:.1f}x"
        )
    if plan.config.saw_int4.backend != "tensorrt_llm":  # whose executor goes by the memory of each rank's GPU
        rows["tokens that fit"] = f"{tokens_that_fit(plan):,}" + (
            f", {tokens_that_fit(plan, 'fp16'):,} in {model.dtype}" if ours != fp16 else ""
        )
    return rows


def describe_weights(kinds: dict[str, int]) -> str:
    """Bytes of weights, and of each kind of them where there are several."""
    parts = ", ".join(f"{format_bytes(size)} {kind}" for kind, size in kinds.items())
    return format_bytes(sum(kinds.values())) + (f": {parts}" if len(kinds) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
