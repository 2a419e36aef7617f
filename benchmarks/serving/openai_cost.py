"""What saw-serve costs: CPU time a token and time to the first token, over an executor that computes nothing.

The same requests go to the bare runtime, read by one event loop, and to the server in a process of its own, read by
clients in this one, which do not count. CPU time is the process's, so that other work on the machine matters less.

    python -m benchmarks.serving.openai_cost --engine_dir engine --streams 64 --output_len 256
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.null_executor import open_null
from saw_trtllm import SamplingParams


def spread(values: list[float]) -> dict[str, float]:
    """The least and the median: what other work on the machine adds is in the second."""
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3)}


def cpu_seconds() -> float:
    """CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_runtime(folder: Path, streams: int, length: int, repeats: int, results: Any) -> None:
    """The bare runtime: CPU microseconds a token, and milliseconds to the first token of one stream."""
    with open_null(folder) as llm:
        params = SamplingParams(max_tokens=length, ignore_eos=True)

        async def read(result: Any) -> None:
            async for _ in result:
                pass

        async def run() -> None:
            await asyncio.gather(*(read(llm.generate_async("def", params, streaming=True)) for _ in range(streams)))

        asyncio.run(run())
        costs = []
        for _ in range(repeats):
            begin = cpu_seconds()
            asyncio.run(run())
            costs.append((cpu_seconds() - begin) / (streams * length) * 1e6)
        firsts, one = [], SamplingParams(max_tokens=1)
        for _ in range(50):
            begin = time.perf_counter()
            next(iter(llm.generate_async("def", one, streaming=True)))
            firsts.append((time.perf_counter() - begin) * 1e3)
        results.put((statistics.median(costs), spread(firsts)))


def serve(folder: Path, port: Any, commands: Any, results: Any) -> None:
    """The server; for each command it tells its CPU time."""
    import threading

    from saw_trtllm.serve.openai.app import make_app
    from saw_trtllm.serve.openai.model import ServedModel
    from saw_trtllm.serve.openai.server import ServerOptions, listen, make_server

    with open_null(folder) as llm:
        socket, url = listen(ServerOptions(port=0))
        server = make_server(make_app([ServedModel("null", llm, folder)]), ServerOptions(port=0))

        def tell() -> None:
            port.put(int(url.rpartition(":")[2]))
            while commands.get():
                results.put(cpu_seconds())
            server.should_exit = True

        threading.Thread(target=tell).start()
        server.run([socket])


async def ask(port: int, path: str, body: dict[str, Any]) -> float:
    """Read a stream to its end; seconds to its first chunk of text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    begin = time.perf_counter()
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    await reader.readuntil(b'"text"')
    first = time.perf_counter() - begin
    while await reader.read(1 << 16):
        pass
    writer.close()
    return first


def measure_server(folder: Path, streams: int, length: int, repeats: int) -> tuple[float, dict[str, float]]:
    """The server's CPU microseconds a token, and milliseconds to the first token of one stream."""
    context = multiprocessing.get_context("spawn")
    port, commands, results = context.Queue(), context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(folder, port, commands, results), daemon=True)
    process.start()
    at = port.get()
    body = {"prompt": "def", "max_tokens": length, "ignore_eos": True, "stream": True, "temperature": 0}

    def cpu() -> float:
        commands.put(True)
        return results.get()

    async def run(count: int, **fields: Any) -> list[float]:
        return await asyncio.gather(*(ask(at, "/v1/completions", {**body, **fields}) for _ in range(count)))

    asyncio.run(run(streams))
    costs = []
    for _ in range(repeats):
        begin = cpu()
        asyncio.run(run(streams))
        costs.append((cpu() - begin) / (streams * length) * 1e6)
    firsts = [asyncio.run(run(1, max_tokens=1))[0] * 1e3 for _ in range(50)]
    commands.put(False)
    process.join()
    return statistics.median(costs), spread(firsts)


def main(argv: list[str] | None = None) -> int:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output_len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    work = (args.engine_dir, args.streams, args.output_len, args.repeats)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure_runtime, args=(*work, results), daemon=True)
    process.start()
    runtime, runtime_first = results.get()
    process.join()
    server, server_first = measure_server(*work)
    record = {
        "streams": args.streams,
        "output_len": args.output_len,
        "runtime_cpu_us_per_token": round(runtime, 2),
        "server_cpu_us_per_token": round(server, 2),
        "ratio": round(server / runtime, 3),
        "runtime_first_token_ms": runtime_first,
        "server_first_token_ms": server_first,
    }
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
