"""The kernels' benchmark without a GPU: cases, targets, a fake timer, the record, tables, plots, bad input."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from benchmarks import __main__ as command
from benchmarks.common.record import Environment
from benchmarks.common.report import write
from benchmarks.kernels import suite as bench_kernels
from benchmarks.kernels.cases import CASES, LLAMA, PEERS, SUITES, select_cases
from benchmarks.kernels.peers import OFFICIAL_FILES, FlashInfer, Official
from benchmarks.kernels.record import Bandwidth, Results
from benchmarks.kernels.report import report, suite_table
from benchmarks.kernels.run import Contender, MissingError, run_case
from saw_trtllm.errors import BackendUnavailableError, ConfigError, OpError
from tests.support.rejection import rejected

BANDWIDTH = Bandwidth(read_gbps=4000.0, copy_gbps=3500.0)
#: µs per byte over the bytes' floor, by contender.
SLOWNESS = {"saw_int4": 1.1, "saw_k8v4": 1.1, "folded": 1.08, "framed": 1.09, "int4": 1.1, "bf16": 1.05}
SLOWNESS |= {"xqa_fp8": 1.3, "flashinfer_fp8": 1.4, "xqa": 1.1, "flashinfer": 1.02, "official": 4.6}


class FakeTimer:
    """Takes a launch's time from what it returns, and keeps the order of what was run."""

    def __init__(self) -> None:
        self.turns = []

    def prepare(self, launch):
        return SimpleNamespace(us=launch(), captured=launch() < 1e6)

    def estimate(self, prepared):
        return prepared.us

    def measure(self, prepared):
        self.turns.append([p.us for p in prepared])
        return [[p.us * (1 + 0.01 * i) for i in range(-10, 11)] for p in prepared]


def fake(name, us=100.0, cosine=None, **variants):
    """What sets up a contender that takes ``us``, or the times of its variants."""
    launches = {detail: (lambda t=t: lambda: t) for detail, t in (variants or {"": us}).items()}
    return name, lambda: Contender(name, launches, bytes=200_000_000, cosine=None if cosine is None else lambda: cosine)


def fail(error):
    def set_up():
        raise error

    return set_up


def case_named(suite, name):
    return next(c for c in CASES if (c.suite, c.name) == (suite, name))


def find(case_result, contender):
    return case_result.find(contender).median_us


@pytest.fixture(scope="module")
def results():
    """A record of all cases, as a run would make it; the official kernels missing in one of them."""
    made = []
    for case in CASES:
        contenders = []
        for name in case.contenders:
            sizes = {"bf16": 512, "xqa": 512, "flashinfer": 512, "xqa_fp8": 256, "flashinfer_fp8": 256, "saw_k8v4": 200}
            size = case.batch * case.context * case.heads.num_kv_heads * sizes.get(name, 136)
            us = SLOWNESS[name] * size / BANDWIDTH.read_gbps / 1e3 + 5
            contenders.append(
                (name, lambda name=name, us=us, size=size: Contender(name, {"": lambda: lambda: us}, size))
            )
        if case.name == "64x8192":
            contenders = [(n, c if n != "official" else fail(MissingError("it is away"))) for n, c in contenders]
        made.append(run_case(case, contenders, FakeTimer(), BANDWIDTH))
    environment = Environment(
        gpu="NVIDIA H200",
        driver="580.1",
        cuda="13.0",
        python="3.12.3",
        torch="2.11.0",
        triton="3.6.0",
        flashinfer="0.7.2",
        official="0123456789abcdef" * 4,
        saw_trtllm="0.1.0",
        commit="249ac14",
        dirty=True,
        command="python -m benchmarks kernels --official sglang-fork | tee log",
        date="2026-11-22 05:00 UTC",
    )
    return Results(environment=environment, flush="256 MiB written", bandwidth=BANDWIDTH, cases=made)


# -- cases and targets


def test_the_cases_are_those_of_the_issue():
    names = {suite: [c.name for c in CASES if c.suite == suite] for suite in SUITES}
    assert names["decode"] == [
        *("64x8192", "128x4096", "256x2048", "32x16384", "32x4096", "8x32768", "8x4096"),
        *("1x131072", "1x16384", "1x4096"),
        *("64x8192 32/32/128", "64x8192 64/8/128", "64x8192 16/2/256", "64x8192 32/8/64"),
    ]
    assert names["write"] == ["1", "4", "8", "16", "64", "256", "2048", "8192", "32768"]
    assert names["prefill"][0] == "8192 after 0"
    assert {"2048 after 0", "2048 after 32768", "2048 after 131072"} < set(names["prefill"])
    assert names["layers"] == ["1x4096", "8x4096", "64x8192"]
    assert sum(map(len, names.values())) == len(CASES) == len({(c.suite, c.name) for c in CASES})
    assert {c.tokens_per_block for c in CASES} == {64}
    assert {str(LLAMA)} == {str(c.heads) for c in CASES if c.suite != "decode"} == {"32/8/128"}


def test_who_takes_part():
    for case in CASES:
        expected = {
            "decode": {"saw_int4", "int4", "bf16", "flashinfer"}
            | ({"saw_k8v4", *PEERS} if case.heads == LLAMA else set()),
            "write": {"saw_int4", "folded", "framed", "int4", "official"},
            "prefill": {"saw_int4", "bf16", "flashinfer"},
            "layers": {"saw_int4"},
        }
        assert set(case.contenders) == expected[case.suite]
        for target in case.targets:
            assert target.contender in case.contenders
            assert target.against is None or target.against in case.contenders


def test_shapes_of_a_case():
    decode, prefill = case_named("decode", "64x8192"), case_named("prefill", "2048 after 32768")
    assert (decode.tokens, decode.chunk, decode.context) == (64, 1, 8192)
    assert (prefill.tokens, prefill.batch, prefill.context) == (2048, 1, 34816)
    write = case_named("write", "32768")
    assert (write.batch, write.chunk, write.context, write.history) == (16, 2048, 2048, 0)
    assert case_named("write", "64").chunk == 1
    # Whole blocks, which is what the peers' page tables are made for.
    assert all(c.context % c.tokens_per_block == 0 for c in CASES)


def test_the_targets_are_those_of_the_issue(results):
    targets = {}
    for suite, case, must, _, _ in report(results).tables["targets"][1:]:
        targets.setdefault(f"layers {case}" if suite == "layers" else case, []).append(must)
    for name, limit in {"1x4096": 12.5, "8x4096": 22, "64x8192": 142}.items():
        assert targets[f"layers {name}"] == [f"saw_int4: at most {limit} µs"]
    large = {"64x8192": (139, 2.15), "128x4096": (140, 1.85), "256x2048": (142, 1.9), "32x16384": (146, None)}
    for name, (limit, over_xqa) in large.items():
        assert targets[name] == [
            f"saw_int4: at most {limit} µs",
            *([f"saw_int4: at least {over_xqa}x the speed of XQA fp8"] if over_xqa else []),
            "saw_int4: at least 90 % of read bandwidth",
            "saw_int4: at least 3.4x the speed of FlashInfer bf16",
            "saw_int4: at least 4.6x the speed of official Triton INT4",
            "bf16 rows: at most 1.08x the time of FlashInfer bf16",
            "saw_int4: at most 1.01x the time of int4",
        ]
    limits = {"32x4096": 43, "8x32768": 75.5, "8x4096": 17.5, "1x131072": 43, "1x16384": 13, "1x4096": 9}
    for name, limit in limits.items():
        assert targets[name] == [f"saw_int4: at most {limit} µs", "saw_int4: at most 1.01x the time of int4"]
    for heads, share in (("32/32/128", 78), ("64/8/128", 85), ("16/2/256", 85), ("32/8/64", 83)):
        assert targets[f"64x8192 {heads}"][0] == f"saw_int4: at least {share} % of read bandwidth"
    for tokens in ("1", "4", "8", "16", "64", "256"):
        framed = ["saw_int4, frames: at most 1 µs more than saw_int4, V folded"] if tokens != "256" else []
        assert targets[tokens] == [
            "saw_int4: at most 1.05x the time of int4",
            "saw_int4: at most 0.5x the time of official Triton INT4",
            *framed,
        ]
    assert targets["32768"] == [
        *(f"{name}: at least 85 % of copy bandwidth" for name in ("saw_int4", "saw_int4, V folded")),
        "saw_int4, frames: at most 1.15x the time of saw_int4, V folded",
    ]
    for name in ("8192 after 0", *(f"2048 after {n}" for n in (8192, 32768, 131072))):
        assert targets[name] == ["saw_int4: at least 0.97x the speed of FlashInfer bf16"]
    assert "2048" not in targets
    assert "2048 after 0" not in targets


def test_without_peers_neither_they_nor_their_targets_remain():
    cases = select_cases(["decode", "write"], [], quick=False)
    assert {c.suite for c in cases} == {"decode", "write"}
    assert not any(set(c.contenders) & set(PEERS) for c in cases)
    assert {t.against for c in cases for t in c.targets} == {None, "int4", "folded"}
    with_one = select_cases(["decode"], ["flashinfer"], quick=False)
    assert {t.against for c in with_one for t in c.targets} == {None, "int4", "flashinfer"}


def test_quick_keeps_some_of_each_suite():
    cases = select_cases(SUITES, PEERS, quick=True)
    assert {c.suite for c in cases} == set(SUITES)
    assert len(cases) < len(CASES) / 2


# -- the run


def test_times_become_medians_rates_and_shares():
    timer = FakeTimer()
    case = case_named("decode", "64x8192")
    measured = run_case(case, [fake("saw_int4", 100.0, cosine=0.99), fake("int4", 120.0)], timer, BANDWIDTH)
    assert timer.turns == [[100.0, 120.0]]  # measured together
    m = measured.find("saw_int4")
    assert (m.p10_us, m.median_us, m.p90_us, m.repetitions) == (92.0, 100.0, 108.0, 21)
    assert (m.gbps, m.share, m.cosine, m.tflops) == (2000.0, 0.5, 0.99, None)  # 200 MB in 100 µs, of 4 TB/s
    write = run_case(case_named("write", "1"), [fake("saw_int4")], FakeTimer(), BANDWIDTH)
    assert write.find("saw_int4").share == round(2000 / 3500, 4)
    prefill = run_case(case_named("prefill", "8192 after 0"), [fake("saw_int4")], FakeTimer(), BANDWIDTH)
    assert prefill.find("saw_int4").share is None


def test_a_contender_runs_with_its_fastest_variant():
    case = case_named("decode", "1x4096")
    measured = run_case(case, [fake("flashinfer", fa2=30.0, fa3=20.0, auto=25.0)], FakeTimer(), BANDWIDTH)
    assert (measured.find("flashinfer").detail, measured.find("flashinfer").median_us) == ("fa3", 20.0)


def test_a_variant_that_fails_is_passed_over_and_a_contender_without_any_is_missing():
    def broken():
        raise RuntimeError("no kernel for this card\nmore")

    variants = {"fa2": lambda: lambda: 30.0, "fa3": broken}
    case = case_named("decode", "1x4096")
    contenders = [
        ("flashinfer", lambda: Contender("flashinfer", variants, 1000)),
        ("official", lambda: Contender("official", {"8 splits": lambda: broken}, 1000)),
        ("bf16", fail(MissingError("not built"))),
        ("int4", fail(OpError("q has dtype int8"))),
    ]
    measured = run_case(case, contenders, FakeTimer(), BANDWIDTH)
    assert measured.find("flashinfer").detail == "fa2"
    assert measured.find("flashinfer").failed == {"fa3": "RuntimeError: no kernel for this card"}
    assert measured.missing == {
        "official": "8 splits: RuntimeError: no kernel for this card",
        "bf16": "not built",
        "int4": "q has dtype int8",
    }


@pytest.mark.parametrize("cosine", [0.5, float("nan")])
def test_the_speed_of_a_wrong_result_is_not_recorded(cosine):
    case = case_named("decode", "1x4096")
    measured = run_case(case, [fake("saw_int4", 1.0, cosine=cosine), fake("int4", 100.0)], FakeTimer(), BANDWIDTH)
    assert [m.contender for m in measured.measurements] == ["int4"]
    assert "its output is wrong" in measured.missing["saw_int4"]
    assert {t.met for t in measured.targets} == {None}


def test_targets_are_judged_on_medians():
    case = case_named("decode", "64x8192")
    contenders = [fake("saw_int4", 140.0), fake("int4", 139.0), fake("bf16", 550.0), fake("flashinfer", 500.0)]
    measured = run_case(case, contenders, FakeTimer(), BANDWIDTH)
    assert [(t.value, t.unit, t.met) for t in measured.targets] == [
        (140.0, "µs", False),
        (None, "x", None),
        (round(2e8 / 140e3 / 4e3, 4), "%", False),
        (round(500 / 140, 4), "x", True),
        (None, "x", None),
        (1.1, "x", False),
        (round(140 / 139, 4), "x", True),
    ]


class BrokenTimer(FakeTimer):
    """Faults in its third case, as a kernel may."""

    def measure(self, prepared):
        if len(self.turns) == 2:
            raise RuntimeError("CUDA error: an illegal memory access\nmore")
        return super().measure(prepared)


def test_what_was_measured_before_a_fault_is_kept(results, monkeypatch, tmp_path, capsys):
    def contenders(case, *_):
        return [fake(name) for name in case.contenders]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    for name, stand_in in {
        "kernels": lambda: None,
        "CudaTimer": BrokenTimer,
        "measure_bandwidth": lambda timer: BANDWIDTH,
        "describe": lambda *_, **known: results.environment,
        "_contenders": contenders,
    }.items():
        monkeypatch.setattr(bench_kernels, name, stand_in)
    path = tmp_path / "x.json"
    assert command.main(["kernels", "--suite", "decode", "--peers", "none", "--output", str(path)]) == 2
    record = Results.load(path)
    assert [c.name for c in record.cases] == ["64x8192", "128x4096"]
    out, err = capsys.readouterr()
    assert "128x4096" in out
    assert "error: decode 256x2048 ended the run (RuntimeError: CUDA error: an illegal memory access)" in err


# -- the record


def test_record_round_trip(results, tmp_path):
    path = tmp_path / "results" / "x.json"
    results.save(path)
    assert Results.load(path) == results
    assert json.loads(path.read_text())["environment"]["gpu"] == "NVIDIA H200"


def test_a_record_has_no_other_fields(results):
    raw = json.loads(results.model_dump_json())
    raw["cases"][0]["measurements"][0]["fastest"] = True
    with pytest.raises(ValidationError, match="fastest"):
        Results.model_validate(raw)


# -- tables and plots


def test_suite_table(results):
    table = suite_table(results, "decode")
    header, first = table[0], table[1]
    row = dict(zip(header, first, strict=True))
    assert row["sequences x context"] == "64x8192"
    case = results.cases[0]
    assert row["saw_int4 µs"] == f"{find(case, 'saw_int4'):.1f}"
    assert row["official Triton INT4 µs"] == row["speedup over official Triton INT4"] == "-"
    assert row["speedup over the fp8 peer"] == f"{find(case, 'xqa_fp8') / find(case, 'saw_int4'):.2f}x"
    assert row["speedup over FlashInfer bf16"] == f"{find(case, 'flashinfer') / find(case, 'saw_int4'):.2f}x"
    assert {len(r) for r in table} == {len(header)}
    assert len(table) == 15


def test_the_terminal_gets_everything(results):
    text = report(results).plain()
    for section in ("environment", *SUITES, "targets", "not measured"):
        assert f"{section}\n" in text
    assert "decode official Triton INT4 (64x8192): it is away" in text
    assert not re.search(r" +$", text, re.MULTILINE)


def test_plots_come_from_the_record_alone(results, tmp_path):
    first = list(write(tmp_path / "a", {"x": report(results)}))
    assert [p.name for p in first] == ["x_decode.svg", "x_write.svg", "x_prefill.svg"]
    for path in first:
        drawn = path.read_text()
        assert path.stat().st_size < 100_000
        assert "NVIDIA H200" in drawn
        assert "saw_int4" in drawn
    assert len(list(write(tmp_path / "b", {"x": report(results)}))) == 3
    for path in first:
        assert (tmp_path / "b" / "plots" / path.name).read_bytes() == path.read_bytes()


def test_a_suite_that_was_not_run_has_no_plot(results):
    only = results.model_copy(update={"cases": results.suite("write")})
    assert list(report(only).plots) == ["write"]
    assert "decode\n" not in report(only).plain()


# -- the command


def test_plot_without_matplotlib(results, tmp_path, capsys, monkeypatch):
    results.save(tmp_path / "x.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = rejected(capsys, command.main, "report", tmp_path / "x.json", "--output", tmp_path)
    assert "pip install 'saw-trtllm[bench]'" in error


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        (["--suite", "decode,encode"], "suite 'encode' is unknown: choose among decode, write, prefill, layers"),
        (
            ["--peers", "vllm"],
            "peer 'vllm' is unknown: choose among xqa_fp8, flashinfer_fp8, xqa, ",
        ),
        (["--peers", "official"], "--official DIR"),
        (["--peers", ""], "peer '' is unknown"),
        (["--output", "."], ". cannot be written"),
        (["--output", "/dev/null/x.json"], "/dev/null/x.json cannot be written"),
    ],
)
def test_kernels_rejects(argv, needed, capsys):
    assert needed in rejected(capsys, command.main, "kernels", *argv)


def test_kernels_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU" in rejected(capsys, command.main, "kernels", "--peers", "none")


def test_kernels_needs_the_module(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "saw_trtllm._C", None)
    monkeypatch.delattr("saw_trtllm._C", raising=False)
    assert "build_scripts/kernels" in rejected(capsys, command.main, "kernels", "--peers", "none")


def test_kernels_needs_pytorch():
    code = "import sys; sys.modules['torch'] = None; from benchmarks.__main__ import main; sys.exit(main(['kernels']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the kernels' benchmark needs PyTorch with CUDA")


def test_flashinfer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(BackendUnavailableError, match="--peers none"):
        FlashInfer()


def test_official_folder_that_lacks_a_file(tmp_path):
    lacking = list(OFFICIAL_FILES.values())[-1]
    for file in OFFICIAL_FILES.values():
        if file != lacking:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("")
    with pytest.raises(ConfigError, match=f"lacks {re.escape(lacking)}: give a checkout of"):
        Official(tmp_path)


def test_official_files_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    for file in OFFICIAL_FILES.values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("import sglang.srt.utils\nraise RuntimeError('no Triton here')")
    with pytest.raises(ConfigError, match="no Triton here"):
        Official(tmp_path)


def test_official_files_find_each_other_without_sglang(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    quant, fused, decode = OFFICIAL_FILES.values()
    texts = {
        quant: "value = 1",
        fused: "from sglang.srt.mem_cache.kv_quant_kernels import value",
        decode: "from sglang.srt.utils import is_hip\nassert not is_hip()",
    }
    for file, text in texts.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    first = Official(tmp_path).digest
    (tmp_path / quant).write_text("value = 2")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert Official(tmp_path).digest != first


def test_every_contender_is_set_up_on_the_case_s_tensors(monkeypatch):
    """The GPU's half is not here; that each name finds its function is."""
    called = []

    class Side:
        def __getattr__(self, suite):
            return lambda given, name: called.append((suite, given, name))

    for operation in ("layers", "paged_attention", "rotate_quantize_kv"):
        monkeypatch.setattr(bench_kernels, operation, Side())
    monkeypatch.setattr(bench_kernels.Problem, "make", lambda case: f"tensors of {case.name}")
    for suite, name in (("decode", "1x4096"), ("write", "1"), ("prefill", "8192 after 0"), ("layers", "1x4096")):
        case = case_named(suite, name)
        for _, set_up in bench_kernels._contenders(case, Side(), Side()):
            set_up()
        given = case if suite == "write" else f"tensors of {name}"
        assert [c for c in called if c[0] == suite] == [(suite, given, c) for c in case.contenders]
