"""Whole builds, in processes of their own: two at once in one folder, on a disk that fills, and killed."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.support.example import EXAMPLE

#: Runs the builds of each round at once, each limited in the bytes of a file, and says what came of them.
ROUNDS = """
import json, os, resource, signal, sys, time
from pathlib import Path
from saw_trtllm.cli.build import main
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.plan.checksums import verify_engine

model, folder = Path(sys.argv[1]), Path(sys.argv[2])

def build(kv, limit, begin):
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    time.sleep(max(0, begin - time.monotonic()))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(main(["--model_dir", str(model), "--backend", "reference", "--kv", kv, "--output_dir", str(folder)]))

for builds, killed_after in json.loads(sys.argv[3]):
    begin, pids = time.monotonic() + 0.1, []
    for kv, limit in builds:
        pids.append(os.fork())
        if not pids[-1]:
            build(kv, limit, begin)
    if killed_after is not None:
        time.sleep(0.1 + killed_after)
        os.kill(pids[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    verify_engine(folder)
    print(json.dumps([codes, EngineConfig.load(folder).saw_int4.kv]), flush=True)
"""


@pytest.fixture
def run(tmp_path):
    """Runs rounds of builds over an engine with a cache of fp16, in a folder with nothing else beside."""

    def run(*rounds, model=EXAMPLE):
        folder = tmp_path / "here" / "engine"
        argv = [model, folder, json.dumps([([["fp16", None]], None), *rounds])]
        done = subprocess.run([sys.executable, "-c", ROUNDS, *map(str, argv)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        first, *outcomes = map(json.loads, done.stdout.splitlines())
        assert first == [[0], "fp16"]
        return outcomes, done.stderr, [path.name for path in folder.parent.iterdir()]

    return run


def test_two_builds_at_once_leave_the_engine_of_one(run):
    outcomes, _, left = run(*[([["int4", None], ["saw_int4", None]], None)] * 5)
    assert [codes for codes, _ in outcomes] == [[0, 0]] * 5
    assert {kv for _, kv in outcomes} <= {"int4", "saw_int4"}
    assert left == ["engine"]


def test_a_disk_that_fills_leaves_the_old_engine(run, tmp_path):
    """In the engine's first bytes, in its middle, and in the copy of the tokenizer."""
    model = shutil.copytree(EXAMPLE, tmp_path / "model")
    engine = (EXAMPLE / "model.safetensors").stat().st_size
    with (model / "tokenizer.json").open("a") as file:
        file.write(" " * (engine + 100_000))
    limits = (100, engine // 2, engine + 50_000)
    outcomes, stderr, left = run(*[([["saw_int4", limit]], None) for limit in limits], model=model)
    assert outcomes == [[[2], "fp16"]] * len(limits)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(limits)
    assert all("cannot be written" in error and "File too large" in error for error in errors), errors
    assert "Traceback" not in stderr
    assert left == ["engine"]


def test_a_killed_build_leaves_the_old_engine_or_the_new_one(run):
    outcomes, _, left = run(*[([["saw_int4", None]], 0.02 * n) for n in range(6)], ([["int4", None]], None))
    assert all(kv in ("fp16", "saw_int4") for _, kv in outcomes[:-1])
    assert any(codes == [-9] for codes, _ in outcomes)
    assert outcomes[-1] == [[0], "int4"]
    assert left == ["engine"]  # the last build has removed what the killed ones left
