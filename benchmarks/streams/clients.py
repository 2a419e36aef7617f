"""Clients: each asks for one text after the other, and all begin at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

from benchmarks.common.null_executor import Pace, patched
from benchmarks.serving.load import profile
from saw_trtllm import LLM, SamplingParams


@dataclass(frozen=True)
class Texts:
    """What the clients ask for.

    Attributes
    ----------
    prompts : sequence of str
    output_tokens : int
        Of each text.
    requests : int
        Of each client, one after the other.
    perf_analyzer : Path
        The folder that the tool is in, or is put into.
    """

    prompts: Sequence[str]
    output_tokens: int
    requests: int
    perf_analyzer: Path


@dataclass(frozen=True)
class Seen:
    """What the clients saw: seconds from the first request to the last text's end, and to each text's first piece."""

    span: float
    first: list[float]
    responses: int | None = None

    def first_ms(self) -> tuple[float, float]:
        """Median and 90th percentile of the milliseconds to a first piece."""
        p50, p90 = np.percentile(self.first, [50, 90]) * 1e3
        return round(p50, 2), round(p90, 2)


async def ask_all(texts: Texts, clients: int, ask: Callable[[str], Awaitable[float]]) -> Seen:
    """Let so many clients ask; ``ask`` reads a text to its end and gives the seconds to its first piece."""
    first: list[float] = []

    async def client(index: int) -> None:
        for turn in range(texts.requests):
            first.append(await ask(texts.prompts[(index + turn * clients) % len(texts.prompts)]))

    begin = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    return Seen(time.perf_counter() - begin, first)


def run_llm(engine_dir: Path, pace: Pace | None, connection: Connection) -> None:
    """The bare runtime in a process of its own: answers ``(Texts, clients)`` with :class:`Seen` while it is asked."""
    if pace is not None:
        patched(pace).start()
    with LLM(engine_dir, verify=False) as llm:
        connection.send(None)
        while True:
            try:
                texts, clients = connection.recv()
            except EOFError:
                return
            params = SamplingParams(max_tokens=texts.output_tokens, ignore_eos=True)

            async def ask(prompt: str, params: SamplingParams = params) -> float:
                begin, first = time.perf_counter(), None
                async for _ in llm.generate_async(prompt, params, streaming=True):
                    first = time.perf_counter() - begin if first is None else first
                return first or 0.0

            connection.send(asyncio.run(ask_all(texts, clients, ask)))


async def ask_saw_serve(url: str, model: str, texts: Texts, clients: int) -> Seen:
    """Streams of saw-serve's ``/v1/completions``, of which only the first piece is looked at."""
    host, port = url.removeprefix("http://").split(":")
    fixed = {"model": model, "max_tokens": texts.output_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    count = 0

    async def ask(prompt: str) -> float:
        nonlocal count
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps({"prompt": prompt, **fixed}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
        begin = time.perf_counter()
        writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + data)
        await reader.readuntil(b'"text"')
        first, count = time.perf_counter() - begin, count + 1
        while chunk := await reader.read(1 << 16):
            count += chunk.count(b'"text"')
        writer.close()
        return first

    seen = await ask_all(texts, clients, ask)
    return Seen(seen.span, seen.first, count)


def ask_triton(grpc: str, texts: Texts, clients: int, stream: bool, folder: Path) -> Seen:
    """The ensemble over gRPC by NVIDIA's perf_analyzer, whose clients cost little."""
    length = [texts.output_tokens]
    fixed = {"max_tokens": length, "min_tokens": length, "end_id": [-1], "stream": [stream]}
    count = texts.requests * clients
    requests = profile(texts.perf_analyzer, grpc, texts.prompts, fixed, clients, count, folder)
    responses = [r["response_timestamps"] for r in requests]
    span = (max(r[-1] for r in responses) - requests[0]["timestamp"]) / 1e9
    first = [(r["response_timestamps"][0] - r["timestamp"]) / 1e9 for r in requests]
    return Seen(span, first, sum(map(len, responses)))


def cpu_seconds(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """CPU time of each process so far, by its own clock (clock_getcpuclockid), which counts nanoseconds.

    What `cpu_times` says is in ticks of 10 ms.
    """
    return {name: time.clock_gettime(~process.pid << 3 | 2) for name, process in processes.items()}
