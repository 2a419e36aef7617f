"""``python -m benchmarks weights``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.command import finish
from saw_trtllm.errors import BackendUnavailableError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    weights = commands.add_parser(
        "weights",
        help="divergence of quantized models from the original, by our reference and by transformers",
        description="Compare quantized models with the one that they were made from, token by token: computed by the "
        "CPU reference from the quantized weights, and by transformers from the dequantized ones.",
    )
    weights.add_argument("--model_dir", type=Path, required=True, help="Hugging Face folder of the original")
    weights.add_argument("--quantized", type=Path, nargs="+", required=True, metavar="DIR", help="quantized models")
    weights.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    weights.add_argument("--max_tokens", type=int, default=4096, metavar="N", help="of the text (default: %(default)s)")
    weights.add_argument("--max_seq_len", type=int, default=512, metavar="N", help="of a window (default: %(default)s)")
    finish(weights, _run)


def _run(args: argparse.Namespace, command: str) -> None:
    try:
        from benchmarks.weights.run import run_weights
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(
            f"the weights' benchmark needs {e.name}, which is not installed: pip install 'saw-trtllm[eval,test]'"
        ) from e
    from benchmarks.weights.report import report

    lengths = (args.max_tokens, args.max_seq_len)
    results = run_weights(args.model_dir, args.quantized, args.text, *lengths, command, args.commit)
    if args.output is not None:
        results.save(args.output)
    print(report(results).plain())
