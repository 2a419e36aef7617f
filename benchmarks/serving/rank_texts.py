"""Whether an engine of several ranks gives the texts of the reference of one: ``--help``.

Prompts of random tokens, greedy texts. An engine in 16 bits may leave the reference's text where two tokens are as near
to each other as its rounding: then it counts how far both go together.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.build import build, plan_build
from saw_trtllm.cli.common import print_table, run
from saw_trtllm.plan.options import BuildOptions

_LIMITS = {"max_batch_size": 16, "max_seq_len": 256, "max_num_tokens": 512}


def texts(
    folder: Path, model_dir: Path, backend: str, kv: str, tp_size: int, count: int, length: int
) -> list[list[int]]:
    """Build an engine, and have its ranks, which are plain processes, continue so many prompts."""
    options = {"model_dir": model_dir, "output_dir": folder, "backend": backend, "kv": kv, "tp_size": tp_size}
    build(plan_build(BuildOptions(**options, **_LIMITS)))
    numbers = random.Random(2)
    with LLM(folder, parallel_config={"ranks": "processes"}) as llm:
        vocab = llm.config.pretrained_config.vocab_size
        prompts = [[numbers.randrange(3, vocab) for _ in range(numbers.randint(4, 100))] for _ in range(count)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=length, ignore_eos=True))
        assert isinstance(outputs, list)
        return [output.outputs[0].token_ids for output in outputs]


def together(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens from the beginning that two texts have in common."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.rank_texts", description=__doc__)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--tp_size", type=int, required=True, metavar="N")
    parser.add_argument("--backend", choices=("reference", "tensorrt"), default="tensorrt")
    parser.add_argument("--kv", default="fp16")
    parser.add_argument("--texts", type=int, default=16, metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="of each (default: %(default)s)")
    args = parser.parse_args(argv)

    def compare() -> None:
        with tempfile.TemporaryDirectory(prefix="ranks-") as temporary:
            folder, sizes = Path(temporary), (args.texts, args.tokens)
            expected = texts(folder / "1", args.model_dir, "reference", args.kv, 1, *sizes)
            found = texts(folder / "n", args.model_dir, args.backend, args.kv, args.tp_size, *sizes)
        lengths = [together(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
        equal = sum(length == args.tokens for length in lengths)
        print_table(
            {
                "ranks": f"{args.tp_size} of {args.backend}, beside one of the reference",
                "texts equal": f"{equal} of {len(lengths)}",
                "tokens until the first other one": f"{sum(lengths)} of {args.tokens * len(lengths)}",
            }
        )

    return run(compare)


if __name__ == "__main__":
    sys.exit(main())
