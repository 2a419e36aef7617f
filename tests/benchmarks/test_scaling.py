"""Steps by the GPUs of an engine, without a GPU: the run over a fake executor, record, targets, tables, plot."""

import pytest

from benchmarks import __main__ as command
from benchmarks.common.environment import describe
from benchmarks.common.report import align, draw
from benchmarks.engine import cases
from benchmarks.engine.plan import Plan
from benchmarks.engine.record import Engine, Profile, Shape, Step
from benchmarks.scaling import run
from benchmarks.scaling.record import Ranks, ScalingResults, Sum
from benchmarks.scaling.report import report
from benchmarks.scaling.run import judge, run_scaling
from saw_trtllm.errors import KernelError
from tests.support.example import build_example
from tests.support.fakes import benchmark as fake_benchmark
from tests.support.rejection import rejected

STEPS = ((1, 1024), (64, 8192))


def ranks(tp_size, **us):
    """Engines whose two steps take so many µs, and the sums of more than one rank."""
    engines = []
    for kv, times in us.items():
        known = {"repetitions": 1, "p10_us": 0, "p90_us": 0, "gpu_us": 0, "alone_us": 0}
        steps = [Step(batch=b, context=c, median_us=x, **known) for (b, c), x in zip(STEPS, times, strict=True)]
        parts = {"attention": 400.0} | ({"ranks": 100.0} if tp_size > 1 else {})
        engines.append(
            Engine(
                kv=kv,
                bytes_per_token=1,
                build_s=None,
                engine_bytes=1,
                tokens={"fp16": 1000, "saw_int4": 3760}[kv] * tp_size,
                memory={},
                start_up=None,
                steps=steps,
                too_large=[],
                profiles=[Profile(batch=64, context=8192, parts=parts)],
                loop=None,
            )
        )
    sums = [Sum(rows=1, kernel_us=3.8, nccl_us=6.4), Sum(rows=2048, kernel_us=None, nccl_us=75.5)]
    return Ranks(tp_size=tp_size, engines=engines, sums=sums if tp_size > 1 else [])


@pytest.fixture
def results():
    runs = [ranks(1, fp16=(5000, 20000), saw_int4=(5000, 10000)), ranks(2, fp16=(3200, 12000), saw_int4=(3000, 5800))]
    where = describe("python -m benchmarks scaling", "249ac14")
    return ScalingResults(environment=where, shape=Shape.of(cases.model_config("Qwen3 32B")), nccl="2.28.9", runs=runs)


def test_a_record_is_held_against_its_targets(results):
    found = {t.must: (t.value, t.met) for t in judge(results)}
    assert found == {
        "1x1024: two GPUs at most 0.62x of one's step": (0.6, True),
        "64x8192: two GPUs at most 0.56x of one's step": (0.58, False),
        "a sum of 1 row between two GPUs in at most 12 µs": (3.8, True),
        "64x8192: at least 2x the tokens/s of fp16": (2.069, True),
        "at least 3.7x the tokens of fp16 fit": (3.76, True),
    }
    other = results.model_copy(update={"shape": Shape.of(cases.model_config("Llama 3 8B"))})
    assert not any("fp16" in t.must for t in judge(other))


def test_tables_and_plot(results, tmp_path):
    said = report(results)
    lines = align(said.tables).splitlines()
    assert "saw_int4  64x8192              10000 µs  5800 µs (0.58x)   20 %" in lines
    assert "saw_int4  1x1024               5000 µs   3000 µs (0.60x)   -" in lines
    assert said.tables["tokens"][1:] == [["fp16", "1,000", "2,000"], ["saw_int4", "3,760", "7,520"]]
    assert said.tables["sums"][1:] == [["1", "3.8", "6.4"], ["2048", "", "75.5"]]
    assert said.numbers["tp 2 saw_int4 64x8192 µs"] == "5800"
    draw(tmp_path, {"scaling_steps": said.plots["steps"]})
    assert "saw_int4, 64x8192" in (tmp_path / "scaling_steps.svg").read_text()


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Of one rank: the example's engine, and the stand-ins that run it."""
    folder = build_example(tmp_path / "tp1" / "saw_int4", kv="saw_int4", max_batch_size=4)
    fake_benchmark.install(monkeypatch, folder)
    return Plan.of(tmp_path / "tp1", ["saw_int4"], cases.llama_config(4), batches=(1, 2), contexts=(16,))


def test_a_run_from_its_engines_to_its_record(plan, tmp_path, monkeypatch):
    """Of one rank twice: more need a GPU each. A run that ends early keeps what it has."""
    output = tmp_path / "record.json"
    results = run_scaling([plan], "python -m benchmarks scaling", "249ac14", output)
    assert ScalingResults.load(output) == results
    (found,) = results.runs
    assert (found.tp_size, found.sums, results.aborted) == (1, [], None)
    assert [(s.batch, s.context) for s in found.engine("saw_int4").steps] == plan.steps()

    def fail(*arguments):
        raise KernelError("a sum was not computed")

    monkeypatch.setattr(run, "measure_sums", fail)
    monkeypatch.setattr(run, "Ranks", lambda tp_size, engines: Ranks(tp_size=2, engines=engines))
    results = run_scaling([plan], "python -m benchmarks scaling", "249ac14", output)
    assert ScalingResults.load(output).aborted == "the run ended early: a sum was not computed"
    assert results.of(2).engine("saw_int4").steps


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tp_size", "2,1"], "--tp_size is '2,1': give each number of GPUs once, the fewest first"),
        (["--tp_size", "0"], "--tp_size is '0': give numbers from 1 on"),
        (["--tp_size", "3"], "tp_size 3 does not divide num_attention_heads 32"),
        (["--kv", "int3"], "--kv names 'int3': choose among"),
        (["--num_layers", "0"], "--num_layers is 0: it must be at least 1"),
        (["--build_only"], "--build_only was given without --engine_dir"),
    ],
)
def test_flags_that_cannot_be(flags, sentence, capsys):
    assert sentence in rejected(capsys, command.main, "scaling", *flags)
