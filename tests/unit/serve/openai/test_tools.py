"""Tools and reasoning through the client: a model that is made to say what a test needs."""

import json

import openai
import pytest

from saw_trtllm.runtime.chat_template import ChatTemplate
from saw_trtllm.serve.openai.app import make_app
from saw_trtllm.serve.openai.model import ServedModel
from tests.support.chat_templates import QWEN3, QWEN25
from tests.support.example import EXAMPLE
from tests.support.openai_server import serving

USER = {"role": "user", "content": "How warm is it?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'


@pytest.fixture(params=["whole", "stream"])
def ask(request, open_llm):
    """Ask a model of a template that is held to a text by a grammar; the message, and why it ended."""
    llm = open_llm(kv_cache_config={"max_tokens": 2048})

    def ask(template, text, **fields):
        llm.tokenizer.chat_template = ChatTemplate(template)
        app = make_app([ServedModel("example", llm, EXAMPLE)])
        with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            asked = {"model": "example", "messages": [USER], "max_tokens": 400, "seed": 1, **fields}
            if text is not None:
                held = {"type": "grammar", "grammar": f"start: {json.dumps(text)}"}
                asked["extra_body"] = {"response_format": held}
            if request.param == "whole":
                choice = client.chat.completions.create(**asked).choices[0]
                return choice.message.model_dump(), choice.finish_reason
            return gather(client.chat.completions.create(**asked, stream=True))

    return ask


def gather(chunks):
    message, reason = {"content": None, "tool_calls": None}, None
    for chunk in chunks:
        delta, reason = chunk.choices[0].delta.model_dump(exclude_none=True), chunk.choices[0].finish_reason or reason
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            assert call["index"] == len(message["tool_calls"] or ())
            message["tool_calls"] = [*(message["tool_calls"] or ()), call]
    return message, reason


def calls_of(message):
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"] or ()]


def test_a_call_is_no_part_of_the_answer(ask):
    message, reason = ask(QWEN25, f"Let me see.\n{CALL}", tools=[TOOL])
    assert (message["content"], reason) == ("Let me see.", "tool_calls")
    assert calls_of(message) == [("weather", {"city": "Oslo", "days": 2})]
    assert message["tool_calls"][0]["id"].isalnum()
    message, _ = ask(QWEN25, f"{CALL}\n{CALL}", tools=[TOOL], parallel_tool_calls=False)
    assert len(calls_of(message)) == 1
    message, reason = ask(QWEN25, CALL)  # of a model that was given no tools it is text
    assert (message["content"], message["tool_calls"], reason) == (CALL, None, "stop")


def test_a_call_that_is_asked_for_comes(ask):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        message, reason = ask(QWEN25, None, tools=[TOOL], tool_choice=choice)
        [(name, arguments)] = calls_of(message)
        assert (name, reason) == ("weather", "tool_calls")
        assert arguments["city"] in ("Rome", "Oslo")
        assert 0 <= arguments["days"] <= 9
        assert not message["content"]


def test_an_answer_that_goes_on_within_its_reasoning_goes_on_there(ask):
    held = {"type": "grammar", "grammar": 'start: " if it is warm."'}
    more = {"add_generation_prompt": False, "continue_final_message": True, "response_format": held}
    begun = [USER, {"role": "assistant", "content": "<think>\nI wonder"}]
    message, _ = ask(QWEN3, None, messages=begun, max_tokens=6, extra_body=more)
    assert message["reasoning_content"]
    assert not message["content"]


def test_reasoning_has_a_field_of_its_own(ask):
    message, reason = ask(QWEN3, "<think>\nHm.\n</think>\n\nIt is warm.")
    assert (message["reasoning_content"], message["content"], reason) == ("Hm.", "It is warm.", "stop")
