"""A real tritonserver, its real clients and perf_analyzer.

With the reference's engine, on any machine; or with ``SAW_TEST_ENGINE=DIR`` with the engine that TensorRT runs:

    saw-build --model_dir examples/tiny_llama --backend tensorrt --max_seq_len 1024 --max_batch_size 64
        --gather_context_logits --output_dir DIR
"""

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common.ports import free_ports
from benchmarks.serving import launch_trials
from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import SawError
from saw_trtllm.serve import metrics, names
from saw_trtllm.serve.installation import STUB, find_server
from tests.support import ROOT, reference_texts
from tests.support.example import build_example
from tests.support.tolerance import example_rounding

grpc_client = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

pytestmark = pytest.mark.triton

GIVEN = os.environ.get("SAW_TEST_ENGINE")
#: Logits of TensorRT's engine that lie so near may come in either order: its sums, in 16 bits, follow the batch. In a
#: cache of 4 bits a rounding can move a code, which all tokens after it see.
NEAR_TIE, NEAR_TIE_4_BITS = 0.15, 2.0
PROMPT = "def read_config(path):"
UNICODE = "naïve café, 日本語 and 🎉👩‍🚀 emoji"
MAX_SEQ_LEN = 1024

DTYPES = {"STRING": "BYTES"}
SPECS = {m.name: {t.name: t for t in m.inputs} for m in names.MODELS}
NUMPY = {"STRING": object, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": bool}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    if GIVEN is not None:
        return Path(GIVEN)
    options = {"max_seq_len": MAX_SEQ_LEN, "gather_context_logits": True}
    return build_example(tmp_path_factory.mktemp("engine"), **options)


@pytest.fixture(scope="module")
def llm(engine_dir):
    with LLM(engine_dir, kv_cache_config=KvCacheConfig(deterministic=True)) as llm:
        yield llm


class Server:
    """``saw-triton --launch`` in a process of its own."""

    def __init__(self, engine_dir, folder, *flags):
        self.grpc, self.http, self.metrics = free_ports(3)
        self.repository = folder / "repo"
        self.log = folder / "log"
        command = [sys.executable, "-m", "saw_trtllm.cli.triton", "--launch", "--engine_dir", engine_dir]
        command += ["--deterministic"]  # so that its texts are those of the LLM beside it
        command += ["--model_repo", self.repository, "--grpc_port", self.grpc, "--http_port", self.http]
        command += ["--metrics_port", self.metrics, *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
        self.ready = self.process.stdout.readline()

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        try:
            code = self.process.wait(60)
        finally:
            self.process.kill()
            self.process.stdout.close()
        return code


@contextmanager
def running_server(engine_dir, folder, *flags):
    """A server that becomes ready and ends well; without one to be had the tests are skipped."""
    try:
        find_server(None, folder / "backends")
    except SawError as e:
        pytest.skip(str(e))
    server = Server(engine_dir, folder, *flags)
    assert server.ready.startswith("ready: "), server.log.read_text()
    yield server
    assert server.stop() == 0, server.log.read_text()


@pytest.fixture(scope="module")
def server(engine_dir, tmp_path_factory):
    with running_server(engine_dir, tmp_path_factory.mktemp("triton")) as server:
        yield server
    log = server.log.read_text()
    assert "was cut off" not in log, log  # all requests of all tests have ended


class Client:
    """A gRPC stream."""

    def __init__(self, server):
        self.responses = queue.Queue()
        self._client = grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        self._client.start_stream(lambda result, error: self.responses.put(error or result))

    def send(self, model, request_id="", **values):
        inputs = []
        for name, value in values.items():
            spec = SPECS[model][name]
            array = value if isinstance(value, np.ndarray) else as_array(value, NUMPY[spec.dtype])
            tensor = grpc_client.InferInput(name, array.shape, DTYPES.get(spec.dtype, spec.dtype))
            inputs.append(tensor.set_data_from_numpy(array))
        self._client.async_stream_infer(model, inputs, request_id=request_id, enable_empty_final_response=True)

    def next(self):
        response = self.responses.get(timeout=120)
        if isinstance(response, Exception):
            raise response
        return response

    def all(self):
        """Responses up to the final one; that one only if it holds something."""
        out = []
        while True:
            response = self.next()
            message = response.get_response()
            if message.outputs:
                out.append(response)
            if message.parameters["triton_final_response"].bool_param:
                return out

    def cancel(self):
        self._client.stop_stream(cancel_requests=True)

    def close(self):
        self._client.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def text_of(response):
    """The text of a response for one prompt, whose shape is what TensorRT-LLM's own clients count on."""
    [text] = response.as_numpy("text_output")
    return text.decode()


def as_array(value, dtype):
    values = value if isinstance(value, list) else [value]
    return np.array([[v.encode() if isinstance(v, str) else v for v in values]], dtype)


def generate(server, prompt, max_tokens=16, exclude_input_in_output=True, **options):
    """Pieces of text over gRPC."""
    with Client(server) as client:
        options = {"text_input": prompt, "max_tokens": max_tokens, **options}
        client.send("ensemble", exclude_input_in_output=exclude_input_in_output, **options)
        return [text_of(r) for r in client.all()]


def post(server, path, body):
    """HTTP status and body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=120)
    connection.request("POST", f"/v2/models/ensemble/{path}", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


def read_metrics(server):
    """Series by name and, where it has one, type label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=60) as response:
        text = response.read().decode()
    series = {}
    for name, labels, value in re.findall(r"^((?:saw|nv_trt_llm)_\w+)\{(.*)\} (\S+)$", text, re.M):
        kind = re.search(r'(?:request|kv_cache_block)_type="(\w+)"', labels)
        series[(name, kind[1]) if kind else name] = float(value)
    return series


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not become so within 60 s"
        time.sleep(0.05)


def active(server):
    return read_metrics(server)[metrics.REQUESTS, "active"]


def when_idle(server, before=None):
    """The metrics once nothing runs and no block is held, and once they show a request since ``before``: they lag
    behind a little."""
    accepted = before["saw_requests_total"] + 1 if before else 0

    def idle():
        seen = read_metrics(server)
        busy = seen[metrics.REQUESTS, "active"] + seen[metrics.BLOCKS, "used"]
        return seen["saw_requests_total"] >= accepted and busy == 0

    earlier, latest = None, {}
    while latest != earlier:  # they are not updated all in one moment
        wait_until(idle)
        time.sleep(0.25)
        earlier, latest = latest, read_metrics(server)
    return latest


def assert_well(server, llm):
    assert_text("".join(generate(server, PROMPT)), llm, PROMPT, 16)


def assert_text(text, llm, prompt, max_tokens):
    """The text is what the runtime alone gives; with a GPU's engine, up to a near tie."""
    expected = llm.generate(prompt, SamplingParams(max_tokens=max_tokens)).outputs[0]
    if GIVEN is None or text == expected.text:
        assert text == expected.text
        return
    decode = llm.tokenizer.decode
    ids = next(
        expected.token_ids[:n] for n in range(max_tokens) if not text.startswith(decode(expected.token_ids[: n + 1]))
    )
    params = SamplingParams(max_tokens=1, return_context_logits=True)
    logits = llm.generate(llm.tokenizer.encode(prompt) + ids, params).context_logits[-1]
    assert np.diff(np.sort(logits)[-2:]) < near_tie(llm.config), (text, expected.text)


def near_tie(config):
    return NEAR_TIE_4_BITS if config.kv_format.quantized else NEAR_TIE


# Answers


def test_ready_line_names_the_endpoints(server):
    endpoints = f"gRPC 127.0.0.1:{server.grpc}, HTTP http://127.0.0.1:{server.http}"
    assert server.ready == f"ready: {endpoints}, metrics http://127.0.0.1:{server.metrics}/metrics\n"


@pytest.mark.parametrize("prompt", [PROMPT, f"<|end_of_text|>{UNICODE}"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.25, "top_k": 40, "seed": 7}], ids=["greedy", "sampled"])
def test_grpc_text_is_that_of_the_runtime(server, llm, prompt, options):
    # Long enough that the first piece is on its way before the last token: pieces that wait go out as one.
    expected = llm.generate(prompt, SamplingParams(max_tokens=200, **options)).outputs[0]
    streamed = generate(server, prompt, 200, stream=True, **options)
    assert "".join(streamed) == expected.text
    assert len(streamed) > 1
    expected = llm.generate(prompt, SamplingParams(max_tokens=24, **options)).outputs[0]
    assert generate(server, prompt, 24, **options) == [expected.text]
    assert generate(server, prompt, 24, exclude_input_in_output=False, **options) == [prompt + expected.text]


def test_characters_of_many_bytes_are_never_torn(server, llm):
    # A character outside of the vocabulary is several tokens: a strong penalty brings many of them forth.
    options = {"temperature": 5.0, "top_p": 1.0, "seed": 11}
    expected = llm.generate(UNICODE, SamplingParams(max_tokens=200, end_id=-1, **options)).outputs[0].text
    pieces = generate(server, UNICODE, 200, stream=True, end_id=-1, **options)
    assert any(len(c.encode()) > 1 for c in expected)
    assert "".join(pieces) == expected


def test_http(server, llm):
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=12)).outputs[0].text
    # The body of TensorRT-LLM's own curl examples: empty words mean none.
    body = {"text_input": PROMPT, "max_tokens": 12, "bad_words": "", "stop_words": ""}
    status, text = post(server, "generate", body)
    assert status == 200
    assert json.loads(text)["text_output"] == PROMPT + expected
    # Long enough that the first piece is on its way before the last token: pieces that wait go out as one.
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=200)).outputs[0].text
    status, text = post(server, "generate_stream", {**body, "max_tokens": 200, "stream": True})
    assert status == 200
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert "".join(e["text_output"] for e in events) == expected
    assert len(events) > 1


def test_stop_words(server, llm):
    text = llm.generate(PROMPT, SamplingParams(max_tokens=32)).outputs[0].text
    stop = text[9:12]
    expected = text[: text.index(stop)]
    for stream in (False, True):
        assert "".join(generate(server, PROMPT, 32, stream=stream, stop_words=["never", stop])) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_word_may_be_or_hold_a_special_token(server, llm, stream):
    prompt, end = '        self.assertTrue(x)\n\n\nif __name__ == "__main__":\n    ', "<|end_of_text|>"
    end_id, options = llm.tokenizer.token_id(end), {"temperature": 1.0, "top_k": 5, "end_id": -1}
    for seed in range(100):  # to the first draw that says it after some text, which a CPU's rounding may decide
        options["seed"] = seed
        ids = llm.generate(prompt, SamplingParams(max_tokens=32, **options)).outputs[0].token_ids
        if end_id in ids and len(text := llm.tokenizer.decode(ids[: ids.index(end_id)])) > 1:
            break
    else:
        pytest.fail("no draw says it")
    for stop, expected in ((end, text), (text[-1] + end, text[:-1])):
        assert "".join(generate(server, prompt, 32, stream=stream, stop_words=["never", stop], **options)) == expected


def test_results_that_were_asked_for(server, llm):
    asked = ("return_log_probs", "return_context_logits", "return_num_input_tokens", "return_num_output_tokens")
    with Client(server) as client:
        client.send("ensemble", text_input=PROMPT, max_tokens=6, **dict.fromkeys(asked, True))
        [response] = client.all()
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=6, logprobs=True, return_context_logits=True))
    bound = example_rounding(expected.context_logits)
    np.testing.assert_allclose(response.as_numpy("context_logits")[0], expected.context_logits, rtol=0, atol=bound)
    log_probs = response.as_numpy("output_log_probs")[0, 0]
    np.testing.assert_allclose(log_probs, expected.outputs[0].logprobs, rtol=0, atol=2 * bound)
    assert response.as_numpy("num_input_tokens").tolist() == [[len(expected.prompt_token_ids)]]
    assert response.as_numpy("num_output_tokens").tolist() == [[6]]
    assert response.as_numpy("generation_logits") is None


def test_several_prompts_in_one_request(server, llm):
    prompts = [PROMPT, "The module provides", UNICODE]
    with Client(server) as client:
        client.send(
            "ensemble",
            text_input=np.array([[p.encode()] for p in prompts], object),
            max_tokens=np.array([[4], [8], [12]], np.int32),
            stream=np.full((3, 1), True),
        )
        texts = ["", "", ""]
        for r in client.all():
            texts[r.as_numpy("batch_index").item()] += text_of(r)
    for prompt, max_tokens, text in zip(prompts, (4, 8, 12), texts, strict=True):
        assert_text(text, llm, prompt, max_tokens)


def test_token_ids_to_tensorrt_llm(server, llm):
    ids = llm.tokenizer.encode(PROMPT)
    with Client(server) as client:
        client.send("tensorrt_llm", input_ids=ids, input_lengths=len(ids), request_output_len=8, streaming=True)
        out = [i for r in client.all() for i in r.as_numpy("output_ids")[0, 0].tolist()]
    assert out == llm.generate(ids, SamplingParams(max_tokens=8)).outputs[0].token_ids


def test_32_streams_at_once(server, llm):
    prompts = [f"{PROMPT} # {i}" for i in range(32)]
    texts = {}

    def stream(prompt):
        texts[prompt] = "".join(generate(server, prompt, 12, stream=True))

    threads = [threading.Thread(target=stream, args=(p,)) for p in prompts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for prompt in prompts:
        assert_text(texts[prompt], llm, prompt, 12)


@pytest.mark.tensorrt
@pytest.mark.skipif(GIVEN is None, reason="SAW_TEST_ENGINE names no engine of TensorRT")
def test_tokens_are_the_references_up_to_a_near_tie(server, engine_dir, tmp_path):
    config, equal = EngineConfig.load(engine_dir), 0
    for ids, expected, gaps in reference_texts.load(config.saw_int4.kv, tmp_path):
        with Client(server) as client:
            options = {"request_output_len": len(expected), "end_id": -1, "streaming": True}
            client.send("tensorrt_llm", input_ids=ids, input_lengths=len(ids), **options)
            found = [i for r in client.all() for i in r.as_numpy("output_ids")[0, 0].tolist()]
        assert len(found) == len(expected)
        first = next((n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
        assert first is None or gaps[first] < near_tie(config), (first, gaps[first])
        equal += first is None
    assert equal > 0


# Clients that go away

LONG = {"text_input": PROMPT, "max_tokens": 900, "stream": True, "end_id": -1}


def gone_in_good_order(server):
    with Client(server) as client:
        client.send("ensemble", **LONG)
        client.next()
        client.cancel()


def gone_with_its_process(server):
    script = (
        "import tests.triton.test_server as t, types, time;"
        f"c = t.Client(types.SimpleNamespace(grpc={server.grpc})); c.send('ensemble', **t.LONG); c.next();"
        "print('started', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.kill()
    process.wait()
    process.stdout.close()


def gone_over_http(server):
    body = json.dumps(LONG).encode()
    with socket.create_connection(("127.0.0.1", server.http)) as s:
        head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        s.sendall(head.encode() + body)
        assert b"200 OK" in s.recv(4096)


def gone_without_streaming(server):
    with Client(server) as client:
        client.send("ensemble", **LONG | {"stream": False})
        wait_until(lambda: active(server) == 1)
        client.cancel()


def gone_from_tensorrt_llm(server):
    with Client(server) as client:
        client.send("tensorrt_llm", input_ids=[70] * 9, input_lengths=9, request_output_len=900, end_id=-1)
        wait_until(lambda: active(server) == 1)
        client.cancel()


def stopped_by_another_request(server):
    with Client(server) as client, Client(server) as other:
        client.send("ensemble", request_id="the one", **LONG)
        client.next()
        other.send("tensorrt_llm", "the one", input_ids=[1], input_lengths=1, request_output_len=1, stop=True)
        assert other.next().get_response().parameters["triton_final_response"].bool_param
        client.all()  # the text ends as it is


@pytest.mark.parametrize(
    "go",
    [
        gone_in_good_order,
        gone_with_its_process,
        gone_over_http,
        gone_without_streaming,
        gone_from_tensorrt_llm,
        stopped_by_another_request,
    ],
)
def test_a_client_that_goes_away(server, llm, go):
    before = when_idle(server)
    go(server)
    after = when_idle(server, before)
    assert after["saw_generated_tokens_total"] - before["saw_generated_tokens_total"] < 900
    assert_well(server, llm)


# Bad input

BAD = [
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": MAX_SEQ_LEN}, f"max_seq_len {MAX_SEQ_LEN}"),
    ({"text_input": "word " * 2000}, "shorten it"),
    ({"text_input": ""}, "the prompt is empty"),
    ({"text_input": b"\xff\xfe"}, "the prompt is not valid UTF-8"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"top_p": 2.0}, "top_p is 2"),
    ({"top_k": -3}, "top_k is -3"),
    ({"bad_words": ["x" * 20_000]}, "bad holds 1 stops of 20000 bytes"),
    ({"beam_width": 4}, "beam_width is 4"),
    ({"return_generation_logits": True}, "--gather_generation_logits"),
    ({"min_tokens": 17}, "min_tokens is 17"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_over_grpc(server, llm, options, sentence, stream):
    with Client(server) as client:
        client.send("ensemble", **{"text_input": PROMPT, "max_tokens": 16, "stream": stream, **options})
        with pytest.raises(grpc_client.InferenceServerException, match=sentence) as e:
            client.all()
    assert "\n" not in e.value.message()
    assert_well(server, llm)


def test_error_code(server):
    # A stream's errors are a message alone. Only a single call has a code, and only models that are not decoupled
    # take one. (The header triton_grpc_error gives streams codes, but lets tritonserver 2.51 crash now and then.)
    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        inputs = [grpc_client.InferInput("QUERY", [1, 1], "BYTES")]
        inputs += [grpc_client.InferInput("REQUEST_OUTPUT_LEN", [1, 1], "INT32")]
        inputs[0].set_data_from_numpy(as_array("", object))
        inputs[1].set_data_from_numpy(as_array(1, np.int32))
        with pytest.raises(grpc_client.InferenceServerException, match="the prompt is empty") as e:
            client.infer("preprocessing", inputs)
    assert e.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"temprature": 0.5}, "temprature, which this model does not know"),
        ({"lora_task_id": 3}, "lora_task_id"),
        (b'{"text_input": "\xff", "max_tokens": 4}', "the prompt is not valid UTF-8"),
        (b'{"text_input": "x", "max_tokens": 4, "temperature": NaN}', "temperature is nan"),
    ],
)
def test_bad_input_over_http(server, llm, body, sentence):
    if isinstance(body, dict):
        body = {"text_input": PROMPT, "max_tokens": 16, **body}
    for path in ("generate", "generate_stream"):
        status, text = post(server, path, body)
        assert status == 400
        assert sentence in json.loads(text.removeprefix("data: "))["error"]
    assert_well(server, llm)


# The server itself


def test_configuration_is_what_the_server_reports(server):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        for name in SPECS:
            written = text_format.Parse(
                (server.repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
            )
            reported = client.get_model_config(name).config
            for field, _ in written.ListFields():
                if field.name != "instance_group":  # the server names its groups
                    assert getattr(reported, field.name) == getattr(written, field.name), field.name
            assert len(reported.instance_group) == len(written.instance_group)


def test_metrics(server, llm):
    before = when_idle(server)
    expected = {
        "saw_requests_total": 1,
        "saw_prompt_tokens_total": len(llm.tokenizer.encode(PROMPT)),
        "saw_generated_tokens_total": 16,
        "saw_time_to_first_token_seconds_count": 1,
    }

    def grown():
        return {name: after[name] - before[name] for name in expected}

    generate(server, PROMPT, 16, end_id=-1)
    after = when_idle(server, before)
    while any(grown()[name] < count for name, count in expected.items()):  # which ends with the test's time
        after = when_idle(server, before)
    assert grown() == expected
    assert after["saw_time_to_first_token_seconds_sum"] > before["saw_time_to_first_token_seconds_sum"]
    blocks = {kind: after[metrics.BLOCKS, kind] for kind in ("max", "used", "free", "tokens_per")}
    assert blocks["used"] + blocks["free"] == blocks["max"] == llm.stats().max_blocks
    assert blocks["tokens_per"] == 32
    documented = {m.family for m in metrics.METRICS}
    assert documented <= {name if isinstance(name, str) else name[0] for name in after}


def test_perf_analyzer(server, tmp_path):
    tool = [str(ROOT / "build_scripts" / "perf_analyzer"), str(ROOT / "build" / "perf_analyzer")]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    fetched = subprocess.run([*tool, "--version"], capture_output=True, text=True, env=env)
    if fetched.returncode != 0 and "Perf Analyzer" not in fetched.stdout + fetched.stderr:
        pytest.skip(f"perf_analyzer cannot be had: {fetched.stderr.strip()[-300:]}")
    # As genai-perf writes it for --backend tensorrtllm.
    prompts = [PROMPT, "The module provides", UNICODE]
    common = {"max_tokens": [8], "min_length": [8], "stream": [True], "exclude_input_in_output": [True]}
    (tmp_path / "in.json").write_text(json.dumps({"data": [{"text_input": [p], **common} for p in prompts]}))
    options = ["-m", "ensemble", "-u", f"127.0.0.1:{server.grpc}", "-i", "grpc", "--streaming", "--async"]
    options += ["--input-data", tmp_path / "in.json", "--concurrency-range", "4", "--request-count", "24"]
    options += ["--profile-export-file", tmp_path / "out.json", "--max-trials", "1"]
    done = subprocess.run([*tool, *map(str, options)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    requests = json.loads((tmp_path / "out.json").read_text())["experiments"][0]["requests"]
    assert len(requests) == 24
    # Pieces that wait go out as one, so that on a busy machine a short text may have one alone.
    counts = [len(r["response_timestamps"]) for r in requests]
    assert 1 <= min(counts) <= max(counts) <= 8
    assert max(counts) > 1


def test_damaged_engine_ends_the_launch_in_one_sentence(server, engine_dir, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in engine_dir.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    os.truncate(damaged / "rank0.engine", 10_000)
    config = json.loads((damaged / "config.json").read_text())
    del config["saw_int4"]["checksums"]  # which would stop it before the server starts
    (damaged / "config.json").write_text(json.dumps(config))
    launched = Server(damaged, tmp_path)
    assert launched.ready == ""
    assert launched.process.wait(60) == 2
    launched.process.stdout.close()
    error = launched.log.read_text().splitlines()[-1]
    assert error.startswith("error: tritonserver ended before it was ready: ")
    assert "rank0.engine cannot be read as an engine" in error


@pytest.fixture
def launch(engine_dir, tmp_path, monkeypatch):
    """``saw-triton --launch`` with one restart, as benchmarks/serving/launch_trials.py watches it."""
    monkeypatch.setattr(launch_trials, "LIMIT", 60.0)  # a machine that does much else
    with launch_trials.Launch(engine_dir, tmp_path, restart=1) as launch:
        yield launch


def test_server_starts_again_without_a_stub_and_ends_with_one_that_is_stuck(launch):
    launch.wait_ready()
    launch.find(STUB).kill()
    launch.wait_ready()
    assert "has lost the process of its model" in launch.log.read_text()
    launch.stream()
    launch.find(STUB).suspend()
    launch.process.send_signal(signal.SIGTERM)
    launch.end(signal.SIGINT, 0)  # the second signal does not wait for the texts


def test_server_does_not_outlive_its_launcher(launch):
    launch.wait_ready()
    launch.end(signal.SIGKILL, -signal.SIGKILL)


def test_port_in_use(server, engine_dir, tmp_path):
    command = [sys.executable, "-m", "saw_trtllm.cli.triton", "--launch", "--engine_dir", engine_dir]
    ports = free_ports(2)
    command += ["--model_repo", tmp_path / "repo", "--grpc_port", server.grpc, "--http_port", ports[0]]
    command += ["--metrics_port", ports[1]]
    rejected = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert rejected.returncode == 2
    assert rejected.stderr.startswith(f"error: --grpc_port {server.grpc} cannot be used on 127.0.0.1")


# Triton's own OpenAI front-end


def front_end_inputs(prompt, stream, max_tokens=12, exclude_input=None, **options):
    """What ``openai_frontend`` sends for a request: TensorRT-LLM's tensors, all with its defaults filled in."""
    inputs = {"text_input": prompt, "stream": stream, "max_tokens": max_tokens, "temperature": 0.0, "top_p": 1.0}
    inputs |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, **options}
    if exclude_input is not None:  # of /v1/completions alone
        inputs["exclude_input_in_output"] = exclude_input
    return {**inputs, "return_num_input_tokens": True, "return_num_output_tokens": True}


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_front_end_of_triton_finds_what_it_counts_on(server, llm, stream):
    """One text in a response, one response or a last empty one beside it, counts as INT32 that add up to the usage."""
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=12)).outputs[0]
    with Client(server) as client:
        client.send("ensemble", **front_end_inputs(PROMPT, stream, exclude_input=True))
        responses = client.all()
    assert stream or len(responses) == 1
    assert all(response.as_numpy("text_output").size == 1 for response in responses)
    assert_text("".join(map(text_of, responses)), llm, PROMPT, 12)
    counts = {name: [r.as_numpy(name) for r in responses] for name in ("num_input_tokens", "num_output_tokens")}
    assert {count.dtype for values in counts.values() for count in values} == {np.dtype(np.int32)}
    assert counts["num_input_tokens"][0].item() == len(llm.tokenizer.encode(PROMPT))
    assert GIVEN or sum(count.item() for count in counts["num_output_tokens"]) == len(expected.token_ids)


def test_the_front_ends_other_fields(server, llm):
    schema = {"enum": ["Oslo", "Rome"]}
    guide = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(schema)}
    seeded = {"seed": 7, "temperature": 0.8, "stop_words": ["zz", "\n\n"]}
    with Client(server) as client:
        texts = []
        for options in ({"exclude_input": False}, guide, seeded, seeded):
            client.send("ensemble", **front_end_inputs(PROMPT, False, **{"exclude_input": True, **options}))
            texts += map(text_of, client.all())
    assert texts[0].startswith(PROMPT)
    assert json.loads(texts[1]) in schema["enum"]
    assert texts[2] == texts[3]
