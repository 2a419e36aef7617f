"""What clients of a server see when a rank of its engine is killed under load: ``--help``.

The same greedy texts three times, through saw-serve by OpenAI's client or through Triton's HTTP: at rest, with rank 1
killed in their middle, and once more. All are compared with those at rest; those of an engine in 16 bits may part from
them where another batch rounds otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil

from saw_trtllm.cli.common import print_table, run
from saw_trtllm.errors import ConfigError

#: Seconds that a text may take, its replay after the ranks' restart included.
PATIENCE = 120.0
#: What the processes of ranks have in their command lines: plain ones, and Ray's actors.
_RANKS = ("run_rank", "ray::_Rank")

#: Gives the pieces of a text: of the server's address, a prompt and a number of tokens.
Ask = Callable[[str, str, int], Iterator[str]]


def ask_openai(url: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """A completion's pieces."""
    from openai import OpenAI

    with OpenAI(base_url=url + "/v1", api_key="-", timeout=PATIENCE, max_retries=0) as client:
        model = client.models.list().data[0].id
        asked = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        for chunk in client.completions.create(**asked, stream=True):
            yield from (choice.text for choice in chunk.choices)


def ask_triton(url: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """The pieces of the ensemble's answer."""
    body = {"text_input": prompt, "max_tokens": max_tokens, "stream": True, "exclude_input_in_output": True}
    address = url + "/v2/models/ensemble/generate_stream"
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode()), timeout=PATIENCE) as lines:
        for line in lines:
            if line.startswith(b"data: "):
                answer = json.loads(line[6:])
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                yield answer["text_output"]


ASK: dict[str, Ask] = {"openai": ask_openai, "triton": ask_triton}


@dataclass
class Texts:
    """Texts that were asked for at once.

    Attributes
    ----------
    texts : list of str
        Without those that failed.
    failures : list of str
    arrivals : list of float
        When a piece of any text came.
    """

    texts: dict[int, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)

    def equal(self, others: Texts) -> str:
        """How many are as others', in words."""
        same = sum(others.texts.get(i) == text for i, text in self.texts.items())
        failed = f", {len(self.failures)} failed: {self.failures[0]}" if self.failures else ""
        return f"{same} of {len(self.texts)} as at rest{failed}"


def ask_all(ask: Ask, url: str, prompts: Sequence[str], max_tokens: int) -> Texts:
    """Ask for all texts at once."""
    found = Texts()

    def one(number: int) -> None:
        pieces = []
        try:
            for piece in ask(url, prompts[number], max_tokens):
                found.arrivals.append(time.monotonic())
                pieces.append(piece)
            found.texts[number] = "".join(pieces)
        except Exception as e:  # whatever a client raises is what its user sees
            found.failures.append(f"{type(e).__name__}: {e}")

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(one, range(len(prompts))))
    return found


def rank_pids(server: int) -> list[int]:
    """The processes of a server's ranks, the first rank first."""
    found = [p for p in psutil.Process(server).children(recursive=True) if _is_rank(p)]
    return [p.pid for p in sorted(found, key=lambda p: p.create_time())]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any(word in " ".join(process.cmdline()) for word in _RANKS)
    except psutil.Error:
        return False


def kill_under_load(ask: Ask, url: str, server: int, prompts: Sequence[str], max_tokens: int) -> dict[str, str]:
    """Ask three times, the second time with a kill; what came of it, in words."""
    rest = ask_all(ask, url, prompts, max_tokens)
    if rest.failures:
        raise ConfigError(f"the server does not answer ({rest.failures[0]}): start it with this engine first")
    begin, end = min(rest.arrivals), max(rest.arrivals)
    killed = []

    def kill() -> None:
        process = psutil.Process(rank_pids(server)[1])
        killed.append(time.monotonic())
        process.send_signal(signal.SIGKILL)

    timer = threading.Timer((end - begin) / 2, kill)
    timer.start()
    hit = ask_all(ask, url, prompts, max_tokens)
    timer.join()
    again = ask_all(ask, url, prompts, max_tokens)
    pauses = [b - a for a, b in zip(hit.arrivals, hit.arrivals[1:], strict=False) if b > killed[0]]
    return {
        "texts at once": f"{len(prompts)} of {max_tokens} tokens, {end - begin:.2f} s at rest",
        "with rank 1 killed": hit.equal(rest),
        "longest pause after it": f"{max(pauses, default=0.0):.2f} s",
        "once more": again.equal(rest),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.rank_clients", description=__doc__)
    parser.add_argument("--server", choices=ASK, default="openai", help="default: %(default)s")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--pid", type=int, required=True, help="of saw-serve or saw-triton, on this machine")
    parser.add_argument("--texts", type=int, default=64, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of each (default: %(default)s)")
    args = parser.parse_args(argv)
    words = random.Random(3)
    names = ("read", "write", "queue", "config", "block", "token", "path", "node")
    prompts = [
        f"def {words.choice(names)}_{words.choice(names)}_{i}({words.choice(names)}):" for i in range(args.texts)
    ]
    return run(lambda: print_table(kill_under_load(ASK[args.server], args.url, args.pid, prompts, args.tokens)))


if __name__ == "__main__":
    sys.exit(main())
