"""``saw-bench``: what it sends, and what it makes of the times."""

import json
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import pytest

from saw_trtllm import KvCacheConfig
from saw_trtllm.bench import load
from saw_trtllm.bench.load import Limits, Percentiles, run_load
from saw_trtllm.bench.workload import Turn, random_conversations, read_dataset
from saw_trtllm.cli.bench import main
from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime.stats import Stats
from tests.support.example import build_example


class Recorder:
    """Counts the requests of an LLM that are in flight."""

    def __init__(self, llm):
        self.llm, self.flying, self.most = llm, 0, 0

    async def _count(self, result):
        self.flying += 1
        self.most = max(self.most, self.flying)
        async for output in result:
            yield output
        self.flying -= 1

    def generate_async(self, *args, **options):
        return self._count(self.llm.generate_async(*args, **options))

    def stats(self):
        return self.llm.stats()


def test_a_load_keeps_to_its_concurrency_and_counts_all_tokens(open_llm):
    done = []
    recorder = Recorder(open_llm())
    report = run_load(recorder, random_conversations(7, 12, 5, 100, seed=0), 3, lambda: done.append(1))
    assert recorder.most == 3
    assert len(done) == 7
    assert (report.num_requests, report.input_tokens, report.output_tokens) == (7, 84, 35)
    assert report.output_tokens_per_s == pytest.approx(35 / report.duration_s)
    assert 0 < report.time_to_first_token_ms.p50 <= report.request_latency_ms.p99
    assert report.time_between_tokens_ms is not None


def test_a_text_of_one_token_has_no_time_between_tokens(open_llm):
    report = run_load(open_llm(), random_conversations(2, 3, 1, 100, seed=0), 2)
    assert report.time_between_tokens_ms is None
    assert report.output_tokens == 2


def test_percentiles_are_in_milliseconds():
    times = Percentiles.of([i / 1000 for i in range(101)])
    assert (times.mean, times.p50, times.p90, times.p99) == pytest.approx((50, 50, 90, 99))


def test_random_prompts_differ_and_come_again():
    jobs = random_conversations(4, 16, 2, 1000, seed=3)
    assert len({tuple(turn.prompt) for [turn] in jobs}) == 4
    assert jobs == random_conversations(4, 16, 2, 1000, seed=3)
    assert all(0 <= token < 1000 for [turn] in jobs for token in turn.prompt)


def test_a_dataset_is_read_in_its_order(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"task_id": 0, "prompt": "one", "output_tokens": 4}\n\n{"input_ids": [1, 2], "output_tokens": 3}\n'
    )
    assert read_dataset(path, None, 9, list) == [[Turn("one", 4)], [Turn([1, 2], 3)]]
    assert read_dataset(path, 1, 9, list) == [[Turn("one", 4)]]


def test_a_trace_of_mooncake_shares_what_its_hashes_share(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [(0, 700, [1, 2]), (250, 1000, [1, 3])]
    entries = [{"timestamp": t, "input_length": n, "output_length": 5, "hash_ids": ids} for t, n, ids in lines]
    path.write_text("\n".join(map(json.dumps, entries)))
    [a], [b] = read_dataset(path, None, 100, list)
    assert (len(a.prompt), len(b.prompt), a.output_len, b.delay) == (700, 1000, 5, 0.25)
    assert a.prompt[:512] == b.prompt[:512]
    assert a.prompt[512:] != b.prompt[512:700]


def test_conversations_of_sharegpt_become_turns(tmp_path):
    path = tmp_path / "chat.json"
    said = [
        ("system", "be kind. "),
        ("human", "hi"),
        ("gpt", "hello"),
        ("human", "bye"),
        ("gpt", "good bye"),
        ("human", "?"),
    ]
    path.write_text(json.dumps([{"id": 1, "conversations": [{"from": who, "value": text} for who, text in said]}]))
    [turns] = read_dataset(path, None, 100, list)
    assert turns == [Turn("be kind. hi", 5), Turn("bye", 8)]


def test_a_conversation_finds_what_it_has_said(open_llm):
    """Each turn's prompt is all before it: of that, all but the last token of the answer comes from the cache."""
    llm = open_llm(kv_cache_config=KvCacheConfig())
    conversations = random_conversations(2, 40, 6, 100, seed=1, turns=3, turn_len=10, system_len=32)
    report = run_load(llm, conversations, 1, limits=Limits(first_token_ms=1e9))
    assert (report.num_requests, report.output_tokens) == (6, 36)
    assert report.input_tokens == 2 * (72 + 88 + 104)
    assert report.reused_tokens == 2 * (77 + 93) + 32
    assert report.hit_rates == {"pool": report.reused_tokens / report.input_tokens, "host": 0, "disk": 0}
    assert report.goodput_requests_per_s == report.requests_per_s


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "holds 0 requests"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "x"}', "line 1: output_tokens: Field required"),
        ('{"prompt": "x", "input_ids": [1], "output_tokens": 1}', "give one of prompt and input_ids"),
        ('{"output_tokens": 1}', "give one of prompt and input_ids"),
        ('{"input_ids": [], "output_tokens": 1}', "line 1: input_ids"),
        ("[" * 100_000, "requests.jsonl is not JSON"),
        ('[{"conversations": [{"from": "human"}]}]', "entry 1: conversations.0.value: Field required"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "1 hash_ids of 512 tokens"),
        ('{"timestamp": Infinity, "input_length": 6, "output_length": 1, "hash_ids": [1]}', "line 1: timestamp"),
        ('{"timestamp": -1, "input_length": 6, "output_length": 1, "hash_ids": [1]}', "line 1: timestamp"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": [1]}', "line 1: input_length"),
        ('{"conversations": 5}', "line 1: conversations"),
        ('[{"conversations": [{"from": "human", "value": "hi"}]}]', "holds 0 requests"),
    ],
)
def test_a_dataset_of_another_form(text, what, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_dataset(path, None, 9, list)


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_the_command_prints_a_report(command, engine, capsys):
    flags = ["--input_len", "8", "--output_len", "4", "--num_requests", "3"]
    assert main([command, "--engine_dir", str(engine("saw_int4")), *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_requests"], report["output_tokens"]) == (3, 12)
    assert report["concurrency"] == (1 if command == "latency" else 64)


def say(*texts):
    return {"conversations": [{"from": who, "value": text} for who, text in zip(cycle(("human", "gpt")), texts)]}


def arrive(timestamp, length, *ids):
    return {"timestamp": timestamp, "input_length": length, "output_length": 4, "hash_ids": ids}


#: Files as they are found, with what they come to on the example's engine: requests, tokens in and out.
TRACES = {
    "sharegpt.json": (json.dumps([say("def push(", "self):", "def pop(", "self):"), say("x = ", "1")]), 3),
    "sharegpt.jsonl": ("\n".join(map(json.dumps, [say("def push(", "self):"), say("x = ", "1")])), 2),
    "mooncake.jsonl": ("\n".join(map(json.dumps, [arrive(0, 600, 5, 6), arrive(20, 700, 5, 7)])), 2),
    "requests.jsonl": ('{"prompt": "def push(", "output_tokens": 3}\n{"input_ids": [1, 2], "output_tokens": 3}\n', 2),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_of_each_form_is_held(name, engine, tmp_path, capsys):
    """From a file to goodput and hit rates, in a pool of so many bytes, which a block of the host's makes larger."""
    text, count = TRACES[name]
    (tmp_path / name).write_text(text)
    flags = ["--dataset", str(tmp_path / name), "--kv_cache_bytes", str(1536 * 1088), "--concurrency", "1"]
    flags += ["--host_cache_size", str(64 * 32 * 1088), "--max_ttft_ms", "1e9", "--warmup", "0", "--json"]
    assert main(["throughput", "--engine_dir", str(engine("saw_int4")), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_requests"] == count
    assert report["goodput_requests_per_s"] == report["requests_per_s"] > 0
    assert set(report["hit_rates"]) == {"pool", "host", "disk"}
    if name == "mooncake.jsonl":
        assert (report["input_tokens"], report["output_tokens"], report["reused_tokens"]) == (1300, 8, 512)
        assert report["hit_rates"]["pool"] == 512 / 1300
        assert report["moved_bytes"]["stored"] > 0


class Slow:
    """An LLM whose every token takes five seconds of a clock of its own."""

    now = 0.0

    def clock(self):
        return self.now

    def stats(self):
        return Stats()

    async def generate_async(self, prompt, params, streaming):
        for count in range(1, params.max_tokens + 1):
            self.now += 5
            text = SimpleNamespace(token_ids_diff=[1], token_ids=[1] * count)
            yield SimpleNamespace(outputs=[text], prompt_token_ids=prompt, num_reused_tokens=0)


@pytest.mark.parametrize(("delay", "seconds"), [(0.0, [5, 5, 5]), (1e-9, [5, 10, 15])])
def test_the_wait_for_a_place_counts_from_when_a_request_came(delay, seconds, monkeypatch):
    """Three at once, one at a time: of a trace that says when they came the second and third have waited before."""
    slow = Slow()
    monkeypatch.setattr(load.time, "perf_counter", slow.clock)
    conversations = [[Turn([1], 1, delay)] for _ in seconds]
    report = run_load(slow, conversations, 1)
    assert report.time_to_first_token_ms.mean == pytest.approx(1e3 * sum(seconds) / 3)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (Limits(), 2),
        (Limits(first_token_ms=4999), 0),
        (Limits(between_tokens_ms=4999), 1),  # a text of one token has none
        (Limits(first_token_ms=5000, between_tokens_ms=5000), 2),
    ],
)
def test_what_is_within_the_limits_is_goodput(limits, good, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(load.time, "perf_counter", slow.clock)
    report = run_load(slow, [[Turn([1], 3)], [Turn([1], 1)]], 1, limits=limits)
    assert report.goodput_requests_per_s == good / report.duration_s


def test_what_came_from_each_tier_is_a_share_of_the_prompts():
    before = Stats(prompt_tokens_total=200, reused_tokens_total=100, loaded_blocks_total=3, loaded_tokens_total=30)
    after = replace(before, num_running=10, prompt_tokens_total=600, reused_tokens_total=300)
    after = replace(after, loaded_blocks_total=13, loaded_tokens_total=130)
    counted = replace(after, disk_read_blocks_total=4).since(before)
    assert (counted.num_running, counted.loaded_blocks_total) == (10, 10)
    assert counted.hit_rates == {"pool": 0.25, "host": 60 / 400, "disk": 40 / 400}
    assert Stats().hit_rates == {"pool": 0, "host": 0, "disk": 0}


def test_an_engine_of_two_ranks_is_timed(tmp_path, capsys):
    folder = build_example(tmp_path, kv="fp16", tp_size=2)
    flags = ["--input_len", "8", "--output_len", "4", "--num_requests", "1", "--ranks", "processes", "--json"]
    assert main(["latency", "--engine_dir", str(folder), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["output_tokens"] == 4


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "neither --dataset nor both"),
        (["--input_len", "8"], "neither --dataset nor both"),
        (["--dataset", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["--dataset", "absent.jsonl", "--input_len", "3"], "give the one or the others"),
        (["--dataset", "absent.jsonl", "--system_len", "3"], "give the one or the others"),
        (["--input_len", "9000", "--output_len", "4"], "conversation 1 cannot be held: "),
        (["--input_len", "900", "--output_len", "4", "--turns", "3", "--turn_len", "900"], "cannot come to its turn 3"),
        (["--input_len", "80", "--output_len", "4", "--kv_cache_max_tokens", "64"], "the KV cache has 2"),
        (["--input_len", "8", "--output_len", "4", "--kv_cache_bytes", "9"], "9 holds no block, of 34816 bytes"),
        (["--input_len", "8", "--output_len", "4", "--kv_cache_bytes", "9", "--kv_cache_max_tokens", "9"], "one of"),
    ],
)
def test_flags_that_do_not_fit_end_in_one_sentence(flags, what, engine, capsys):
    assert main(["throughput", "--engine_dir", str(engine("saw_int4")), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert what in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_an_engine_must_be_given_and_help_does_not_invent_one(command, capsys):
    for argv, code in (["--help"], 0), ([], 2):
        with pytest.raises(SystemExit) as e:
            main([command, *argv])
        assert e.value.code == code
    said = capsys.readouterr()
    assert "Undefined" not in said.out
    assert "the following arguments are required: --engine_dir" in said.err
