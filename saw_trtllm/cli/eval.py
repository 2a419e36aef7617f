"""``saw-eval``: what a 4-bit cache costs a checkpoint, and which levers win it back."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.cli.common import add_fields, add_log_level, parse_fields, print_columns, run, set_log_level
from saw_trtllm.errors import BackendUnavailableError, ConfigError, SawError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.progress import progress

if TYPE_CHECKING:
    from saw_trtllm.checkpoint.calibration import Calibration
    from saw_trtllm.eval.session import Evaluation
    from saw_trtllm.eval.variants import Variant

#: Tokens of a task's sequences where neither the model nor a flag says less.
DEFAULT_TASK_LENGTH = 4096

_EXAMPLES = """\
examples:
  saw-eval --model_dir Llama-3.2-1B --text book.txt --max_tokens 32768
  saw-eval --model_dir Llama-3.2-1B --text book.txt --kv fp16,int4,saw_int4 --hadamard_order 16,32,64 --report report
  saw-eval --model_dir Llama-3.2-1B --text book.txt --calibration none,calib.safetensors --suggest
  saw-eval --model_dir Llama-3.2-1B-AWQ --original_dir Llama-3.2-1B --text book.txt
  saw-eval --model_dir Llama-3.2-1B --tasks gsm8k --limit 100
"""


class EvalOptions(BaseModel):
    """``saw-eval``'s flags: each field is one, its description the help. Lists go with commas, and all combine."""

    model_config = ConfigDict(protected_namespaces=())

    model_dir: Path | None = Field(None, description="Hugging Face model folder")
    checkpoint_dir: Path | None = Field(None, description="TensorRT-LLM checkpoint folder, instead of --model_dir")
    tokenizer_dir: Path | None = Field(None, description="tokenizer's folder; by default the model's")
    qformat: Literal["auto", "fp8", "int4_wo"] = Field(
        "auto", description="round the weights of a 16-bit model as saw-build does, and measure what that costs too"
    )
    original_dir: Path | None = Field(
        None, description="of a quantized model: the one that it was made from, to measure what its weights cost too"
    )
    text: Path | None = Field(None, description="UTF-8 text to predict; - is stdin")
    kv: str = Field(
        "fp16,fp8,int4,saw_int4",
        description="caches to compare, with commas; saw_k8v4 is another one, and fp8 (e4m3 without scales) is there "
        "to compare with",
    )
    hadamard_order: str | None = Field(
        None, description="orders of the rotation, with commas; by default the largest that divides head_dim"
    )
    rotate_v: str | None = Field(None, description="enable, disable or both with a comma; by default the format's")
    range_factor: str | None = Field(
        None,
        description="shares of a row's range that the codes span, with commas; 0.95/0.9 sets K and V apart; "
        "by default the format's",
    )
    calibration: str | None = Field(
        None, description="files of saw-calibrate, with commas; none among them is going without"
    )
    kv_skip_layers: str | None = Field(
        None,
        description="layers whose cache stays in the model's dtype, like 0,1,last; several sets with ; between them",
    )
    kv_bits: str | None = Field(
        None, description="layers of saw_int4 with 8-bit keys, like 8/4:0,1,last; several sets with ; between them"
    )
    max_tokens: int | None = Field(None, description="tokens of the text to use; by default all of its whole windows")
    max_seq_len: int | None = Field(
        None, description="tokens of a window; by default as many as the model and the text allow"
    )
    greedy_tokens: int = Field(128, description="length of the greedy continuations that are compared; 0 for none")
    suggest: bool = Field(
        False, description="give more bits to the layers of the last cache, one by one, and name those that pay"
    )
    budget: float | None = Field(
        None, gt=0, description="bytes of a token over all layers that --suggest chooses layers' bits for"
    )
    tasks: str | None = Field(None, description="tasks of lm-evaluation-harness, with commas, instead of a text")
    include_path: Path | None = Field(None, description="folder with further tasks")
    num_fewshot: int | None = Field(None, description="examples in each prompt of a task; by default the task's own")
    limit: int | None = Field(None, description="documents of each task to use; by default all")
    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one")
    report: Path | None = Field(None, description="folder to write an HTML report and its numbers to")


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-eval", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_fields(parser, EvalOptions)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_log_level(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-eval --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: _evaluate(parse_fields(args, EvalOptions), args.json))


def _evaluate(options: EvalOptions, as_json: bool) -> None:
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailableError("saw-eval needs PyTorch, which is not installed: pip install 'saw-trtllm[eval]'")
    if (options.text is None) == (options.tasks is None):
        given = "neither" if options.text is None else "both"
        raise ConfigError(f"{given} of --text and --tasks was given: give one of them")
    checkpoint = Checkpoint.open_given(options.checkpoint_dir, options.model_dir)
    try:
        (_run_text if options.tasks is None else _run_tasks)(options, checkpoint, as_json)
    except RuntimeError as e:
        # CUDA's own class for it is a RuntimeError; the CPU has none.
        if isinstance(e, SawError) or "memory" not in str(e).lower():
            raise
        raise ConfigError(
            "the memory of this device is too small for the model and the windows: give a smaller --max_seq_len, or "
            "--device cpu"
        ) from e


def _run_text(options: EvalOptions, checkpoint: Checkpoint, as_json: bool) -> None:
    from saw_trtllm.eval.session import Session
    from saw_trtllm.eval.text import load_tokenizer, make_windows, read_text

    if options.report is not None:
        # Found out now, and not when an hour's work is to be written.
        from saw_trtllm.eval.report import write_report
    variants, calibrations = _variants(options, checkpoint)
    suggest_for = _suggest_for(options, variants)
    tokenizer = load_tokenizer(checkpoint, options.tokenizer_dir)
    ids = tokenizer.encode(read_text(cast(Path, options.text)))
    longest, lengths = checkpoint.config.max_positions, (options.max_seq_len, options.max_tokens)
    windows = make_windows(ids, longest, *lengths, tokenizer.bos_id)
    original = _original(options, checkpoint)
    session = Session(checkpoint, windows, options.device, options.greedy_tokens, options.qformat, original)
    quantizers = {v.name: v.quantizer(session.model.exact, calibrations.get(v.calibration)) for v in variants}
    wide = None if suggest_for is None else suggest_for.widened(calibrations.get(suggest_for.calibration))
    with progress(session.num_steps(len(variants), suggest_for, options.budget), "saw-eval", "windows") as bar:
        evaluation = session.run(
            variants, quantizers, suggest_for=suggest_for, wide=wide, budget=options.budget, progress=bar.update
        )
    page = None if options.report is None else write_report(evaluation, options.report)
    if as_json:
        print(json.dumps(evaluation.as_dict()))
        return
    _print(evaluation)
    if page is not None:
        print(f"\nreport: {page}")


def _original(options: EvalOptions, checkpoint: Checkpoint) -> Checkpoint | None:
    """What the weights that are measured were quantized from, if that is to be measured against."""
    if options.original_dir is None:
        return None if options.qformat == "auto" else checkpoint
    if options.qformat != "auto":
        raise ConfigError(
            "--original_dir and --qformat were both given, and --qformat has its original: give one of them"
        )
    original = Checkpoint.open(options.original_dir)
    ours, theirs = (c.config.model_copy(update={"dtype": "float32"}) for c in (checkpoint, original))
    fields = set(ModelConfig.model_fields) - {"quantization", "mapping", "share_embedding_table"}
    odd = next((name for name in sorted(fields) if getattr(ours, name) != getattr(theirs, name)), None)
    if odd is not None:
        raise ConfigError(
            f"{original.folder} has {odd} {getattr(theirs, odd)} and {checkpoint.folder} has {getattr(ours, odd)}: "
            "give the model that this one was quantized from"
        )
    return original


def _variants(options: EvalOptions, checkpoint: Checkpoint) -> tuple[list[Variant], dict[Path | None, Calibration]]:
    """The grid, and what its calibration files hold."""
    from saw_trtllm.checkpoint.calibration import Calibration
    from saw_trtllm.eval import variants as v
    from saw_trtllm.format import KVFormat
    from saw_trtllm.plan.formats import default_rotate_v
    from saw_trtllm.plan.plan import layers_apart

    config = checkpoint.config
    files = v.parse_calibrations(options.calibration)
    calibrations: dict[Path | None, Calibration] = {}
    for path in filter(None, files):
        calibrations[path] = Calibration.load(path)
        calibrations[path].check(checkpoint)
    # Each set is held against a cache that has such layers; others go without.
    rows = KVFormat("saw_int4", config.head_size, config.dtype)
    skipped, bits = (
        [None if given == "none" else given for given in (text or "none").split(";")]
        for text in (options.kv_skip_layers, options.kv_bits)
    )
    grid = v.grid(
        config,
        v.parse_list(options.kv),
        v.parse_orders(options.hadamard_order),
        v.parse_switches(options.rotate_v) if options.rotate_v else [default_rotate_v(checkpoint, checkpoint.formats)],
        v.parse_factors(options.range_factor),
        files,
        [layers_apart(*pair, rows, config.num_hidden_layers) for pair in itertools.product(skipped, bits)],
    )
    return grid, calibrations


def _suggest_for(options: EvalOptions, variants: list[Variant]) -> Variant | None:
    if not options.suggest:
        if options.budget is not None:
            raise ConfigError("--budget was given without --suggest, which chooses for it: add --suggest")
        return None
    found = [v for v in variants if v.k_format.quantized and not (v.skip_layers or v.k8_layers)]
    if not found:
        raise ConfigError("--suggest needs a 4-bit cache without skipped layers: add saw_int4 to --kv")
    return found[-1]


def _print(evaluation: Evaluation) -> None:
    from saw_trtllm.eval.tables import difference_table, layer_table, quality_table, suggestion_table, weights_table

    a = evaluation.about
    print(f"{a['model']}: {a['num_tokens']} tokens in windows of {a['max_seq_len']}, {a['device']}, {a['seconds']} s\n")
    print_columns(*quality_table(evaluation))
    if evaluation.with_weights is not None:
        print("\nagainst the model that the weights were quantized from, with an exact cache\n")
        print_columns(*weights_table(evaluation.with_weights))
    if sum(s["kv"] != "fp16" for s in evaluation.settings.values()) > 1:
        print("\ncaches against each other, with standard errors; ~ is within two of them\n")
        print_columns(*difference_table(evaluation))
    print(
        "\nby layer, its input being exact: the largest channel of the keys over the median one, as they are and "
        "rotated; error of the softmax's logits in nats, and of outputs relative to them\n"
    )
    print_columns(*layer_table(evaluation))
    if evaluation.suggestion is None:
        return
    print(f"\nmore bits for layers of {evaluation.suggested_for}, on {a['detail_tokens']} tokens\n")
    print_columns(*suggestion_table(evaluation))
    flags, budget = evaluation.suggestion.worth.flags, evaluation.suggestion.budget
    if flags:
        print(f"\nthese pay: {flags}")
    elif budget is None:
        print("\nno layer gains clearly more than a layer does on average, by more than three standard errors")
    else:
        print(f"\nwithin {budget:,.0f} bytes no layer's gain is more than three standard errors")


def _run_tasks(options: EvalOptions, checkpoint: Checkpoint, as_json: bool) -> None:
    from saw_trtllm.eval.harness import CacheScorer, numbers, run_tasks
    from saw_trtllm.eval.session import open_model
    from saw_trtllm.eval.text import load_tokenizer
    from saw_trtllm.eval.variants import parse_list

    if options.report is not None or options.suggest or options.original_dir is not None:
        raise ConfigError("--report, --suggest and --original_dir belong to --text: leave them out with --tasks")
    variants, calibrations = _variants(options, checkpoint)
    tokenizer = load_tokenizer(checkpoint, options.tokenizer_dir)
    longest = checkpoint.config.max_positions
    length = min(longest, DEFAULT_TASK_LENGTH) if options.max_seq_len is None else options.max_seq_len
    if not 2 <= length <= longest:
        raise ConfigError(f"max_seq_len is {length}: it must be from 2 to the model's {longest} positions")
    model = open_model(checkpoint, length, options.device, options.qformat)
    scorers = {}
    for v in variants:
        quantizer = v.quantizer(model.exact, calibrations.get(v.calibration))
        scorers[v.name] = CacheScorer(model, tokenizer, checkpoint, v, quantizer, length)
    results = run_tasks(
        scorers,
        parse_list(options.tasks or ""),
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
    )
    if as_json:
        print(json.dumps(results, default=str))
        return
    columns = {
        name: {(t, m): x for t, found in tasks.items() for m, x in numbers(found).items()}
        for name, tasks in results.items()
    }
    rows = [[*key, *(f"{column[key]:.4f}" for column in columns.values())] for key in next(iter(columns.values()))]
    print_columns(["task", "metric", *columns], rows)


if __name__ == "__main__":
    sys.exit(main())
