"""What reuse costs the last turn of a conversation: next-token distributions over a 4-bit cache beside an fp16 one.

Conversations are held with the 4-bit engine. Then its executor is given the same tokens in the steps that the runtime
makes of them: with reuse each turn is a prefill of what is new, after rows that earlier turns' prefills and decodes
wrote; without it the last turn's prompt is prefilled whole, in chunks of 512. The last answer is decoded either way.
With ``deterministic`` the runtime reuses only rows that a prefill of the whole prompt would write: it is as without.

    python -m benchmarks.accuracy.turns --exact engine_fp16 --engine_dir engine_saw_int4 --output turns.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from saw_trtllm.llm import PREFILL_CHUNK
from saw_trtllm.runtime.sampling import SamplingState

_TOPICS = (
    "how bread rises",
    "rivers and their deltas",
    "the invention of printing",
    "bees",
    "glass",
    "tides",
    "the violin",
    "copper",
    "maps",
    "vaccines",
    "bridges",
    "coffee",
    "steam engines",
    "coral reefs",
    "chess",
    "paper",
    "earthquakes",
    "silk",
    "lighthouses",
    "mushrooms",
    "the calendar",
    "salt",
    "sailing ships",
    "clocks",
)
_QUESTIONS = (
    "Tell me about {}.",
    "What is the most surprising thing about that?",
    "Explain it to a child.",
    "Give me an example.",
    "How did people find that out?",
    "What is often misunderstood about it?",
    "Compare it with something from everyday life.",
    "What would change without it?",
    "Which questions are still open?",
    "Sum up what you have said about {}.",
)


class Turn(NamedTuple):
    """All tokens before an answer, and the answer's."""

    prompt: list[int]
    answer: list[int]


def hold(llm: LLM, topic: str, answer_len: int) -> list[Turn]:
    """A conversation of ten turns."""
    messages: list[dict[str, str]] = []
    turns: list[Turn] = []
    for question in _QUESTIONS:
        new = [*messages, {"role": "user", "content": question.format(topic)}]
        # What was said stays as its tokens are: a text may have other tokens than those that made it.
        said = {"add_generation_prompt": False, "continue_final_message": True}
        known = len(llm.chat_prompt(messages, **said)["prompt_token_ids"]) if messages else 0
        rest = llm.chat_prompt(new)["prompt_token_ids"][known:]
        prompt = [*turns[-1].prompt, *turns[-1].answer, *rest] if turns else rest
        output = llm.generate(prompt, SamplingParams(max_tokens=answer_len, ignore_eos=True)).outputs[0]
        turns.append(Turn(prompt, output.token_ids))
        messages = [*new, {"role": "assistant", "content": output.text}]
    return turns


def replay(llm: LLM, conversations: list[list[Turn]], reuse: bool) -> np.ndarray:
    """Log-probabilities of the last answers' tokens, fp32 ``[conversations, tokens, vocab]``."""
    size = llm.config.build_config.tokens_per_block
    longest = max(len(turns[-1].prompt) + len(turns[-1].answer) for turns in conversations)
    blocks = -(-longest // size)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(len(conversations))]
    done = [0] * len(conversations)
    found: list[np.ndarray] = []
    for number in range(len(_QUESTIONS)) if reuse else [len(_QUESTIONS) - 1]:
        turns = [conversation[number] for conversation in conversations]
        first = []
        for i, (prompt, answer) in enumerate(turns):
            for start in [done[i], *range((done[i] // PREFILL_CHUNK + 1) * PREFILL_CHUNK, len(prompt), PREFILL_CHUNK)]:
                end = min(len(prompt), (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
                logits = _run(llm, [StepSequence(prompt[start:end], start, len(prompt), PREFILL, tables[i])])
            first.append(logits[0])
            done[i] = len(prompt) + len(answer) - 1
        found = [np.stack(first)]
        for k in range(len(turns[0].answer) - 1):
            found.append(
                _run(
                    llm,
                    [
                        StepSequence([answer[k]], len(prompt) + k, len(prompt), DECODE, table)
                        for (prompt, answer), table in zip(turns, tables, strict=True)
                    ],
                )
            )
    logits = np.stack(found, axis=1)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _run(llm: LLM, parts: list[StepSequence]) -> np.ndarray:
    """Compute a step; logits of each sequence's last token."""
    params = SamplingParams(max_tokens=1, return_generation_logits=True)
    states = [SamplingState(params, [], [], (), 0) for _ in parts]
    step = StepInputs.pack(parts, *(len(pool.layers) for pool in llm.config.pools))
    output = llm.executor.launch(step, states, [False] * len(parts)).result()
    return np.stack([logits[-1] for logits in output.logits if logits is not None])


def compare(exact: np.ndarray, other: np.ndarray) -> dict[str, list[float]]:
    """KL(exact | other) and the share of equal first choices: the mean over conversations, and its standard error."""
    kl = (np.exp(exact) * (exact - other)).sum(-1).mean(-1)
    top = (exact.argmax(-1) == other.argmax(-1)).mean(-1)
    return {"kl": _mean(kl), "top1": _mean(top)}


def _mean(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))]


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", type=Path, required=True, metavar="DIR", help="engine with an fp16 cache")
    parser.add_argument("--engine_dir", type=Path, required=True, metavar="DIR", help="engine with a 4-bit cache")
    parser.add_argument("--conversations", type=int, default=len(_TOPICS), metavar="N")
    parser.add_argument("--answer_len", type=int, default=40, metavar="N")
    parser.add_argument("--max_tokens", type=int, default=1 << 16, metavar="N", help="of the KV cache")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()

    cache = KvCacheConfig(args.max_tokens)
    with LLM(args.engine_dir, kv_cache_config=cache) as llm:
        conversations = [hold(llm, topic, args.answer_len) for topic in _TOPICS[: args.conversations]]
        found = {"reuse": replay(llm, conversations, True), "without": replay(llm, conversations, False)}
    with LLM(args.exact, kv_cache_config=cache) as llm:
        exact = replay(llm, conversations, False)
    table: dict[str, Any] = {name: compare(exact, rows) for name, rows in found.items()}
    table["difference"] = {"kl": _mean((np.exp(exact) * (found["without"] - found["reuse"])).sum(-1).mean(-1))}
    table["prompt_tokens"] = float(np.mean([len(turns[-1].prompt) for turns in conversations]))
    args.output.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
