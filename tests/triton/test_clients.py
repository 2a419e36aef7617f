"""Clients that wait for one response, as they come, against a real tritonserver with ``--decoupled_mode false``."""

import asyncio
import json
import queue

import numpy as np
import pytest

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from tests.support.example import build_example
from tests.triton.test_server import PROMPT, active, as_array, post, read_metrics, running_server, wait_until

grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
pytriton = pytest.importorskip("pytriton.client", reason="nvidia-pytriton is not installed")
import tritonclient.grpc.aio  # noqa: E402
import tritonclient.http.aio  # noqa: E402

pytestmark = pytest.mark.triton

TYPES = {"b": "BOOL", "f": "FP32", "i": "INT32", "O": "BYTES"}
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    return build_example(tmp_path_factory.mktemp("engine"), max_seq_len=1024)


@pytest.fixture(scope="module")
def llm(engine_dir):
    with LLM(engine_dir, kv_cache_config=KvCacheConfig(deterministic=True)) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(engine_dir, tmp_path_factory):
    with running_server(engine_dir, tmp_path_factory.mktemp("triton"), "--decoupled_mode", "false") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        yield client


def tensors(module, **values):
    """Inputs of one prompt, or with arrays of several."""
    inputs = []
    for name, value in values.items():
        kind = {str: object, bool: bool, float: np.float32, int: np.int32}.get(type(value))
        array = value if kind is None else as_array(value, kind)
        tensor = module.InferInput(name, list(array.shape), TYPES[array.dtype.kind])
        tensor.set_data_from_numpy(array)  # which gives nothing back in tritonclient 2.34
        inputs.append(tensor)
    return inputs


def asked(module):
    return tensors(module, text_input=PROMPT, max_tokens=MAX_TOKENS, exclude_input_in_output=True)


def over_grpc(server, model, **options):
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        return client.infer(model, asked(grpc), **options)


def over_grpc_with_a_callback(server, model):
    answers = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        client.async_infer(model, asked(grpc), lambda result, error: answers.put(error or result))
        return answers.get(timeout=60)


def over_a_grpc_stream(server, model):
    answers = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer(model, asked(grpc))
        return answers.get(timeout=60)


def over_grpc_with_asyncio(server, model):
    async def ask():
        async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            return await client.infer(model, asked(grpc))

    return asyncio.run(ask())


def over_http(server, model, **options):
    with http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
        return client.infer(model, asked(http), **options)


def over_http_as_json(server, model):
    return over_http(server, model, outputs=[http.InferRequestedOutput("text_output", binary_data=False)])


def over_http_later(server, model):
    with http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
        return client.async_infer(model, asked(http)).get_result()


def over_http_with_asyncio(server, model):
    async def ask():
        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
            return await client.infer(model, asked(http))

    return asyncio.run(ask())


def http_compressed(algorithm):
    def ask(server, model):
        names = ("request_compression_algorithm", "response_compression_algorithm")
        return over_http(server, model, **dict.fromkeys(names, algorithm))

    return ask


class Answer(dict):
    """Named arrays, as PyTriton's client gives them, under the name that tritonclient has for it."""

    as_numpy = dict.__getitem__


def by_pytriton(scheme):
    def ask(server, model):
        with pytriton.ModelClient(f"{scheme}://127.0.0.1:{getattr(server, scheme)}", model) as client:
            values = {"text_input": PROMPT.encode(), "exclude_input_in_output": True}
            named = {name: np.array([[value]]) for name, value in values.items()}
            return Answer(client.infer_batch(**named, max_tokens=np.array([[MAX_TOKENS]], np.int32)))

    return ask


CLIENTS = {
    "grpc": over_grpc,
    "grpc gzip": lambda *a: over_grpc(*a, compression_algorithm="gzip"),
    "grpc deflate": lambda *a: over_grpc(*a, compression_algorithm="deflate"),
    "grpc callback": over_grpc_with_a_callback,
    "grpc stream": over_a_grpc_stream,
    "grpc aio": over_grpc_with_asyncio,
    "http": over_http,
    "http json": over_http_as_json,
    "http gzip": http_compressed("gzip"),
    "http deflate": http_compressed("deflate"),
    "http later": over_http_later,
    "http aio": over_http_with_asyncio,
    "PyTriton http": by_pytriton("http"),
    "PyTriton grpc": by_pytriton("grpc"),
}


@pytest.mark.filterwarnings("ignore:tritonclient.grpc does")  # of PyTriton
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
@pytest.mark.parametrize("ask", CLIENTS.values(), ids=CLIENTS)
def test_every_client_gets_the_text(server, llm, ask, model):
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=MAX_TOKENS)).outputs[0].text
    text = ask(server, model).as_numpy("text_output")
    assert [t if isinstance(t, str) else t.decode() for t in text] == [expected]


def test_generate_over_http(server, llm):
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=MAX_TOKENS)).outputs[0].text
    for path in ("generate", "generate_stream"):
        status, body = post(server, path, {"text_input": PROMPT, "max_tokens": MAX_TOKENS})
        assert status == 200
        assert json.loads(body.removeprefix("data: "))["text_output"] == PROMPT + expected


def test_options_may_be_parameters_of_generate(server, llm):
    """Where litellm puts them, and examples of tensorrtllm_backend do; it sends empty words as well."""
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=MAX_TOKENS)).outputs[0].text
    options = {"max_tokens": MAX_TOKENS, "bad_words": [""], "stop_words": [""]}
    status, body = post(server, "generate", {"text_input": PROMPT, "parameters": options, "stream": False})
    assert status == 200, body
    assert json.loads(body)["text_output"] == PROMPT + expected


def test_many_at_once(client, llm):
    prompts = [f"{PROMPT} # {i}" for i in range(24)]
    answers = queue.Queue()
    for i, prompt in enumerate(prompts):
        inputs = tensors(grpc, text_input=prompt, max_tokens=8, exclude_input_in_output=True)
        client.async_infer("ensemble", inputs, lambda result, error: answers.put(error or result), request_id=str(i))
    texts = {}
    for _ in prompts:
        answer = answers.get(timeout=60)
        [texts[int(answer.get_response().id)]] = answer.as_numpy("text_output")
    expected = llm.generate(prompts, SamplingParams(max_tokens=8))
    assert [texts[i].decode() for i in range(24)] == [e.outputs[0].text for e in expected]


def test_several_prompts_in_one_request(client, llm):
    prompts, lengths = [PROMPT, "The module provides", "x"], (4, 12, 8)
    answer = client.infer(
        "ensemble",
        tensors(
            grpc,
            text_input=np.array([[p.encode()] for p in prompts], object),
            max_tokens=np.array([[n] for n in lengths], np.int32),
            exclude_input_in_output=np.full((3, 1), True),
        ),
    )
    expected = llm.generate(prompts, [SamplingParams(max_tokens=n) for n in lengths])
    assert [t.decode() for t in answer.as_numpy("text_output")] == [e.outputs[0].text for e in expected]
    assert answer.as_numpy("batch_index").tolist() == [[0], [1], [2]]


def test_a_temperature_alone_is_greedy(client):
    def text(**options):
        inputs = tensors(grpc, text_input=PROMPT, max_tokens=24, **options)
        return client.infer("ensemble", inputs).as_numpy("text_output").tolist()

    assert text(temperature=5.0) == text()
    assert text(temperature=5.0, top_k=500) != text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stream": True}, "start saw-triton with --decoupled_mode true"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "word " * 10**6}, "5000000 bytes, too many for the 1023 tokens"),
    ],
)
def test_bad_input_has_its_code_and_counts_as_a_failure(client, options, sentence):
    def failures():
        [stats] = client.get_inference_statistics("ensemble").model_stats
        return stats.inference_stats.fail.count

    before = failures()
    with pytest.raises(grpc.InferenceServerException, match=sentence) as e:
        client.infer("ensemble", tensors(grpc, **{"text_input": PROMPT, "max_tokens": 4, **options}))
    assert e.value.status() == "StatusCode.INVALID_ARGUMENT"
    wait_until(lambda: failures() > before)  # counted once it has been answered


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_empty_batch_is_answered(client, tokens):
    inputs = tensors(grpc, TOKENS_BATCH=np.zeros((0, 0, tokens), np.int32), SEQUENCE_LENGTH=np.zeros((0, 0), np.int32))
    with pytest.raises(grpc.InferenceServerException) as e:
        client.infer("postprocessing", inputs, client_timeout=60)
    assert e.value.status() == "StatusCode.INVALID_ARGUMENT"


LONG = {"input_ids": np.full((1, 9), 70, np.int32), "input_lengths": 9, "request_output_len": 1000, "end_id": -1}


def running(server):
    return active(server) == 1


def test_a_stop_is_answered_and_ends_the_request(server, client):
    answers = queue.Queue()
    inputs = tensors(grpc, **LONG)
    client.async_infer("tensorrt_llm", inputs, lambda result, error: answers.put(error or result), request_id="mine")
    wait_until(lambda: running(server))
    # As TensorRT-LLM's client asks for it.
    stop = tensors(grpc, input_ids=1, input_lengths=0, request_output_len=0, stop=True)
    answer = client.infer("tensorrt_llm", stop, request_id="mine", parameters={"Streaming": False})
    assert not answer.get_response().outputs
    assert answers.get(timeout=60).as_numpy("sequence_length").item() < 9 + 1000


def test_a_client_that_goes_away_without_streaming(server, client):
    call = client.async_infer("tensorrt_llm", tensors(grpc, **LONG), lambda result, error: None)
    wait_until(lambda: running(server))
    before = read_metrics(server)["saw_generated_tokens_total"]
    call.cancel()
    wait_until(lambda: not running(server))
    assert read_metrics(server)["saw_generated_tokens_total"] - before < 1000
