"""A built engine through the whole runtime: how long it takes to start, and how busy it keeps the GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.engine.record import StartUp
from saw_trtllm.engine.config import rank_files
from saw_trtllm.errors import EngineError
from saw_trtllm.llm import LLM
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.stats import Stats

_POLL_S = 0.002
#: So often in a row nothing runs or waits, though all was submitted: it has ended, or failed.
_IDLE_POLLS = 100
_OPEN = (
    "import sys, time; from saw_trtllm import LLM; start = time.monotonic(); llm = LLM(sys.argv[1]); "
    "print(time.monotonic() - start, flush=True); llm.shutdown()"
)


def time_start(folder: Path) -> StartUp:
    """Open an engine in a process of its own, its file being in the host's memory already.

    Raises
    ------
    EngineError
        If it does not start.
    """
    start = time.monotonic()
    for path in rank_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(64 << 20):
                pass
    read = time.monotonic() - start
    done = subprocess.run([sys.executable, "-c", _OPEN, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{folder} did not start: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return StartUp(open_s=round(float(done.stdout.split()[-1]), 2), read_s=round(read, 2))


def time_loop(llm: LLM, batch: int, prompt: int, text: int) -> tuple[float, int]:
    """Run requests at once, and time their tokens while all of them decode.

    Parameters
    ----------
    llm : LLM
    batch, prompt, text : int
        Requests, and tokens of each one's prompt and text.

    Returns
    -------
    tuple of (float, int)
        µs for a token of each request, and tokens of a sequence in the middle of that time.

    Raises
    ------
    EngineError
        If they never all ran at once.
    """
    rng = np.random.default_rng(2)
    params = SamplingParams(max_tokens=text, ignore_eos=True)
    vocab = llm.config.pretrained_config.vocab_size
    before = llm.stats()
    results = [llm.generate_async(rng.integers(3, vocab, prompt).tolist(), params) for _ in range(batch)]
    seen = _watch(llm, batch, before)
    for result in results:
        result.result()
    if len(seen) < 2 or seen[-1][1] - seen[0][1] < batch * text // 4:
        blocks = llm.stats().max_blocks
        raise EngineError(f"{batch} requests never ran at once for long enough: the KV cache has {blocks} blocks")
    (began, first), (ended, last) = seen[0], seen[-1]
    return 1e6 * (ended - began) * batch / (last - first), prompt + (first + last) // (2 * batch)


def _watch(llm: LLM, batch: int, before: Stats) -> list[tuple[float, int]]:
    """Tokens generated so far by time, while all requests decode: once each has a token, until one has ended."""
    seen: list[tuple[float, int]] = []
    idle = 0
    while idle < _IDLE_POLLS:
        stats = llm.stats()
        if stats.num_running == batch and stats.ttft_count - before.ttft_count >= batch:
            seen.append((time.monotonic(), stats.generated_tokens_total - before.generated_tokens_total))
        elif seen:
            break
        idle = 0 if stats.num_running or stats.num_waiting else idle + 1
        time.sleep(_POLL_S)
    return seen
