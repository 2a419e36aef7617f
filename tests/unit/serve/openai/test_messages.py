"""Anthropic's own client against ``/v1/messages``."""

import json

import anthropic
import httpx
import pytest

from saw_trtllm import KvCacheConfig, SamplingParams
from saw_trtllm.runtime.chat_template import ChatTemplate
from saw_trtllm.serve.anthropic.protocol import MessagesRequest, as_chat
from saw_trtllm.serve.openai.app import make_app
from saw_trtllm.serve.openai.model import ServedModel
from tests.support.chat_templates import QWEN25
from tests.support.example import EXAMPLE
from tests.support.openai_server import serving

USER = {"role": "user", "content": "write a class"}
GREEDY = {"extra_body": {"temperature": 0}}
SCHEMA = {
    "type": "object",
    "properties": {"days": {"enum": [1, 2]}},
    "required": ["days"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}


@pytest.fixture
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_is_that_of_the_runtime_however_it_comes(client, llms):
    asked = {"model": "example", "max_tokens": 12, "system": "be brief", "messages": [USER]}
    asked |= GREEDY
    expected = llms["example"].chat([{"role": "system", "content": "be brief"}, USER], SamplingParams(max_tokens=12))
    whole = client.messages.create(**asked)
    assert [b.text for b in whole.content] == [expected.outputs[0].text]
    assert whole.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[expected.outputs[0].finish_reason]
    assert whole.usage.output_tokens == len(expected.outputs[0].token_ids)
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == len(expected.prompt_token_ids)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    word = whole.content[0].text.split()[-1]
    stopped = client.messages.create(**asked, stop_sequences=[word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    count = client.messages.count_tokens(model="example", system="be brief", messages=[USER])
    assert count.input_tokens == len(expected.prompt_token_ids)


def test_tools_come_as_blocks(open_llm):
    llm = open_llm(kv_cache_config=KvCacheConfig(2048))
    llm.tokenizer.chat_template = ChatTemplate(QWEN25)
    asked = {"model": "example", "max_tokens": 300, "messages": [USER], "tools": [TOOL], "tool_choice": {"type": "any"}}
    asked |= GREEDY
    with serving(make_app([ServedModel("example", llm, EXAMPLE)])) as url:
        client = anthropic.Anthropic(base_url=url, api_key="none")
        message = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for found in (message, streamed):
        [block] = found.content
        assert (block.type, block.name, found.stop_reason) == ("tool_use", "weather", "tool_use")
        assert block.input["days"] in (1, 2)


def test_blocks_become_messages():
    request = MessagesRequest(
        max_tokens=5,
        system=[{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "encrypted elsewhere"},
                    {"type": "text", "text": "c", "citations": None},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"days": 1}, "caller": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "warm"}]},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
        tool_choice={"type": "tool", "name": "weather"},
        tools=[TOOL],
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    chat = as_chat(request)
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        ("system", "be brief"),
        ("user", "a\nb"),
        ("assistant", "c"),
        ("tool", "warm"),
        ("user", "and?"),
    ]
    assert chat.messages[2]["reasoning_content"] == "hm"
    assert json.loads(chat.messages[2]["tool_calls"][0]["function"]["arguments"]) == {"days": 1}
    assert chat.tool_choice["function"]["name"] == "weather"
    assert chat.chat_template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("body", "status", "kind", "said"),
    [
        ({"messages": [USER]}, 400, "invalid_request_error", "max_tokens is missing"),
        ({"messages": [USER], "max_tokens": 5, "container": "x"}, 400, "invalid_request_error", "has no container"),
        ({"messages": [USER], "max_tokens": 5, "model": "x"}, 404, "not_found_error", "the models are"),
        ({"messages": [{"role": "tool"}], "max_tokens": 5}, 400, "invalid_request_error", "has the role 'tool'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 5},
            400,
            "invalid_request_error",
            "has a block 'image'",
        ),
        ({"messages": [USER], "max_tokens": 5000}, 400, "invalid_request_error", "max_seq_len 2048"),
        *(
            ({"messages": [{"role": "user", "content": [block]}], "max_tokens": 5}, 400, "invalid_request_error", said)
            for block, said in (
                ({"type": "text", "text": "a", "mood": 1}, "a block text has a field 'mood'"),
                ({"type": ["text"]}, "has a block ['text']"),
                ({"type": "tool_result", "tool_use_id": "1", "content": 5}, "a content is 5: give text"),
                ({"type": "tool_result", "content": "x"}, "a block tool_result has the tool_use_id None"),
                ({"type": "tool_use", "id": "1", "name": 5}, "a block tool_use has the name 5"),
                ({"type": "thinking", "thinking": {}}, "a block thinking has the thinking {}"),
            )
        ),
        ({"messages": [{**USER, "mood": 1}], "max_tokens": 5}, 400, "invalid_request_error", "a field 'mood'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_the_shape_of_this_api(url, body, status, kind, said, stream):
    response = httpx.post(f"{url}/v1/messages", json={**body, "stream": stream}, timeout=60)
    answer = response.json()
    assert (response.status_code, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    assert said in answer["error"]["message"]


def test_an_answer_may_be_sent_back_whole(client, llms):
    asked = {"model": "example", "max_tokens": 4, **GREEDY}
    answer = client.messages.create(messages=[USER], **asked)
    again = client.messages.create(messages=[USER, answer, USER], **asked)
    [block] = answer.content
    told = llms["example"].chat_prompt([USER, {"role": "assistant", "content": block.text}, USER])
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == len(told["prompt_token_ids"])
