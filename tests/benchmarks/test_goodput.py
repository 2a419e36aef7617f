"""Goodput against the pool's bytes: from engines and a peer to the record, its table and its plot."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from benchmarks.__main__ import load_report, main
from benchmarks.common.vllm import hugging_face_config
from benchmarks.engine import moving
from benchmarks.goodput.measure import measure
from benchmarks.goodput.record import Load
from benchmarks.goodput.vllm import VllmServer
from saw_trtllm.engine.config import EngineConfig

LOAD = ["--conversations", "2", "--turns", "2", "--first_len", "40", "--turn_len", "8", "--answer_len", "4"]


def test_from_engines_to_the_plot(engine, tmp_path, capsys):
    """Two formats, a pool that holds all and one that holds a fp16 conversation at a time, and a second run's point."""
    output = tmp_path / "goodput.json"
    pools = f"{96 * 4096 / 2**30},{4096 * 4096 / 2**30}"
    engines = [str(engine(kv)) for kv in ("fp16", "saw_int4")]
    command = ["goodput", "--output", str(output), "--max_ttft_ms", "1e9", "--max_tpot_ms", "1e9", *LOAD]
    assert main([*command, "--engine_dir", *engines, "--pool_gib", pools]) == 0
    assert "saw_int4" in capsys.readouterr().out
    host = ["--engine_dir", engines[0], "--pool_gib", pools.split(",")[0], "--host_gib", "0.001"]
    assert main([*command, *host]) == 0
    points = json.loads(output.read_text())["points"]
    places = [(p["kv"], p["pool_bytes"], p.get("host_bytes", 0)) for p in points]
    assert len(places) == len(set(places)) == 5
    found = dict(zip(places, (p["reused_tokens"] for p in points), strict=True))
    # A second turn finds all of the first but the token that was drawn last, where the pool still has it.
    assert found["saw_int4", 96 * 4096, 0] == found["saw_int4", 4096**2, 0] == found["fp16", 4096**2, 0] == 2 * 43
    assert all(p["goodput_requests_per_s"] == p["requests_per_s"] for p in points)

    report = load_report(output)
    assert len(report.tables["points"]) == 1 + 5
    figure = Figure()
    report.plots["pools"](figure)
    assert len(figure.axes[0].get_lines()) == 3
    other = ["goodput", "--output", str(output), "--engine_dir", engines[0], "--turns", "3"]
    assert main(other) == 2
    assert "holds another load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--pool_gib", "4,x"], "--pool_gib is '4,x': give sizes"),
        (["--pool_gib", "-1"], "--pool_gib is '-1': give sizes"),
        (["--vllm", "int8"], "--vllm is 'int8': choose among fp16, fp8"),
        (["--answer_len", "1"], "--answer_len is 1: give at least 2"),
        (["--vllm", "fp8"], "vLLM cannot be imported"),
        (["--first_len", "9000", "--pool_gib", "1"], "conversation 1 cannot come to its turn 6"),
    ],
)
def test_what_does_not_fit_is_one_sentence(flags, what, engine, capsys):
    assert main(["goodput", "--engine_dir", str(engine("fp16")), *flags]) == 2
    captured = capsys.readouterr()
    assert what in captured.err
    assert captured.err.count("\n") == 1


class Engine:
    """vLLM's asynchronous engine: whole texts so far, and what it found of a prompt."""

    async def generate(self, prompt, params, request_id):
        for count in range(1, params.max_tokens + 1):
            await asyncio.sleep(0)
            text = SimpleNamespace(token_ids=list(range(count)))
            yield SimpleNamespace(outputs=[text], num_cached_tokens=16 if count == 1 else None)


def test_a_load_is_held_with_vllm_too(engine):
    load = Load(
        conversations=3, turns=2, first_len=20, turn_len=5, answer_len=4, max_ttft_ms=1e9, max_tpot_ms=1e9
    )  # fmt: skip
    report = asyncio.run(measure(VllmServer(Engine(), SimpleNamespace), load, 100))
    assert (report.num_requests, report.output_tokens) == (6, 24)
    assert report.input_tokens == 3 * (20 + 29)
    assert report.reused_tokens == 6 * 16
    assert report.hit_rates["pool"] == 96 / report.input_tokens


def test_vllm_is_given_the_engines_shape(engine):
    transformers = pytest.importorskip("transformers")
    shape = EngineConfig.load(engine("fp16")).pretrained_config
    config = transformers.LlamaConfig(**hugging_face_config(shape))
    assert config.head_dim == shape.head_size
    assert config.num_key_value_heads == shape.num_key_value_heads


def test_steps_are_timed_while_blocks_move(engine, capsys):
    flags = ["--batch", "2", "--context", "30", "--steps", "4", "--max_tokens", "8192", "--host_cache_size", "8000000"]
    assert moving.main([str(engine("saw_int4")), *flags]) == 0
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert found.keys() == {"alone_us", "moving_us", "ratio", "gb_per_s"}
    assert float(found["gb_per_s"]) > 0
    assert moving.main([str(engine("saw_int4")), *flags[:-4], "--max_tokens", "64", *flags[-2:]]) == 2
    assert "the KV cache has 2 blocks" in capsys.readouterr().err
    assert moving.main([str(engine("saw_int4")), *flags[:-1], "4000000"]) == 2
    assert "give more --host_cache_size" in capsys.readouterr().err
