"""Load on a tritonserver by NVIDIA's perf_analyzer: engines one after the other, each at rising concurrency.

Clients ask the ensemble over gRPC for texts of a fixed length, each for one after the other, and stream them. Engines
of random weights have words of their own (w0, w1 and so on) and take long prompts of them, no two alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import quantiles

from benchmarks.common.record import Environment
from benchmarks.serving.record import Row, ServingResults
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import EngineError
from saw_trtllm.serve.ports import Ports

ROOT = Path(__file__).parents[2]
PORTS = Ports(grpc=18001, http=18000, metrics=18002)
PROMPTS = (
    "def read_config(path):\n    ",
    "class Scheduler:\n    def __init__(self, blocks, max_batch_size):\n        self.",
    "import os\nimport sys\n\n\ndef main():\n    ",
    'for name in sorted(os.listdir(folder)):\n    if name.endswith(".py"):\n        ',
)


@dataclass(frozen=True)
class Load:
    """What each client asks for.

    Attributes
    ----------
    output_tokens : int
        Of each text.
    prompt_words : int, optional
        Prompts of so many random words, for engines of random weights; else a few beginnings of Python.
    requests : int
        Of each client, counted after its first.
    stream : bool
        Token by token.
    perf_analyzer : Path
        The folder that the tool is in, or is put into.
    """

    output_tokens: int = 64
    prompt_words: int | None = None
    requests: int = 4
    stream: bool = True
    perf_analyzer: Path = ROOT / "build" / "perf_analyzer"


def run_load(
    engine_dirs: Sequence[Path], load: Load, concurrency: Sequence[int], environment: Environment
) -> Iterator[ServingResults]:
    """Measure engines one after the other, each at rising concurrency.

    Yields
    ------
    ServingResults
        What is known after each row.
    """
    rows: list[Row] = []
    for folder in engine_dirs:
        config = EngineConfig.load(folder)
        kv, model = config.saw_int4.kv, config.pretrained_config
        with tempfile.TemporaryDirectory() as temporary, _Server(folder, Path(temporary)):
            for clients in concurrency:
                count = (load.requests + 1) * clients
                prompts = PROMPTS
                if load.prompt_words is not None:
                    prompts = _words(load.prompt_words, model.vocab_size, count)
                rows.append(Row(kv=kv, concurrency=clients, **_measure(load, clients, prompts, Path(temporary))))
                print(rows[-1].model_dump_json(), file=sys.stderr, flush=True)
                yield ServingResults(
                    environment=environment,
                    model=f"{model.num_hidden_layers} layers of {model.hidden_size}",
                    output_tokens=load.output_tokens,
                    prompt_words=load.prompt_words,
                    stream=load.stream,
                    rows=rows,
                )


class _Server:
    """``saw-triton --launch`` in a process of its own."""

    def __init__(self, engine_dir: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "saw_trtllm.cli.triton", "--launch", "--engine_dir", str(engine_dir)]
        command += ["--model_repo", str(folder / "repository"), "--grpc_port", str(PORTS.grpc)]
        command += ["--http_port", str(PORTS.http), "--metrics_port", str(PORTS.metrics)]
        start = time.monotonic()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        ready = self._process.stdout.readline()
        if not ready.startswith("ready: "):
            raise EngineError(f"the server of {engine_dir} did not start: see above")
        print(f"{engine_dir}: ready after {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._process.stdout.close()


def _words(length: int, vocab_size: int, count: int) -> list[str]:
    """Prompts of random words, none of which the cache knows the beginning of."""
    random = Random(time.time_ns())
    return [" ".join(f"w{random.randrange(vocab_size)}" for _ in range(length)) for _ in range(count)]


def profile(
    perf_analyzer: Path,
    grpc: str,
    prompts: Sequence[str],
    fixed: dict[str, list],
    clients: int,
    count: int,
    folder: Path,
) -> list[dict]:
    """What perf_analyzer notes of requests to the ensemble by so many clients at once.

    Parameters
    ----------
    perf_analyzer : Path
        The folder that the tool is in, or is put into.
    grpc : str
        The server's address.
    prompts : sequence of str
    fixed : dict
        The ensemble's other inputs, of all requests.
    clients, count : int
        How many there are, and requests of all of them.
    folder : Path
        For the tool's files.

    Returns
    -------
    list of dict
        ``timestamp`` and ``response_timestamps`` of each request, in nanoseconds, in the order of their beginnings.

    Raises
    ------
    EngineError
        If it fails.
    """
    data, export = folder / "prompts.json", folder / "profile.json"
    data.write_text(json.dumps({"data": [{"text_input": [prompt], **fixed} for prompt in prompts]}))
    export.unlink(missing_ok=True)
    command = [ROOT / "build_scripts" / "perf_analyzer", perf_analyzer, "-m", "ensemble", "-i", "grpc"]
    command += ["-u", grpc, "--streaming", "--async", "--input-data", data, "--concurrency-range", clients]
    command += ["--request-count", count, "--profile-export-file", export, "--max-trials", 1]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"perf_analyzer failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return sorted(json.loads(export.read_text())["experiments"][0]["requests"], key=lambda r: r["timestamp"])


def _measure(load: Load, concurrency: int, prompts: Sequence[str], folder: Path) -> dict[str, float]:
    """What so many clients at once see, in ms; without the first request of each, which finds the server idle."""
    fixed = {
        "max_tokens": [load.output_tokens],
        "min_tokens": [load.output_tokens],
        "end_id": [-1],
        "stream": [load.stream],
    }
    grpc, count = f"127.0.0.1:{PORTS.grpc}", (load.requests + 1) * concurrency
    requests = profile(load.perf_analyzer, grpc, prompts, fixed, concurrency, count, folder)[concurrency:]
    span = (max(r["response_timestamps"][-1] for r in requests) - requests[0]["timestamp"]) / 1e9
    first, whole = (_percentiles([r["response_timestamps"][i] - r["timestamp"] for r in requests]) for i in (0, -1))
    return {
        "requests_per_s": round(len(requests) / span, 2),
        "tokens_per_s": round(len(requests) * load.output_tokens / span, 1),
        "first_ms_p50": first[0],
        "first_ms_p90": first[1],
        "request_ms_p50": whole[0],
        "request_ms_p90": whole[1],
    }


def _percentiles(nanoseconds: list[int]) -> tuple[float, float]:
    tenths = quantiles(nanoseconds, n=10, method="inclusive")
    return round(tenths[4] / 1e6, 2), round(tenths[8] / 1e6, 2)
