"""python -m benchmarks serving: what it makes of perf_analyzer's timestamps."""

import contextlib
import re
import sys

import pytest

from benchmarks.__main__ import main
from benchmarks.serving import load, step_broadcast
from benchmarks.serving.record import ServingResults
from benchmarks.serving.step_broadcast import StepBroadcastResults

#: Two clients, three requests each of 100 ms: the first token of a client's n-th request comes after 10 n ms.
ANALYZER = """\
#!{python}
import json, sys
args = dict(zip(sys.argv[1:], sys.argv[2:]))
count, clients = int(args["--request-count"]), int(args["--concurrency-range"])
assert json.load(open(args["--input-data"]))["data"][0]["max_tokens"] == [16]
requests = []
for i in range(count):
    start = int(1e9) + i // clients * 100_000_000 + i % clients
    first = start + (i // clients + 1) * 10_000_000
    requests.append({{"timestamp": start, "response_timestamps": [first, start + 100_000_000]}})
json.dump({{"experiments": [{{"requests": requests[::-1]}}]}}, open(args["--profile-export-file"], "w"))
"""


def run(monkeypatch, tmp_path, engine_dir, analyzer):
    monkeypatch.setattr(load, "_Server", lambda *_: contextlib.nullcontext())
    (tmp_path / "perf_analyzer").write_text(analyzer.format(python=sys.executable))
    (tmp_path / "perf_analyzer").chmod(0o755)
    argv = ["serving", "--engine_dir", engine_dir, "--concurrency", "1,2", "--requests", "2", "--output_tokens", "16"]
    return main([*map(str, argv), "--perf_analyzer", str(tmp_path), "--output", str(tmp_path / "load.json")])


def test_a_row_for_each_concurrency(engine, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, engine("saw_int4"), ANALYZER) == 0
    record = ServingResults.load(tmp_path / "load.json")
    assert record.output_tokens == 16
    one, two = record.rows
    assert (one.kv, one.concurrency, two.concurrency) == ("saw_int4", 1, 2)
    # Without the first request of each client: the second and the third.
    assert one.requests_per_s == pytest.approx(10, abs=0.01)
    assert two.tokens_per_s == pytest.approx(20 * 16, abs=0.1)
    assert one.first_ms_p50 == pytest.approx(25)
    assert two.request_ms_p90 == pytest.approx(100)
    assert re.search(r"^saw_int4 +2 +20\.0 +320 ", capsys.readouterr().out, re.MULTILINE)


def test_a_load_that_fails_ends_with_what_was_said(engine, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, engine("saw_int4"), "#!/bin/sh\necho no server there\nexit 3\n") == 2
    assert "perf_analyzer failed with 3:\nno server there" in capsys.readouterr().err


def test_a_step_arrives_at_all_ranks_in_time(tmp_path, capsys):
    """How long it takes is measured; that each part is, for every step, is what this holds."""
    output = tmp_path / "broadcast.json"
    assert step_broadcast.main(["--steps", "40", "--sequences", "4", "--step", "0", "--output", str(output)]) == 0
    spans = StepBroadcastResults.load(output).spans
    assert spans["whole"].p50_us > max(spans[name].p50_us for name in ("pack", "send", "unpack")) > 0
    assert "from there to the last rank" in capsys.readouterr().out


def test_prompts_of_words_are_all_different():
    prompts = load._words(5, 16, 50)
    assert len(set(prompts)) == 50
    assert {word for prompt in prompts for word in prompt.split()} == {f"w{i}" for i in range(16)}
    assert {len(prompt.split()) for prompt in prompts} == {5}
