"""Load on a tritonserver by NVIDIA's perf_analyzer: engines one after the other, each at rising concurrency.

    python benchmarks/triton_load.py --engine_dir engine_fp16 engine_saw_int4 --output load.json

Clients ask the ensemble over gRPC for texts of a fixed length, each for one after the other, and stream them. The JSON
file has a row for each engine and concurrency; the same is printed as a table.

Engines of random weights have words of their own (w0, w1 and so on) and take long prompts of them, no two alike:

    python benchmarks/triton_load.py --engine_dir bench_engines/fp16 bench_engines/saw_int4 --prompt_words 2048
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import quantiles

from benchmarks.common.report import align, markdown
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.serve.ports import Ports

ROOT = Path(__file__).parents[1]
PORTS = Ports(grpc=18001, http=18000, metrics=18002)
PROMPTS = (
    "def read_config(path):\n    ",
    "class Scheduler:\n    def __init__(self, blocks, max_batch_size):\n        self.",
    "import os\nimport sys\n\n\ndef main():\n    ",
    'for name in sorted(os.listdir(folder)):\n    if name.endswith(".py"):\n        ',
)
HEADER = ["KV cache", "clients", "requests/s", "tokens/s", "first token ms p50", "p90", "request ms p50", "p90"]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32,64,128", metavar="NUMBERS")
    parser.add_argument(
        "--output_tokens", type=int, default=64, metavar="N", help="of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt_words",
        type=int,
        metavar="N",
        help="prompts of N random words, for engines of random weights",
    )
    parser.add_argument("--requests", type=int, default=4, metavar="N", help="of each client (default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="ask for texts in one piece instead of token by token")
    parser.add_argument("--perf_analyzer", type=Path, default=ROOT / "build" / "perf_analyzer", metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the rows")
    args = parser.parse_args()
    rows = []
    for folder in args.engine_dir:
        config = EngineConfig.load(folder)
        kv, vocab_size = config.saw_int4.kv, config.pretrained_config.vocab_size
        with tempfile.TemporaryDirectory() as temporary, _Server(folder, Path(temporary)):
            for concurrency in map(int, args.concurrency.split(",")):
                count = (args.requests + 1) * concurrency
                prompts = PROMPTS if args.prompt_words is None else _words(args.prompt_words, vocab_size, count)
                row = {"kv": kv, "concurrency": concurrency} | _load(args, concurrency, prompts, Path(temporary))
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
                if args.output is not None:
                    record = {"output_tokens": args.output_tokens, "prompt_words": args.prompt_words}
                    record |= {"stream": not args.whole, "rows": rows}
                    args.output.write_text(json.dumps(record, indent=1) + "\n")
    table = [HEADER, *([str(value) for value in row.values()] for row in rows)]
    print(align({"load": table}), markdown(table), sep="\n\n")
    return 0


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
            raise SystemExit(f"error: the server of {engine_dir} did not start: see above")
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


def _load(args: argparse.Namespace, concurrency: int, prompts: Sequence[str], folder: Path) -> dict[str, float]:
    """What so many clients at once see, in ms; without the first request of each, which finds the server idle."""
    fixed = {
        "max_tokens": [args.output_tokens],
        "min_tokens": [args.output_tokens],
        "end_id": [-1],
        "stream": [not args.whole],
    }
    data, export = folder / "prompts.json", folder / "profile.json"
    data.write_text(json.dumps({"data": [{"text_input": [prompt], **fixed} for prompt in prompts]}))
    export.unlink(missing_ok=True)
    command = [ROOT / "build_scripts" / "perf_analyzer", args.perf_analyzer, "-m", "ensemble", "-i", "grpc"]
    command += ["-u", f"127.0.0.1:{PORTS.grpc}", "--streaming", "--async", "--input-data", data]
    command += ["--concurrency-range", concurrency, "--request-count", (args.requests + 1) * concurrency]
    command += ["--profile-export-file", export, "--max-trials", 1]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: perf_analyzer failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    requests = json.loads(export.read_text())["experiments"][0]["requests"]
    requests = sorted(requests, key=lambda r: r["timestamp"])[concurrency:]
    span = (max(r["response_timestamps"][-1] for r in requests) - requests[0]["timestamp"]) / 1e9
    first, whole = (_percentiles([r["response_timestamps"][i] - r["timestamp"] for r in requests]) for i in (0, -1))
    return {
        "requests_per_s": round(len(requests) / span, 2),
        "tokens_per_s": round(len(requests) * args.output_tokens / span, 1),
        "first_ms_p50": first[0],
        "first_ms_p90": first[1],
        "request_ms_p50": whole[0],
        "request_ms_p90": whole[1],
    }


def _percentiles(nanoseconds: list[int]) -> tuple[float, float]:
    tenths = quantiles(nanoseconds, n=10, method="inclusive")
    return round(tenths[4] / 1e6, 2), round(tenths[8] / 1e6, 2)


if __name__ == "__main__":
    sys.exit(main())
