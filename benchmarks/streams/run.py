"""Each way to the engine after the other, each at rising numbers of clients."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import psutil

from benchmarks.common.null_executor import Pace
from benchmarks.common.record import Environment
from benchmarks.serving.load import PORTS
from benchmarks.streams.clients import Seen, Texts, ask_saw_serve, ask_triton, cpu_seconds, run_llm
from benchmarks.streams.record import Row, StreamsResults
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import EngineError
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve.installation import STUB

#: The bare runtime comes first: the others are shown beside it.
PATHS = ("llm", "triton_stream", "triton_whole", "saw_serve")


@dataclass(frozen=True)
class Way:
    """A running server, or the bare runtime.

    Attributes
    ----------
    ask : callable
        Lets so many clients ask it.
    processes : dict of str to psutil.Process
        Those that work for it.
    """

    ask: Callable[[Texts, int], Seen]
    processes: dict[str, psutil.Process]


def measure(
    engine_dir: Path,
    texts: Texts,
    prompt_tokens: int,
    clients: Sequence[int],
    paths: Sequence[str],
    pace: Pace | None,
    environment: Environment,
) -> Iterator[StreamsResults]:
    """Measure each way.

    Yields
    ------
    StreamsResults
        What is known after each row.
    """
    model = EngineConfig.load(engine_dir).pretrained_config
    prompts = make_prompts(engine_dir, prompt_tokens, max(clients) * texts.requests)
    texts = replace(texts, prompts=prompts)
    rows: list[Row] = []
    for path in paths:
        with _WAYS[path](engine_dir, pace) as way:
            way.ask(replace(texts, output_tokens=8, requests=1), 2)  # what is done once is done
            for count in clients:
                rows.append(_row(path, way, texts, count))
                print(rows[-1].model_dump_json(), file=sys.stderr, flush=True)
                yield StreamsResults(
                    environment=environment,
                    model=f"{model.num_hidden_layers} layers of {model.hidden_size}",
                    pace=None if pace is None else list(pace),
                    prompt_tokens=prompt_tokens,
                    output_tokens=texts.output_tokens,
                    requests=texts.requests,
                    rows=rows,
                )


def make_prompts(engine_dir: Path, length: int, count: int) -> list[str]:
    """Different texts of so many tokens each, or nearly so."""
    tokenizer, random = Tokenizer.load(engine_dir), Random(0)
    words = "w{}" if tokenizer.token_id("w0") is not None else "{:x}"
    most = tokenizer.vocab_size if tokenizer.token_id("w0") is not None else 1 << 24
    out = []
    for _ in range(count):
        text = " ".join(words.format(random.randrange(most)) for _ in range(length))
        out.append(tokenizer.decode(tokenizer.encode(text)[:length]))
    return out


def _row(path: str, way: Way, texts: Texts, clients: int) -> Row:
    before = cpu_seconds(way.processes)
    seen = way.ask(texts, clients)
    after = cpu_seconds(way.processes)
    tokens = clients * texts.requests * texts.output_tokens
    first = seen.first_ms()
    return Row(
        path=path,
        clients=clients,
        tokens_per_s=round(tokens / seen.span, 1),
        responses_per_s=None if seen.responses is None else round(seen.responses / seen.span, 1),
        first_ms_p50=first[0],
        first_ms_p90=first[1],
        cpu_us_per_token={name: round((after[name] - before[name]) / tokens * 1e6, 2) for name in after},
    )


@contextlib.contextmanager
def _llm(engine_dir: Path, pace: Pace | None) -> Iterator[Way]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_llm, args=(engine_dir, pace, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen

    def ask(texts: Texts, clients: int) -> Seen:
        try:
            ours.send((texts, clients))
            return ours.recv()
        except (EOFError, OSError) as e:
            raise EngineError("the process of LLM has ended: see above") from e

    try:
        with contextlib.suppress(EOFError):  # the first question says so
            ours.recv()
        yield Way(ask, {"llm": psutil.Process(process.pid)})
    finally:
        ours.close()
        process.join()


@contextlib.contextmanager
def _started(
    command: Sequence[str], pace: Pace | None, flags: Sequence[object], ready: str
) -> Iterator[psutil.Process]:
    start = ["-m", "benchmarks.streams.bootstrap", ",".join(map(str, pace)), command[0]] if pace else ["-m", command[1]]
    process = subprocess.Popen([sys.executable, *start, *map(str, flags)], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if ready not in line:
            raise EngineError(f"{command[0]} did not start: see above")
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


@contextlib.contextmanager
def _triton(stream: bool, engine_dir: Path, pace: Pace | None) -> Iterator[Way]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = ["--launch", "--engine_dir", engine_dir, "--model_repo", folder / "repository", "--no_verify"]
        flags += ["--grpc_port", PORTS.grpc, "--http_port", PORTS.http, "--metrics_port", PORTS.metrics]
        with _started(("saw-triton", "saw_trtllm.cli.triton"), pace, flags, "ready: ") as launcher:
            processes = {}
            for child in launcher.children(recursive=True):
                command = child.cmdline()
                if command and os.path.basename(command[0]) == STUB:
                    processes[Path(command[1]).parts[-3]] = child
                elif command and os.path.basename(command[0]) == "tritonserver":
                    processes["tritonserver"] = child
            grpc = f"127.0.0.1:{PORTS.grpc}"
            yield Way(lambda texts, clients: ask_triton(grpc, texts, clients, stream, folder), processes)


@contextlib.contextmanager
def _saw_serve(engine_dir: Path, pace: Pace | None) -> Iterator[Way]:
    flags = ["--engine_dir", engine_dir, "--served_model_name", "model", "--port", PORTS.http, "--no_verify"]
    url = f"http://127.0.0.1:{PORTS.http}"
    with _started(("saw-serve", "saw_trtllm.cli.serve"), pace, flags, url) as process:
        time.sleep(0.2)
        yield Way(
            lambda texts, clients: asyncio.run(ask_saw_serve(url, "model", texts, clients)), {"saw_serve": process}
        )


_WAYS = {
    "llm": _llm,
    "triton_stream": partial(_triton, True),
    "triton_whole": partial(_triton, False),
    "saw_serve": _saw_serve,
}
