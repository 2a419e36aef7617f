"""Tasks of our own for ``saw-eval --tasks``: a fact far back in a text, sums in chains, programs that must run.

``python -m benchmarks.accuracy.tasks --text pages.txt --output_dir tasks``, then ``saw-eval --tasks
saw_needle,saw_chain,saw_program --include_path tasks``. A document counts as right where each token of its answer is
the likeliest, with every token before it read from the cache; a program where it gives what it should.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from benchmarks.accuracy.programs import programs
from saw_trtllm.cli.common import run
from saw_trtllm.errors import ConfigError
from saw_trtllm.eval.text import read_text
from saw_trtllm.paths import is_folder

_COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "gray")
_PLACES = ("gate", "cellar", "tower", "garden", "kitchen", "library", "stable", "harbor")
_PROGRAM = "saw_program"
#: Chains that each document of ``saw_chain`` begins with, and sums of one.
_SHOTS, _SUMS = 4, 3
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
"""
_SCORED = """\
output_type: loglikelihood
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
_RUN = """\
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 48}
process_results: !function saw_program.process_results
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""

Document = dict[str, str]


def needles(text: str, num_words: int, count: int, seed: int = 0) -> list[Document]:
    """Questions for a number that stands once in ``num_words`` words of a text, at any depth of it."""
    words, rng = text.split(), random.Random(seed)
    if len(words) < num_words:
        raise ConfigError(f"the text has {len(words)} words and --words is {num_words}: give a longer text")
    documents = []
    for _ in range(count):
        start, depth = rng.randrange(len(words) - num_words + 1), rng.randrange(num_words)
        fact = f"The number of the {rng.choice(_COLORS)} {rng.choice(_PLACES)} is"
        answer = f" {rng.randrange(1000, 10000)}"
        there = words[start : start + num_words]
        there.insert(depth, f"{fact}{answer}.")
        documents.append({"prompt": f"{' '.join(there)}\n\nQ: What is the number?\nA: {fact}", "answer": answer})
    return documents


def chains(count: int, seed: int = 0) -> list[Document]:
    """Sums each of which goes on from the one before, after some that are solved."""
    rng = random.Random(seed)

    def chain() -> list[str]:
        total, sums = rng.randrange(1, 10), []
        for _ in range(_SUMS):
            more = rng.randrange(1, 10)
            sums.append(f"{total} + {more} = {total + more}")
            total += more
        return sums

    documents = []
    for _ in range(count):
        solved = "".join(", ".join(chain()) + ".\n" for _ in range(_SHOTS))
        *known, last = chain()
        question, _, answer = last.rpartition(" ")
        documents.append({"prompt": solved + ", ".join([*known, question]), "answer": f" {answer}"})
    return documents


def write_tasks(folder: Path, tasks: dict[str, list[Document]]) -> None:
    """Write each task's documents and what the harness has to know of it."""
    for name, documents in tasks.items():
        data = folder.resolve() / f"{name}.jsonl"
        data.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
        rest = _RUN if name == _PROGRAM else _SCORED
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, data=data) + rest, encoding="utf-8")
    # The harness looks for functions in files beside the task's.
    text = "from benchmarks.accuracy.programs import process_results as process_results\n"
    (folder / f"{_PROGRAM}.py").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.tasks", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to hide facts in")
    parser.add_argument("--words", type=int, default=1200, metavar="N", help="of it (default: %(default)s)")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="documents (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that is there")
    args = parser.parse_args(argv)
    return run(lambda: _write(args))


def _write(args: argparse.Namespace) -> None:
    if not is_folder(args.output_dir):
        raise ConfigError(f"--output_dir {args.output_dir} is not a folder: give one that is there")
    text = read_text(args.text)
    found = {"saw_needle": needles(text, args.words, args.count), "saw_chain": chains(args.count)}
    write_tasks(args.output_dir, found | {_PROGRAM: programs(args.count)})


if __name__ == "__main__":
    sys.exit(main())
