"""``saw-bench``: what it sends, and what it makes of the times."""

import json

import pytest

from saw_trtllm import KvCacheConfig
from saw_trtllm.bench.load import Limits, Percentiles, run_load
from saw_trtllm.bench.workload import Turn, random_conversations, read_dataset
from saw_trtllm.cli.bench import main
from saw_trtllm.errors import ConfigError
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
    assert report.goodput_requests_per_s == report.requests_per_s
    assert run_load(llm, conversations[:1], 1, limits=Limits(between_tokens_ms=1e-9)).goodput_requests_per_s == 0


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
        (["--input_len", "9000", "--output_len", "4"], "shorten it"),
    ],
)
def test_flags_that_do_not_fit_end_in_one_sentence(flags, what, engine, capsys):
    assert main(["throughput", "--engine_dir", str(engine("saw_int4")), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert what in captured.err
    assert captured.err.count("\n") == 1
