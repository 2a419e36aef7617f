"""What reuse costs the last answer of a conversation: next-token distributions over 4-bit caches beside an fp16 one.

Conversations of ten turns are held with an engine that has an fp16 cache. Then the model is run over their tokens with
each cache's rows as the runtime's steps write and read them (``steps_of``): with reuse a turn is a prefill of what is
new, after rows that earlier turns' prefills and decodes wrote; without it, and with ``deterministic``, the last turn's
prompt is prefilled whole, in chunks of 512. The last answer is decoded either way.

    saw-build --model_dir SmolLM2-135M-Instruct --kv fp16 --output_dir engine
    python -m benchmarks.accuracy.turns --model_dir SmolLM2-135M-Instruct --engine_dir engine --output turns.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.backends.reference.quantizers import KVQuantizer
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.engine.limits import PREFILL_CHUNK
from saw_trtllm.eval.session import open_model
from saw_trtllm.eval.variants import grid

_TOPICS = (
    *("how bread rises", "rivers and their deltas", "the invention of printing", "bees", "glass", "tides"),
    *("the violin", "copper", "maps", "vaccines", "bridges", "coffee", "steam engines", "coral reefs", "chess"),
    *("paper", "earthquakes", "silk", "lighthouses", "mushrooms", "the calendar", "salt", "sailing ships", "clocks"),
    *("volcanoes", "honey", "the telescope", "windmills", "penguins", "rainbows", "rice", "the compass", "castles"),
    *("olive oil", "glaciers", "trains", "the moon", "tea", "wool", "concrete"),
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
#: Of a line of code that asks for more.
_BEGINNINGS = ("def ", "class ", "if ", "for ", "return ")
#: Conversations that are held at a time.
_GROUP = 20


class Turn(NamedTuple):
    """All tokens before an answer, and the answer's."""

    prompt: list[int]
    answer: list[int]


def hold(llm: LLM, topics: Sequence[str], answer_len: int) -> list[list[Turn]]:
    """Conversations of ten turns, a turn of all of them at a time."""
    messages: list[list[dict[str, str]]] = [[] for _ in topics]
    turns: list[list[Turn]] = [[] for _ in topics]
    for question in _QUESTIONS:
        prompts = []
        for topic, said, before in zip(topics, messages, turns, strict=True):
            # What was said stays as its tokens are: a text may have other tokens than those that made it.
            as_is = {"add_generation_prompt": False, "continue_final_message": True}
            known = len(llm.chat_prompt(said, **as_is)["prompt_token_ids"]) if said else 0
            said.append({"role": "user", "content": question.format(topic)})
            rest = llm.chat_prompt(said)["prompt_token_ids"][known:]
            prompts.append([*before[-1].prompt, *before[-1].answer, *rest] if before else rest)
        outputs = llm.generate(prompts, SamplingParams(max_tokens=answer_len, ignore_eos=True))
        for said, before, prompt, output in zip(messages, turns, prompts, outputs, strict=True):
            before.append(Turn(prompt, output.outputs[0].token_ids))
            said.append({"role": "assistant", "content": output.outputs[0].text})
    return turns


def hold_code(llm: LLM, paths: Sequence[Path], count: int, answer_len: int) -> list[list[Turn]]:
    """Conversations with a model that has no chat template, in Python: of two lines of some files a turn."""
    assert llm.tokenizer is not None
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    lines = [line for line in text.split("\n") if line.strip().startswith(_BEGINNINGS)]
    random.Random(3).shuffle(lines)
    questions = cycle(lines)
    turns: list[list[Turn]] = [[] for _ in range(count)]
    for _ in _QUESTIONS:
        prompts = []
        for before in turns:
            question = f"\n\n{next(questions)}\n{next(questions)}\n"
            new = llm.tokenizer.encode(question, add_special_tokens=not before)
            prompts.append([*before[-1].prompt, *before[-1].answer, *new] if before else new)
        outputs = llm.generate(prompts, SamplingParams(max_tokens=answer_len, ignore_eos=True))
        for before, prompt, output in zip(turns, prompts, outputs, strict=True):
            before.append(Turn(prompt, output.outputs[0].token_ids))
    return turns


def steps_of(turns: Sequence[Turn], history: str, chunk: int = PREFILL_CHUNK) -> np.ndarray:
    """For each token, the first one that its step does not read from the cache: int64 ``[num_tokens]``.

    A prefill sees its own chunk as it is; a decode reads its own token too.

    Parameters
    ----------
    turns : sequence of Turn
    history : str
        "reuse": each turn prefills what is new. "prompts": and the answer before it, as where only prompts are found
        again. "none": the last turn prefills everything. "decoded": every token is decoded.
    chunk : int
        A prefill's chunks end at its multiples.
    """
    last = turns[-1]
    first = np.arange(len(last.prompt) + len(last.answer)) + 1
    done = 0
    for prompt, answer in {"none": [last], "decoded": []}.get(history, turns):
        places = np.arange(done, len(prompt))
        first[places] = np.maximum(done, places // chunk * chunk)
        # A text's last token is drawn and never computed.
        done = len(prompt) + (len(answer) - 1 if history == "reuse" else 0)
    return first


class _Stepwise:
    """A cache as queries of steps of both kinds see it: from ``first`` of each on they see what their step computed."""

    tokenwise = False  # what a step computed is kept beside its rows

    def __init__(self, rows: KVQuantizer, first: np.ndarray) -> None:
        self.quantize, self.layer_bytes = rows.quantize, rows.layer_bytes
        self._first = torch.from_numpy(first)

    def first_exact(self, lengths: torch.Tensor) -> torch.Tensor:
        return self._first[lengths.cpu() - 1].to(lengths.device)


def answer_logprobs(model: WindowModel, turn: Turn, rows: KVQuantizer, first: np.ndarray) -> torch.Tensor:
    """Log-probabilities where the answer's tokens are drawn, fp32 ``[tokens, vocab]``."""
    prompt, answer = turn
    # The last token is drawn, and nothing follows it.
    hidden = model.hidden(torch.tensor([[*prompt, *answer[:-1]]]), _Stepwise(rows, first))
    return model.logits(hidden[0, len(prompt) - 1 :]).log_softmax(-1)


def compare(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """KL(exact | other), and the share of equal first choices: means over an answer."""
    kl = (exact.exp() * (exact - other)).sum(-1).mean()
    return float(kl), float((exact.argmax(-1) == other.argmax(-1)).float().mean())


def table(found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Means over conversations with their standard errors; of each cache also what other histories differ by."""
    rows: dict[str, Any] = {}
    for name, values in found.items():
        kl, top = np.array(values).T
        rows[name] = {"kl": _mean(kl), "top1": _mean(top)}
        base = found[f"{name.rsplit(', ', 1)[0]}, none"]
        if base is not values:
            difference = np.array(values) - np.array(base)
            rows[name] |= {"kl_more": _mean(difference[:, 0]), "top1_more": _mean(difference[:, 1])}
    return rows


def _mean(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))]


def measure(
    model: WindowModel,
    conversations: Iterable[Sequence[Turn]],
    caches: dict[str, KVQuantizer],
    histories: Sequence[str],
) -> dict[str, list[tuple[float, float]]]:
    """What :func:`compare` gives for each cache and history, conversation by conversation."""
    found: dict[str, list[tuple[float, float]]] = {f"{c}, {h}": [] for c in caches for h in histories}
    for turns in conversations:
        exact = answer_logprobs(model, turns[-1], model.exact, steps_of(turns, "none"))
        for name, rows in caches.items():
            for history in histories:
                other = answer_logprobs(model, turns[-1], rows, steps_of(turns, history))
                found[f"{name}, {history}"].append(compare(exact, other))
    return found


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--engine_dir", type=Path, required=True, metavar="DIR", help="its engine with an fp16 cache")
    parser.add_argument("--kv", default="fp16,saw_int4,int4", metavar="NAMES", help="caches (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of another saw_int4 cache")
    parser.add_argument("--history", default="reuse,prompts,none,decoded", metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--conversations", type=int, default=len(_TOPICS), metavar="N")
    parser.add_argument("--code", type=Path, nargs="+", metavar="FILE", help="Python, for a model of code")
    parser.add_argument("--answer_len", type=int, default=48, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()

    topics = _TOPICS[: args.conversations]
    with LLM(args.engine_dir, kv_cache_config=KvCacheConfig(_GROUP << 11)) as llm:
        groups = [topics[i : i + _GROUP] for i in range(0, len(topics), _GROUP)]
        conversations = (
            hold_code(llm, args.code, args.conversations, args.answer_len)
            if args.code
            else [turns for group in groups for turns in hold(llm, group, args.answer_len)]
        )
    longest = max(len(turns[-1].prompt) + len(turns[-1].answer) for turns in conversations)
    model = open_model(Checkpoint.open(args.model_dir), longest)
    caches = {v.k_format.kv: v.quantizer(model.exact) for v in grid(model.config, args.kv.split(","))}
    if args.calibration is not None:
        [calibrated] = grid(model.config, ["saw_int4"], calibrations=[args.calibration])
        caches["calibrated"] = calibrated.quantizer(model.exact, Calibration.load(args.calibration))
    rows = table(measure(model, conversations, caches, args.history.split(",")))
    prompt_tokens = float(np.mean([len(turns[-1].prompt) for turns in conversations]))
    result = {"conversations": len(conversations), "prompt_tokens": prompt_tokens, "rows": rows}
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
