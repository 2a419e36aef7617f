"""Roles and fields of messages, which templates would leave out in silence."""

import pytest

from saw_trtllm.runtime.chat_template import ChatTemplate
from saw_trtllm.serve.openai.conversation import read_conversation
from saw_trtllm.serve.openai.errors import ApiError
from tests.support.chat_templates import QWEN25, TEMPLATES

INSTRUCTED = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith(("qwen", "llama3", "smollm"))])
def test_what_a_developer_says_reaches_the_model(name):
    text = ChatTemplate(TEMPLATES[name]).render(read_conversation(INSTRUCTED, TEMPLATES[name]))
    assert text.index("system") < text.index("Be brief.") < text.index("Hello")
    assert "developer" not in text


def test_a_template_may_have_roles_and_fields_of_its_own():
    template = "{{ messages[0].mood }} {{ message.mood }} {{ messages[0].role == 'critic' }}"
    given = [{"role": "critic", "content": "x", "mood": "mild"}]
    assert read_conversation(given, template) == given
    for knows in ("message['role'] == 'developer'", 'message.role in ["system", "developer"]'):
        assert read_conversation(INSTRUCTED, f"{{% if {knows} %}}") == INSTRUCTED
    for message, param in (
        ({"role": "critic", "content": "x"}, "messages.0.role"),
        ({"role": "name", "content": "x"}, "messages.0.role"),  # a field of the template's
        ({"role": "user", "content": "x", "mood": "mild"}, "messages.0.mood"),
    ):
        with pytest.raises(ApiError) as e:
            read_conversation([message], QWEN25)
        assert e.value.param == param


CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None, "annotations": [], "audio": None, "function_call": None},  # OpenAI
        {"parsed": {"a": 1}, "annotations": [{"type": "url_citation"}]},
        {"thinking_blocks": [{"type": "thinking"}], "provider_specific_fields": {"x": 1}, "reasoning_items": [{}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "y"}], "cache_control": {"type": "ephemeral"}},
    ],
)
def test_an_answer_may_be_sent_back_as_it_came(more):
    """All that clients add to it changes nothing of the prompt; what they might mean by anything else is not known."""
    answer = {"role": "assistant", "content": "x", "reasoning_content": "y", "tool_calls": [CALL]}
    added = {"index": 0, "extra_content": {"google": {}}, "provider_specific_fields": {}}
    call = {**CALL, **added, "function": {**CALL["function"], "parsed_arguments": {}, "provider_specific_fields": {}}}
    given = [{"role": "user", "content": "Hello"}, answer]
    sent_back = [given[0], {**answer, **more, "tool_calls": [call]}]
    for text in (template for template in TEMPLATES.values() if "tool_calls" in template):
        template = ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"})
        expected = template.render(read_conversation(given, text))
        assert template.render(read_conversation(sent_back, text)) == expected


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({**CALL, "mood": 1}, "messages.0.tool_calls.0.mood"),
        ({**CALL, "function": {**CALL["function"], "mood": 1}}, "messages.0.tool_calls.0.function.mood"),
    ],
)
def test_a_field_of_a_call_that_is_not_known_is_named(call, param):
    with pytest.raises(ApiError) as e:
        read_conversation([{"role": "assistant", "tool_calls": [call]}], QWEN25)
    assert e.value.param == param
