"""What a server answers to what is wrong: OpenAI's shape, one sentence, before a stream opens."""

import json
import socket

import httpx
import openai
import pytest

from saw_trtllm.errors import EngineError, SawError
from saw_trtllm.serve.openai.errors import BY_CLASS, BY_CODE, answer_to, error_body
from tests.support.example import build_example
from tests.support.openai_server import serving_engines, wait_until_idle
from tests.support.turns import held_steps

USER = {"role": "user", "content": "write a class"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
KWARGS = "chat_template_kwargs"
TOOL = {"type": "function", "function": {"name": "f"}}


def deep(levels, inmost):
    """An object or a list within another, and so on."""
    for _ in range(levels):
        inmost = {"a": inmost} if isinstance(inmost, dict) else [inmost]
    return inmost


@pytest.fixture(scope="module")
def http():
    with httpx.Client(timeout=60) as http:
        yield http


def error_of(response):
    """An error's status and fields; its message is one sentence."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return response.status_code, error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "said"),
    [
        (CHAT, {"messages": [USER], "modalities": []}, 400, "unknown_parameter", "modalities", "has no modalities"),
        (CHAT, {}, 400, "missing_required_parameter", "messages", "messages is missing"),
        (CHAT, {"messages": []}, 400, "invalid_value", "messages", "messages is []"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_value", "messages.0", "message 0 has no content"),
        (CHAT, {"messages": [USER], "temperature": "hot"}, 400, "invalid_value", "temperature", "valid number"),
        (CHAT, {"messages": [USER], "temperature": "1"}, 400, "invalid_value", "temperature", "valid number"),
        (CHAT, {"messages": [USER], "n": True}, 400, "invalid_value", "n", "valid integer"),
        (CHAT, {"messages": [USER], "ignore_eos": "yes"}, 400, "invalid_value", "ignore_eos", "valid boolean"),
        (CHAT, {"messages": [{**USER, "role": "admin"}]}, 400, "invalid_value", "messages.0.role", "the role 'admin'"),
        (CHAT, {"messages": [{**USER, "\ud800": 1}]}, 400, "unknown_parameter", r"messages.0.\ud800", "has a field"),
        (CHAT, {"messages": [USER], "cache_salt": "\ud800"}, 400, "invalid_value", "cache_salt", "whole characters"),
        (TEXT, {"prompt": "a", "cache_salt": "\ud800"}, 400, "invalid_value", "cache_salt", "whole characters"),
        (CHAT, {"messages": [{**USER, "audio": {"id": "a"}}]}, 400, "unknown_parameter", "messages.0.audio", "'audio'"),
        (CHAT, {"messages": [USER], "temperature": 3}, 400, "invalid_value", "temperature", "less than or equal to 2"),
        (CHAT, {"messages": [USER], "n": 0}, 400, "invalid_value", "n", "greater than or equal to 1"),
        (CHAT, {"messages": [USER], "top_logprobs": 2}, 400, "invalid_value", "top_logprobs", "needs logprobs"),
        (
            CHAT,
            {"messages": [USER], "max_tokens": 5000},
            400,
            "context_length_exceeded",
            "messages",
            "max_seq_len 2048",
        ),
        (
            CHAT,
            {"messages": [{**USER, "content": "x" * 40000}]},
            400,
            "context_length_exceeded",
            "messages",
            "takes 2047",
        ),
        (CHAT, {"messages": [USER], "model": "other"}, 404, "model_not_found", "model", "the models are example"),
        (CHAT, {"messages": [USER], "model": "exact"}, 400, "invalid_value", None, "has no chat template"),
        (
            CHAT,
            {"messages": [USER], "response_format": RESPONSE_FORMAT},
            400,
            "invalid_value",
            "response_format",
            "Invalid type",
        ),
        (CHAT, {"messages": [USER], "response_format": {"type": "regex"}}, 400, "invalid_value", "response_format", ""),
        (
            CHAT,
            {"messages": [USER], "response_format": {"type": "json_object", "regex": "a"}},
            400,
            "invalid_value",
            "response_format",
            "has no regex",
        ),
        (
            CHAT,
            {"messages": [USER], "response_format": {"type": "text", "grammar": "a"}},
            400,
            "invalid_value",
            "response_format",
            "has no grammar",
        ),
        (CHAT, {"messages": [USER], "tools": [TOOL]}, 400, "unsupported_parameter", "tools", "knows no tools"),
        (CHAT, {"messages": [USER], "tools": [{}]}, 400, "invalid_value", "tools", "a tool must be"),
        (CHAT, {"messages": [USER], "tool_choice": "required"}, 400, "invalid_value", "tool_choice", "needs tools"),
        (CHAT, {"messages": [USER], "logit_bias": {"5000": 1}}, 400, "invalid_value", "logit_bias", "names token 5000"),
        (CHAT, {"messages": [USER], "bad_words": [""]}, 400, "invalid_value", "bad_words", "bad_words is ['']"),
        (CHAT, {"messages": [USER], "chat_template_kwargs": {"tools": 1}}, 400, "invalid_value", KWARGS, "names tools"),
        (CHAT, {"messages": [USER], "chat_template_kwargs": deep(900, {})}, 400, "invalid_value", None, "too deeply"),
        (CHAT, {"messages": [{**USER, "content": deep(900, [])}]}, 400, "invalid_value", None, "too deeply"),
        (
            CHAT,
            {"messages": [{**USER, "content": [{"type": "text"}]}]},
            400,
            "invalid_value",
            "messages.0",
            "has a part {",
        ),
        (CHAT, {"messages": [{**USER, "content": [IMAGE]}]}, 400, "invalid_value", "messages.0", "takes text alone"),
        (CHAT, {"messages": [{**USER, "tool_calls": 5}]}, 400, "invalid_value", "messages.0", "has the tool_calls 5"),
        (CHAT, {"messages": [USER], "tool_choice": 5}, 400, "invalid_value", "tool_choice", "none, auto, required or"),
        (CHAT, {"messages": [USER], "stop": [5]}, 400, "invalid_value", "stop", "it must be text or a list of texts"),
        (CHAT, {"messages": [USER], "stop": [""]}, 400, "invalid_value", "stop", "none of them empty"),
        (TEXT, {"prompt": "x", "suffix": "y"}, 400, "unknown_parameter", "suffix", "has no suffix: leave it out"),
        (TEXT, {"prompt": {}}, 400, "invalid_value", "prompt", "prompt is {}: it must be text, a list of texts, token"),
        (TEXT, {"prompt": []}, 400, "invalid_value", "prompt", "0 prompts came"),
        (TEXT, {"prompt": ""}, 400, "invalid_value", "prompt", "the prompt is empty"),
        (TEXT, {"prompt": [5000]}, 400, "invalid_value", "prompt", "the prompt holds token 5000"),
        (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "invalid_value", "max_tokens", "needs echo"),
        (TEXT, {"prompt": "x", "best_of": 1, "n": 2}, 400, "invalid_value", "best_of", "give at least n"),
        (TEXT, {"prompt": "x", "logprobs": 21}, 400, "invalid_value", "logprobs", "less than or equal to 20"),
    ],
)
def test_what_is_wrong_with_a_request_is_a_400_and_no_stream(url, http, path, body, status, code, param, said, stream):
    # With escapes for all but ASCII, as half a character needs one.
    content = json.dumps({**body, "stream": stream})
    response = http.post(url + path, content=content, headers={"content-type": "application/json"})
    found, error = error_of(response)
    assert (found, error["code"], error["param"]) == (status, code, param)
    assert said in error["message"]


def test_null_is_as_if_a_field_were_left_out(url, http):
    """As OpenAI's API has it, where most fields are "or null"; and what does not stream has no options for it."""
    body = {"messages": [USER], "max_tokens": 2, "seed": 1}
    nulls = {"stream": None, "n": None, "ignore_eos": None, "parallel_tool_calls": None, "suffix": None, "tools": None}
    answers = [http.post(url + CHAT, json=b).json()["choices"] for b in (body, {**body, **nulls})]
    assert answers[0] == answers[1]
    status, error = error_of(http.post(url + CHAT, json={**body, "stream_options": {"include_usage": True}}))
    assert (status, error["param"]) == (400, "stream_options")


def test_an_echo_with_logprobs_names_what_the_client_asked_for(tmp_path, http):
    with serving_engines({"example": build_example(tmp_path / "engine")}) as (url, _):
        status, error = error_of(http.post(url + TEXT, json={"prompt": "x", "echo": True, "logprobs": 1}))
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", "echo")
    assert error["message"].startswith("echo with logprobs needs an engine built with --gather_context_logits")


def test_bodies_that_are_none(url, http):
    headers = {"content-type": "application/json"}
    unread = {b"\xff": "it is not UTF-8", b"[" * 100000: "nested too deeply", b"1" * 5000: "too many digits"}
    for content in (b"{", b"", b"[1]", b'"x"', *unread):
        said = unread.get(content, "JSON")
        status, error = error_of(http.post(url + CHAT, content=content, headers=headers))
        assert (status, error["code"]) == (400, "invalid_json")
        assert said in error["message"]
    assert error_of(http.get(url + "/v1/nothing"))[1]["code"] == "unknown_url"
    response = http.get(url + CHAT)
    assert error_of(response)[0] == 405
    assert response.headers["allow"] == "POST"
    assert http.get(url + "/v1/messages").json()["error"]["type"] == "invalid_request_error"
    assert [http.head(url + path).status_code for path in ("/health", "/")] == [200, 200]
    paths = http.get(url + "/openapi.json").json()["paths"].values()
    names = [operation["operationId"] for path in paths for operation in path.values()]
    assert len(set(names)) == len(names)


def test_who_asks_stands_in_the_log(url, http, caplog):
    caplog.set_level("INFO", "saw_trtllm")
    http.post(url + TEXT, json={"prompt": "x", "max_tokens": 1, "user": "ann"}).raise_for_status()
    body = {"messages": [USER], "max_tokens": 1, "metadata": {"user_id": "bob"}}
    http.post(url + "/v1/messages", json=body).raise_for_status()
    said = [r.getMessage() for r in caplog.records if r.levelname == "INFO" and r.name.startswith("saw_trtllm")]
    assert said == ["a request of 'ann'", "a request of 'bob'"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read(url, http, chunked):
    content = json.dumps({"prompt": "x" * (10 << 20)}).encode()
    body = (content[i : i + 65536] for i in range(0, len(content), 65536)) if chunked else content
    status, error = error_of(http.post(url + TEXT, content=body, headers={"content-type": "application/json"}))
    assert (status, error["code"]) == (413, "request_too_large")


def test_a_key_is_asked_for(engine):
    with serving_engines({"example": engine("saw_int4")}, ["secret", "other", "voil\u00e0"]) as (url, _):
        for key in ("wrong", "secre"):
            with pytest.raises(openai.AuthenticationError) as e:
                openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list()
            assert e.value.code == "invalid_api_key"
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="other").models.list().data[0].id == "example"
        for key in (b"secret", "voil\u00e0".encode()):
            assert httpx.get(f"{url}/v1/models", headers={"x-api-key": key}, timeout=60).status_code == 200
        assert [httpx.get(f"{url}/{path}", timeout=60).status_code for path in ("health", "metrics", "tokenize")] == [
            200,
            200,
            405,
        ]


def test_a_full_queue_is_429(engine):
    with serving_engines({"example": engine("saw_int4")}, max_queue_size=1) as (url, [model]):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError) as e:
            client.completions.create(model="example", prompt="x", n=100, max_tokens=500)
        assert e.value.code == "rate_limit_exceeded"
        assert e.value.response.headers["retry-after"] == "1"
        wait_until_idle(model.llm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(url, llms, stream):
    llm = llms["exact"]
    before = llm.stats().generated_tokens_total
    body = json.dumps({"model": "exact", "prompt": "def", "max_tokens": 2000, "ignore_eos": True, "stream": stream})
    host, port = url.removeprefix("http://").split(":")
    head = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
    head += [f"content-length: {len(body)}", "", body]
    with held_steps(llm, first=20) as held:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall("\r\n".join(head).encode())
            assert held.begun.wait(60)
            assert llm.stats().used_blocks
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert held.aborted.wait(60)
    wait_until_idle(llm)
    assert llm.stats().generated_tokens_total - before < 2000


def test_every_error_has_one_place_in_the_table():
    assert [answer_to(kind("x")).code for kind, _ in BY_CLASS if kind is not Exception] == [
        answer.code for kind, answer in BY_CLASS if kind is not Exception
    ]
    assert answer_to(ValueError()).status == 500
    assert "secret" not in json.dumps(error_body(ValueError("secret")))
    assert error_body(EngineError("it broke"))["error"]["message"] == "it broke"
    assert len({answer.code for _, answer in BY_CLASS} | set(BY_CODE)) == len(BY_CLASS) + len(BY_CODE) - 1
    assert issubclass(BY_CLASS[0][0], SawError)
