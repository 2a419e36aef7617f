"""Text from an engine, whole and as it grows: ``python examples/generate.py ENGINE``, with what saw-build wrote."""

import sys

from saw_trtllm import LLM, SamplingParams

PROMPTS = ["def main():", "class Queue:", "The module provides"]


def main() -> None:
    """Answer a batch of prompts, then stream one text."""
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "engine") as llm:
        for output in llm.generate(PROMPTS, SamplingParams(max_tokens=32)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
        params = SamplingParams(max_tokens=64, temperature=0.8, top_p=0.95, seed=1)
        for output in llm.generate_async(PROMPTS[0], params, streaming=True):
            print(output.outputs[0].text_diff, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
