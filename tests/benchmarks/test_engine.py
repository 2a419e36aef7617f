"""The engines' benchmark without a GPU: cases, steps, a fake executor, the record, targets, tables, plots, flags."""

import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.common.record import Environment
from benchmarks.common.report import write
from benchmarks.engine import cases, compare, loop, random_engine, run, vllm
from benchmarks.engine.cases import BATCHES, CONTEXTS, KVS, classify, parse_numbers
from benchmarks.engine.plan import Plan
from benchmarks.engine.record import Engine, EngineResults, Loop, Peer, PeerStep, Profile, Shape, StartUp, Step
from benchmarks.engine.report import peer_table, ratio_table, report, step_table
from benchmarks.engine.run import judge, run_engines
from benchmarks.engine.steps import ROUNDS, StepBench, measure
from saw_trtllm.backends.tensorrt.constants import weight_inputs
from saw_trtllm.backends.tensorrt.weights import stored_weights
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE
from saw_trtllm.errors import ConfigError, EngineError, KernelError
from saw_trtllm.plan.checksums import verify_engine
from saw_trtllm.plan.plan import split_over_ranks
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.fakes import benchmark as fake_benchmark
from tests.support.fakes.gpu import pretend_gpu
from tests.support.rejection import rejected

LAYER = "transformer.layers.0."


# -- cases


def test_limits_hold_every_case():
    limits = cases.build_limits()
    assert max(BATCHES) <= limits.max_batch_size
    assert max(CONTEXTS) < limits.max_seq_len <= cases.llama_config(2).max_position_embeddings
    assert limits.max_seq_len >= cases.LOOP_PROMPT + cases.LOOP_TEXT
    assert set(cases.PROFILED) <= set(BATCHES)


def test_the_shape_is_llama_3_8bs():
    config = cases.llama_config(cases.LLAMA_LAYERS)
    parameters = sum(int(np.prod(shape)) for shape in random_engine.expected_shapes(config).values())
    assert parameters == 8_030_261_248


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        (LAYER + "attention.SawInt4PagedAttention", "attention"),
        (LAYER + "attention.SawRotateQuantizeKV", "kv_write"),
        (LAYER + "attention.qkv.weight + transformer.layers.0.attention.linear", "gemm"),
        (f"{LAYER}mlp.linear || {LAYER}mlp.linear_2", "gemm"),
        (f"{{ForeignNode[{LAYER}attention.dense.weight...{LAYER}mlp.linear_3]}}", "gemm"),
        (f"PWN(PWN({LAYER}mlp.sigmoid), {LAYER}mlp.prod)", "rest"),
        (f"Reformatting CopyNode for Input Tensor 0 to {LAYER}mlp.linear", "rest"),
        (f"reshape_before_{LAYER}mlp.linear", "rest"),
        (f"{{ForeignNode[transformer.vocab_embedding.weight...{LAYER}attention.linear]}}", "ends"),
        ("{ForeignNode[transformer.layers.1.attention.dense.weight...cast_3]}", "ends"),
        ("lm_head.weight + linear", "ends"),
        ("rotary_cos_sin", "ends"),
    ],
)
def test_layers_are_told_apart_by_name(layer, part):
    assert classify(layer) == part


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        (LAYER + "attention.SawInt4PagedAttention", "attention"),
        (LAYER + "attention.SawGemm_2", "gemm"),
        (LAYER + "mlp.SawQuantizedGemm", "gemm"),
        (f"{{ForeignNode[{LAYER}mlp.cast...{LAYER}mlp.sum]}}", "rest"),
        (f"PWN(PWN({LAYER}mlp.sigmoid), {LAYER}mlp.prod)", "rest"),
        ("SawGemm", "ends"),
        ("SawLookup", "ends"),
    ],
)
def test_with_the_gemm_plugin_no_other_layer_is_a_gemm(layer, part):
    assert classify(layer, gemm_plugin=True) == part


@pytest.mark.parametrize("text", ["0", "257", "1,,2", "many", "-1"])
def test_numbers_out_of_the_engines_reach(text):
    assert parse_numbers("1, 256", BATCHES, "--batch") == (1, 256)
    with pytest.raises(ConfigError, match=r"^--batch names .*: give numbers from 1 to 256, separated by commas$"):
        parse_numbers(text, BATCHES, "--batch")


# -- engines of random weights


def test_random_weights_have_the_models_shapes_and_scale():
    config = cases.llama_config(1).model_copy(update={"hidden_size": 2048, "vocab_size": 2000})
    weights = random_engine.RandomWeights(config)
    for name, shape in random_engine.expected_shapes(config).items():
        array = weights.load(name)
        assert (array.shape, array.dtype) == (shape, np.float16)
        if len(shape) == 2:
            assert array.astype(np.float32).std() * shape[1] ** 0.5 == pytest.approx(1, rel=0.01)
            assert not np.array_equal(array[0], array[1])
    parts = [weights.load(f"transformer.layers.0.mlp.{name}.weight") for name in ("fc", "gate")]
    assert not np.array_equal(*parts)
    assert np.shares_memory(*parts)


@pytest.fixture
def small():
    """A shape that is quickly built."""
    fields = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    return cases.llama_config(1).model_copy(update=fields)


def test_an_engine_of_random_weights_is_built(small, tmp_path, monkeypatch):
    pretend_gpu(monkeypatch)
    config = random_engine.engine_config("int4", small, cases.build_limits())
    random_engine.build_random(tmp_path / "int4", config, NetworkOptions())
    found = EngineConfig.load(tmp_path / "int4")
    assert (found.saw_int4.kv, found.saw_int4.backend, found.pretrained_config) == ("int4", "tensorrt", small)
    assert (tmp_path / "int4" / "rank0.engine").stat().st_size > 0
    tokenizer = Tokenizer.load(tmp_path / "int4")
    assert tokenizer.encode("w7 w63 w12") == [7, 63, 12]
    assert tokenizer.decode([7, 63, 12]) == "w7 w63 w12"


def test_engines_of_random_weights_share_a_file(small, tmp_path, monkeypatch):
    """All ranks, and all formats; one of another shape is written anew."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.load_cublas_lt", lambda: True)
    (tmp_path / random_engine.WEIGHTS).write_bytes(b"of a build that was ended")
    for kv in ("saw_int4", "fp16"):
        config = random_engine.engine_config(kv, split_over_ranks(small, 4), cases.build_limits())
        random_engine.build_random(tmp_path / kv, config, NetworkOptions())
        found = EngineConfig.load(tmp_path / kv)
        assert {f"rank{rank}.engine" for rank in range(4)} <= found.saw_int4.checksums.keys()
        verify_engine(tmp_path / kv)
    files = [tmp_path / kv / f"rank{rank}.weights.safetensors" for kv in ("saw_int4", "fp16") for rank in range(4)]
    assert len({path.stat().st_ino for path in files}) == 1
    assert stored_weights(files[0], weight_inputs(found))("transformer.vocab_embedding.weight").shape == (16, 64)


def test_a_build_in_a_child_that_fails(small, tmp_path):
    config = random_engine.engine_config("int4", small, cases.build_limits())
    options = NetworkOptions(input_timing_cache=tmp_path / "model.cache", optimization_level=1)
    with pytest.raises(EngineError, match=r"int4 could not be built: see above$"):  # there is no TensorRT
        random_engine.build_in_child(tmp_path / "int4", config, options, None)


def test_a_child_is_told_all_and_ended_in_time(small, tmp_path, monkeypatch):
    monkeypatch.setattr(random_engine.sys, "executable", str(tmp_path / "python"))
    job, part = tmp_path / "job", tmp_path / "part"
    (tmp_path / "python").write_text(f'#!/bin/sh\nprintf %s "$3" > "{part}"\nmv "{part}" "{job}"\nexec sleep 600\n')
    (tmp_path / "python").chmod(0o755)
    config = random_engine.engine_config("int4", small, cases.build_limits())
    options = NetworkOptions(input_timing_cache=tmp_path / "model.cache", optimization_level=1)
    # The time is over once the child has been told.
    monkeypatch.setattr(random_engine, "_REPORT_S", 0.01)
    monkeypatch.setattr(random_engine, "time", SimpleNamespace(monotonic=lambda: 3.0 * job.exists()))
    with pytest.raises(EngineError, match=r"int4 was not built within 3 s: give a lower --builder_optimization_level"):
        random_engine.build_in_child(tmp_path / "int4", config, options, 3)
    built = []
    monkeypatch.setattr(random_engine, "build_random", lambda *args: built.append(args))
    monkeypatch.setattr(random_engine.sys, "argv", ["", job.read_text()])
    assert random_engine.main() == 0
    assert built == [(tmp_path / "int4", config, options)]


# -- plans


def write_config(folder, kv, model, limits=None):
    (folder / kv).mkdir()
    config = random_engine.engine_config(kv, model, limits or cases.build_limits())
    config.save(folder / kv)
    return config


def test_engines_share_a_timing_cache(tmp_path):
    plan = Plan.of(tmp_path, KVS, cases.llama_config(4), optimization_level=2, decode_profile=False)
    first = plan.network_options()
    assert (first.input_timing_cache, first.output_timing_cache) == (None, tmp_path / "model.cache")
    assert (first.optimization_level, first.decode_profile) == (2, False)
    first.output_timing_cache.touch()
    assert plan.network_options().input_timing_cache == first.output_timing_cache


def test_what_is_missing_is_built_at_once(small, tmp_path, monkeypatch):
    write_config(tmp_path, "int4", small)
    together = threading.Barrier(2, timeout=60)
    monkeypatch.setattr("benchmarks.engine.plan.build_in_child", lambda *_: together.wait())
    plan = Plan.of(tmp_path, KVS, small, build_workers=2)
    assert sorted(run.build_missing(plan)) == ["fp16", "saw_int4"]


def test_engines_that_are_there_set_the_shape(small, tmp_path):
    fields = {"max_batch_size": 16, "max_seq_len": 1024, "max_input_len": 1000}
    limits = cases.build_limits().model_copy(update=fields)
    write_config(tmp_path, "int4", small, limits)
    plan = Plan.of(tmp_path, KVS, cases.llama_config(4))
    assert (plan.model, plan.limits) == (small, limits)
    assert plan.existing("int4").saw_int4.kv == "int4"
    assert plan.existing("fp16") is None
    assert plan.steps() == [(batch, 1024) for batch in (1, 2, 4, 8, 16)]
    assert plan.profiled() == []
    assert plan.loop() == (16, 832, 192)
    whole = Plan.of(tmp_path / "none", KVS, cases.llama_config(4))
    assert len(whole.steps()) == len(BATCHES) * len(CONTEXTS)
    assert whole.profiled() == [(1, 8192), (64, 1024), (64, 8192), (256, 2048)]
    assert whole.loop() == (64, 1024, 192)


def test_engines_that_differ_in_more_than_their_format(small, tmp_path):
    write_config(tmp_path, "int4", small)
    write_config(tmp_path, "saw_int4", cases.llama_config(2))
    with pytest.raises(ConfigError, match=r"holds another engine than this run measures: give another --engine_dir$"):
        Plan.of(tmp_path, KVS, cases.llama_config(4))


# -- steps


class FakeGpu:
    """An executor and a clock: the host takes 30 µs for a launch, the GPU its time for each step, one by one."""

    HOST_US = 30.0

    def __init__(self, num_blocks=64, us=100.0):
        self.num_blocks, self.us = num_blocks, us
        self.now = self.ready = 0.0
        self.under_way = self.most_under_way = 0
        self.steps = []

    def launch(self, step, sampling, context_logits):
        self.steps.append((step, len(sampling), context_logits))
        self.now += self.HOST_US
        self.ready = max(self.now, self.ready) + self.us
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return SimpleNamespace(result=lambda done=self.ready: self._wait(done))

    def _wait(self, done):
        self.now = max(self.now, done)
        self.under_way -= 1

    def profile(self, step):
        layers = [("gather", 0.1)]
        for i in range(4):
            attention = (f"transformer.layers.{i}.attention.SawInt4PagedAttention [profile 1]", 0.02 + 0.01 * i)
            layers += [attention, (f"transformer.layers.{i}.mlp.linear [profile 1]", 0.3)]
        return [*layers, ("{ForeignNode[transformer.layers.3.mlp.gate.weight...cast_3]} [profile 1]", 0.4)]

    def mark(self):
        return max(self.now, self.ready)

    def delay(self):
        self.ready = max(self.now, self.ready) + 1e4

    def intervals(self, marks):
        return [b - a for a, b in itertools.pairwise(marks)]


@pytest.fixture
def config():
    return random_engine.engine_config("saw_int4", cases.llama_config(4), cases.build_limits())


@pytest.fixture
def seconds(monkeypatch):
    """The host's clock is the fake GPU's."""
    gpu = FakeGpu()
    monkeypatch.setattr("benchmarks.engine.steps.time.perf_counter", lambda: gpu.now * 1e-6)
    return gpu


def test_a_step_is_timed_overlapped_by_the_gpu_and_alone(seconds, config):
    (step,) = measure([StepBench(seconds, config, seconds)], 4, 1000)
    assert (step.p10_us, step.median_us, step.p90_us) == (100, 100, 100)  # the host's 30 µs are hidden
    assert step.gpu_us == 100
    assert step.alone_us == pytest.approx(130)
    assert step.repetitions == 96
    assert step.tokens_per_second == 40_000
    assert (seconds.under_way, seconds.most_under_way) == (0, 2)


def test_a_host_that_is_slower_than_the_gpu_shows(seconds, config):
    seconds.us = 10.0
    (step,) = measure([StepBench(seconds, config, seconds)], 1, 64)
    assert step.median_us == pytest.approx(30)  # the GPU waits for each launch
    assert step.gpu_us == 10


def test_executors_take_turns(monkeypatch, config):
    gpus = [FakeGpu(us=5000.0), FakeGpu(us=8000.0)]
    monkeypatch.setattr("benchmarks.engine.steps.time.perf_counter", lambda: sum(gpu.now for gpu in gpus) * 1e-6)
    order = []
    for i, gpu in enumerate(gpus):
        launch = gpu.launch
        monkeypatch.setattr(gpu, "launch", lambda *args, i=i, launch=launch: order.append(i) or launch(*args))
    steps = measure([StepBench(gpu, config, gpu) for gpu in gpus], 4, 1000)
    assert [step.median_us for step in steps] == [5000, 8000]
    assert [step.repetitions for step in steps] == [42, 24]
    # Warm-ups, rounds that begin with the one or the other, and what is timed step by step.
    assert [i for i, _ in itertools.groupby(order)] == [0, 1] * (1 + ROUNDS // 2 + 1)


def test_sequences_have_blocks_of_their_own(seconds, config):
    bench = StepBench(seconds, config, seconds)
    assert bench.fits(4, 1024)
    assert not bench.fits(4, 1025)
    step = bench.inputs(4, 1000)
    assert step.sequence_length.tolist() == [1000] * 4
    assert step.host_request_types.tolist() == [DECODE] * 4
    assert step.position_ids.tolist() == [999] * 4
    blocks = step.kv_cache_block_offsets[0, :, 0].ravel()
    assert len(set(blocks.tolist())) == 64
    measure([bench], 4, 1000)
    assert {(n, tuple(context)) for _, n, context in seconds.steps} == {(4, (False,) * 4)}


def test_layers_are_added_up_by_part(seconds, config):
    profile = StepBench(seconds, config, seconds).profile(4, 1000)
    assert profile.parts == {"ends": 500, "attention": 140, "gemm": 1200}


# -- the whole runtime


SMALL = KvCacheConfig(max_tokens=4096)


def test_the_loop_counts_tokens_while_all_decode(open_llm):
    with open_llm("saw_int4", kv_cache_config=SMALL) as llm:
        us, context = loop.time_loop(llm, 2, 16, 400)  # far more than a fast machine makes between two looks
    assert us > 0
    assert 16 < context < 416


def test_a_loop_that_never_ran_at_once_is_no_measurement(open_llm):
    # The engine takes 64 requests at once.
    with open_llm("saw_int4", kv_cache_config=SMALL) as llm, pytest.raises(EngineError, match=r"^65 requests never"):
        loop.time_loop(llm, 65, 4, 2)


def test_a_start_is_timed_in_a_process_of_its_own(engine):
    start = loop.time_start(engine("saw_int4"))
    assert start.open_s > 0
    assert start.read_s >= 0


def test_a_start_that_fails_says_why(engine, tmp_path):
    (tmp_path / "rank0.engine").touch()
    with pytest.raises(EngineError, match=r"did not start: .*EngineError: .*holds no config.json"):
        loop.time_start(tmp_path)


@pytest.fixture
def machine(engine, tmp_path, monkeypatch):
    """A folder with the example's engine, and the stand-ins that run it."""
    folder = shutil.copytree(engine("int4"), tmp_path / "int4")
    cuda = fake_benchmark.install(monkeypatch, folder).cuda
    for name, value in {"LOOP_BATCH": 4, "LOOP_PROMPT": 16, "LOOP_TEXT": 200}.items():
        monkeypatch.setattr(cases, name, value)
    return cuda, Plan.of(tmp_path, ["int4"], cases.llama_config(4), batches=(1, 2), contexts=(16, 256))


def test_engines_that_are_open_at_once_are_compared(machine, tmp_path, capsys):
    cuda, _ = machine
    folders = [str(tmp_path / "int4")] * 2
    assert compare.main([*folders, "--batch", "1,2", "--context", "16"]) == 0
    lines = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["sequences x context"] == ", ".join(folders)
    for case in ("1x16", "2x16"):
        assert re.fullmatch(r"\d+ µs \(1.0000x\), \d+ µs \([\d.]+x\)", lines[case])
    assert lines.keys() >= set(cases.PARTS.values())
    assert cuda.everything() == []


def test_a_run_from_its_engine_to_its_record(machine, tmp_path):
    cuda, plan = machine
    output = tmp_path / "record.json"
    results = run_engines(plan, "python -m benchmarks engine", "249ac14", output)
    assert EngineResults.load(output) == results
    assert results.aborted is None
    (found,) = results.engines
    assert found.build_s is None
    assert found.engine_bytes == (plan.folder / "int4" / "rank0.engine").stat().st_size
    assert [(s.batch, s.context) for s in found.steps] == plan.steps()
    assert found.loop.step_us > 0
    assert found.loop.gpu_us > 0
    assert [(p.batch, p.context) for p in found.profiles] == [(2, 16)]
    assert cuda.everything() == []


def test_the_steps_of_an_engine_of_ranks(machine):
    """Of one rank here, without the runtime: more need a GPU each."""
    cuda, plan = machine
    on_gpu = importlib.import_module("benchmarks.engine.on_gpu")
    found = on_gpu.measure_ranks(plan, "int4", None)
    assert [(s.batch, s.context) for s in found.steps] == plan.steps()
    assert [(p.batch, p.context) for p in found.profiles] == [(2, 16)]
    assert found.loop is None
    assert cuda.everything() == []


def test_a_run_that_ends_early_keeps_what_it_has(machine, monkeypatch, tmp_path):
    cuda, plan = machine
    broken = KernelError("an illegal memory access")
    monkeypatch.setattr(StepBench, "profile", lambda *args: (_ for _ in ()).throw(broken))
    run_engines(plan, "python -m benchmarks engine", "249ac14", tmp_path / "record.json")
    results = EngineResults.load(tmp_path / "record.json")
    assert results.aborted == "the run ended early: an illegal memory access"
    assert len(results.engines[0].steps) == len(plan.steps())
    assert cuda.everything() == []


def test_engines_that_do_not_fit_together(machine, results):
    on_gpu = importlib.import_module("benchmarks.engine.on_gpu")
    memory = dict.fromkeys(("weights", "activations", "io"), 24 << 20)
    engines = [e.model_copy(update={"memory": memory}) for e in results.engines]
    assert on_gpu._pool_bytes(engines[:1]) == int(0.9 * (56 << 20))
    with pytest.raises(EngineError, match=r"^3 engines take 0\.21 GiB and the GPU has 0\.12 GiB free: give fewer --kv"):
        on_gpu._pool_bytes(engines)


# -- the record


@pytest.fixture(scope="module")
def results():
    """A record of all cases, as a run would make it."""
    engines = []
    for kv in KVS:
        row = 256 if kv == "fp16" else 68
        steps = [_step(b, n, 700 + b * n * row * 1e-5 + (kv == "saw_int4")) for b in BATCHES for n in CONTEXTS]
        engines.append(
            Engine(
                kv=kv,
                bytes_per_token=8 * 2 * 8 * row,
                build_s=None if kv == "int4" else 61.2,
                engine_bytes=5 << 30,
                tokens=(100 << 30) // (8 * 2 * 8 * row),
                memory={"pool": 100 << 30},
                start_up=StartUp(open_s=4.5, read_s=1.5) if kv == "saw_int4" else None,
                steps=steps[:-1],
                too_large=[(256, 32768)],
                profiles=[_profile(b, n) for b, contexts in cases.PROFILED.items() for n in contexts],
                loop=Loop(batch=64, context=1100, step_us=1000, gpu_us=970),
            )
        )
    environment = Environment(
        gpu="NVIDIA H200",
        driver="580.1",
        cuda="13.0",
        tensorrt="8.6.0",
        python="3.10.13",
        saw_trtllm="0.1.0",
        commit="249ac14",
        dirty=None,
        command="python -m benchmarks engine --num_layers 8 | tee log",
        date="2026-11-27 15:00 UTC",
    )
    made = EngineResults(
        environment=environment,
        shape=Shape.of(cases.llama_config(8)),
        optimization_level=None,
        decode_profile=True,
        tokens_per_block=64,
        engines=engines,
    )
    return made.model_copy(update={"targets": judge(made)})


def _step(batch, context, us):
    return Step(
        batch=batch,
        context=context,
        repetitions=20,
        p10_us=us - 1,
        median_us=us,
        p90_us=us + 2,
        gpu_us=us - 5,
        alone_us=us + 150,
    )


def _profile(batch, context):
    parts = {"attention": 300.0, "kv_write": 40.0, "gemm": 450.0, "rest": 30.0, "ends": 250.0}
    return Profile(batch=batch, context=context, parts=parts)


def test_targets_are_held_against_the_record(results):
    found = {t.must: (t.value, t.met) for t in results.targets}
    assert len(found) == len(cases.TARGETS)
    assert found["saw_int4 holds at least 3.7x the tokens of fp16 in the same pool"] == (3.7647, True)
    assert found["GPU busy at least 0.95 of a step at batch 64"] == (0.97, True)
    assert found["start-up at most 10 s longer than reading the engine's file"] == (3.0, True)
    value, met = found["saw_int4 at least 1.9x the tokens/s of fp16 at 64x8192"]
    assert (value, met) == (round((700 + 64 * 8192 * 256e-5) / (701 + 64 * 8192 * 68e-5), 4), True)
    value, met = found["saw_int4's step at most 1.01x int4's, at its worst batch and context"]
    assert 1 < value < 1.01
    assert met
    alone = results.model_copy(update={"engines": results.engines[:1]})
    assert {t.met for t in judge(alone)} == {None}


def test_a_record_comes_back_from_its_file(results, tmp_path):
    path = tmp_path / "new" / "record.json"
    results.save(path)
    assert EngineResults.load(path) == results
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 0}))
    with pytest.raises(ConfigError, match="schema_version 0: this version reads 1"):
        EngineResults.load(path)
    path.write_text('{"kind": "engine", "schema_version": 1}')
    with pytest.raises(ConfigError, match="is not what python -m benchmarks engine --output writes"):
        EngineResults.load(path)


# -- tables and plots


def test_tables_show_what_was_measured(results):
    text = report(results).plain()
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["model"].endswith("Llama 3 8B's shape, 8 of 32 layers")
    steps, over = step_table(results), ratio_table(results, "fp16")
    assert (over[0][4], over[7][0], over[7][4]) == ("8192", "64", f"{results.speedup:.3f}x")
    assert (steps[0][6], steps[9][0], steps[9][6]) == ("32768", "256", "-")
    assert steps[7][4] == f"{results.engine('saw_int4').find(64, 8192).median_us:.0f}"
    assert ratio_table(results.model_copy(update={"engines": results.engines[:1]}), "int4")[1:] == []
    assert "300 (28 %)" in text
    assert str(Shape.of(cases.llama_config(32))) == "Llama 3 8B's shape"
    assert str(Shape.of(cases.llama_config(8, 1000))) == "8 layers of 4096, heads 32/8/128, vocabulary 1000"


def test_a_peer_is_compared_step_by_step(results):
    steps = [
        PeerStep(batch=64, context=n, step_us=2 * results.engine("saw_int4").find(64, n).median_us) for n in CONTEXTS
    ]
    made = results.model_copy(update={"peers": [Peer(name="vLLM 0.26.0", kv="fp8", dtype="bfloat16", steps=steps)]})
    rows = peer_table(made)
    assert rows[0] == [
        "sequences x context",
        *("saw_int4 µs", "fp16 µs", "vLLM 0.26.0 fp8 µs", "saw_int4 over vLLM 0.26.0 fp8"),
    ]
    assert [row[0] for row in rows[1:]] == [f"64x{n}" for n in CONTEXTS]
    assert {row[-1] for row in rows[1:]} == {"2.00x"}
    assert report(made).numbers["64x8192 over vLLM fp8"] == "2.00x"
    assert "peers" not in report(results).tables


def test_vllm_s_steps_are_differences_of_texts(monkeypatch, tmp_path):
    """A request costs 0.5 s and a token of any number of sequences 2 ms, by a clock of its own."""
    clock, asked, shape = SimpleNamespace(now=0.0), [], cases.llama_config(2, 100)

    class Vllm:
        __version__ = "0.26.0"
        SamplingParams = SimpleNamespace

        def LLM(self, **arguments):  # noqa: N802
            asked.append(arguments)
            return self

        def generate(self, prompts, sampling, use_tqdm):
            asked.append((len(prompts), len(prompts[0]["prompt_token_ids"])))
            clock.now += 0.5 + 0.002 * sampling.max_tokens

    monkeypatch.setattr(vllm, "import_vllm", Vllm)
    monkeypatch.setattr(vllm.time, "perf_counter", lambda: clock.now)
    peer = vllm._measure(tmp_path, shape, "fp8", "int4_wo", [(1, 16), (4, 16), (4, 32)])
    assert (peer.name, peer.kv, peer.dtype) == ("vLLM 0.26.0", "fp8", "bfloat16")
    assert [(s.batch, s.context, s.step_us) for s in peer.steps] == [(1, 16, 2000), (4, 16, 2000), (4, 32, 2000)]
    assert asked[0]["kv_cache_dtype"] == "fp8"
    assert asked[1] == (4, 32), "the longest first"
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_key_value_heads"] == shape.num_key_value_heads
    assert written["quantization_config"]["quant_method"] == "awq"


@pytest.mark.parametrize(("model", "parameters"), [("Llama 3 70B", 70_553_706_496), ("Qwen3 32B", 32_762_123_264)])
def test_shapes_are_those_of_their_models(model, parameters):
    config = cases.model_config(model)
    assert sum(int(np.prod(shape)) for shape in random_engine.expected_shapes(config).values()) == parameters
    assert str(Shape.of(config)) == f"{model}'s shape"
    assert (
        str(Shape.of(cases.model_config(model, 8), "fp8")) == f"{model}'s shape, 8 of {config.num_hidden_layers} layers"
    )


def test_the_plot_is_of_the_record(results, tmp_path):
    (path,) = write(tmp_path, {"x": report(results)})
    drawn = path.read_text()
    assert path == tmp_path / "plots" / "x_decode.svg"
    assert "NVIDIA H200" in drawn
    assert "batch 256" in drawn


def test_what_was_not_measured_has_no_plot(results):
    bare = [e.model_copy(update={"steps": []}) for e in results.engines]
    assert report(results.model_copy(update={"engines": bare})).plots == {}


# -- the command


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--kv int8", "--kv names 'int8': choose among fp16, int4, saw_int4"),
        ("--batch 512", "--batch names '512'"),
        ("--context x", "--context names 'x'"),
        ("--num_layers 0", "--num_layers is 0"),
        ("--vocab_size -1", "--vocab_size is -1"),
        ("--vllm int4", "--vllm is 'int4': choose among fp16, fp8"),
        ("--build_workers 0", "--build_workers is 0"),
        ("", "TensorRT cannot be imported here"),
    ],
)
def test_bad_flags_are_rejected(flags, said, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert said in rejected(capsys, command.main, "engine", *flags.split())


def test_it_needs_no_pytorch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import benchmarks.__main__, benchmarks.engine.run, benchmarks.engine.report"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
