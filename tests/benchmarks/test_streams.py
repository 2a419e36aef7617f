"""python -m benchmarks streams: an executor that computes nothing, real servers, a stand-in for perf_analyzer."""

import contextlib
import sys
import time

import pytest

from benchmarks.__main__ import main
from benchmarks.common.null_executor import Pace, open_null
from benchmarks.streams import bootstrap, run
from benchmarks.streams.clients import ask_triton
from benchmarks.streams.record import StreamsResults
from saw_trtllm import SamplingParams
from saw_trtllm.errors import ConfigError

#: Every request begins at once, has two responses, and ends after 4 s.
ANALYZER = """\
#!{python}
import json, sys
args = dict(zip(sys.argv[1:], sys.argv[2:]))
data = json.load(open(args["--input-data"]))["data"]
requests = [{{"timestamp": 10**9, "response_timestamps": [2 * 10**9, 5 * 10**9]}}] * int(args["--request-count"])
json.dump({{"experiments": [{{"requests": requests}}]}}, open(args["--profile-export-file"], "w"))
"""


def test_ways_are_measured_beside_the_bare_runtime(engine, monkeypatch, tmp_path, capsys):
    (tmp_path / "perf_analyzer").write_text(ANALYZER.format(python=sys.executable))
    (tmp_path / "perf_analyzer").chmod(0o755)

    def triton(engine_dir, pace):
        return contextlib.nullcontext(run.Way(lambda *asked: ask_triton("x", *asked, True, tmp_path), {}))

    monkeypatch.setitem(run._WAYS, "triton_stream", triton)
    argv = ["streams", "--engine_dir", engine("saw_int4"), "--clients", "2", "--output_tokens", "16"]
    argv += ["--paths", "llm,triton_stream,saw_serve", "--pace", "1,0,0", "--perf_analyzer", tmp_path]
    argv += ["--prompt_tokens", "8", "--output", tmp_path / "streams.json"]
    assert main(list(map(str, argv))) == 0
    llm, triton, saw_serve = StreamsResults.load(tmp_path / "streams.json").rows
    for row, process in ((llm, "llm"), (saw_serve, "saw_serve")):
        # Two texts of 16 steps each, one client's after the other, of a millisecond at least.
        assert row.tokens_per_s <= 2 * 1000
        assert row.cpu_us_per_token[process] > 0
    assert (triton.tokens_per_s, triton.responses_per_s) == (2 * 2 * 16 / 4, 2 * 2 * 2 / 4)
    assert triton.first_ms_p50 == 1000
    assert f"{triton.tokens_per_s / llm.tokens_per_s:.2f}" in capsys.readouterr().out


def test_a_pace_is_kept_and_said_in_three_numbers(engine):
    with open_null(engine("saw_int4"), Pace(step=10)) as llm:
        start = time.monotonic()
        assert len(llm.generate([1, 2], SamplingParams(max_tokens=20, ignore_eos=True)).outputs[0].token_ids) == 20
        assert time.monotonic() - start >= 0.2
    for text in ("fast", "1,2", "1,2,3,4", "-1,0,0", "nan,0,0", "1,nan,0", "inf,0,0"):
        with pytest.raises(ConfigError, match=r"give milliseconds of a step, a sequence and a prompt's token"):
            Pace.parse(text)


def test_tritons_model_gets_the_executor_that_computes_nothing(engine, tmp_path):
    flags = ["--engine_dir", str(engine("saw_int4")), "--model_repo", str(tmp_path / "repository")]
    assert bootstrap.main(["1,2,3", "saw-triton", *flags]) == 0
    model = (tmp_path / "repository" / "tensorrt_llm" / "1" / "model.py").read_text()
    assert "patched(Pace.parse('1,2,3')).start()" in model
    compile(model, "model.py", "exec")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--clients", "0"], "--clients is '0': give numbers from 1 on"),
        (["--paths", "llm,vllm"], "--paths names 'vllm': the paths are llm, triton_stream"),
        (["--pace", "fast"], "--pace is 'fast'"),
        (["--requests", "0"], "--requests is 0: it must be at least 1"),
    ],
)
def test_bad_flags_are_one_sentence(flags, sentence, tmp_path, capsys):
    assert main(["streams", "--engine_dir", str(tmp_path), *flags]) == 2
    assert sentence in capsys.readouterr().err
