"""``python -m benchmarks.engine.start``: seconds of builds and openings, with the weights in the engine and without.

The checkpoint has Llama 3 8B's shape and random weights. It is read once before anything is timed, so that it lies in
the page cache if that has room. Each build and each opening is a process of its own, as saw-build and saw-run are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine import cases
from benchmarks.engine.random_engine import RandomWeights
from saw_trtllm.checkpoint import SafetensorsWriter, expected_shapes
from saw_trtllm.checkpoint.tensorrt_llm import rank_file, write_config
from saw_trtllm.cli.common import format_bytes, print_table, run
from saw_trtllm.engine.config import rank_files
from saw_trtllm.errors import EngineError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import TensorSpec

_OPEN = """\
import sys, time
from saw_trtllm import LLM
start = time.monotonic()
LLM(sys.argv[1], kv_cache_config={"max_tokens": 8192}, verify=sys.argv[2] == "verify").shutdown()
print(time.monotonic() - start)
"""


def write_checkpoint(folder: Path, model: ModelConfig) -> None:
    """Write a checkpoint of TensorRT-LLM's format with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, shapes = RandomWeights(model), expected_shapes(model)
    tensors = {name: TensorSpec(shape, model.dtype) for name, shape in shapes.items()}
    with SafetensorsWriter(folder / rank_file(0), tensors) as writer:
        for name in shapes:
            writer.write(name, weights.load(name))
    (folder / "config.json").write_text(json.dumps(write_config(model, model.dtype, 1)), encoding="utf-8")


def measure(folder: Path, model: ModelConfig) -> dict[str, str]:
    """What took how long, line by line.

    Raises
    ------
    EngineError
        If an engine is not built or not opened.
    """
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        write_checkpoint(checkpoint, model)
    start = time.monotonic()
    with (checkpoint / rank_file(0)).open("rb", buffering=0) as file:
        while file.read(1 << 26):
            pass
    rows = {"reading the checkpoint": f"{time.monotonic() - start:.1f} s"}
    for name, flags in (("whole", []), ("stripped", ["--strip_plan"])):
        engine = folder / name
        flags += ["--checkpoint_dir", str(checkpoint), "--output_dir", str(engine), "--backend", "tensorrt"]
        flags += ["--max_batch_size", "256", "--max_num_tokens", "8192", "--max_seq_len", "16384"]
        start = time.monotonic()
        _python("-m", "saw_trtllm.cli.build", *flags)
        rows[f"{name}: build"] = f"{time.monotonic() - start:.1f} s"
        rows[f"{name}: engine"] = format_bytes(sum(path.stat().st_size for path in rank_files(engine)))
        for verify in ("verify", "as it is"):
            seconds = float(_python("-c", _OPEN, str(engine), verify).split()[-1])
            rows[f"{name}: open, {verify}"] = f"{seconds:.1f} s"
    return rows


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{' '.join(arguments[:2])} failed with {done.returncode}: see above")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.start", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("bench_start"), metavar="DIR", help="48 GB go there")
    parser.add_argument("--num_layers", type=int, default=32, metavar="N", help="of the model (default: %(default)s)")
    args = parser.parse_args(argv)
    model = cases.llama_config(args.num_layers, dtype="bfloat16")
    return run(lambda: print_table(measure(args.folder, model)))


if __name__ == "__main__":
    sys.exit(main())
