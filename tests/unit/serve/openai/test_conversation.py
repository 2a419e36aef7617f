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


def test_an_answer_may_be_sent_back_as_it_came():
    """All that the client's own object of an answer has, what is null of it among it."""
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    answer |= {"function_call": None, "tool_calls": None, "reasoning_content": "y", "cache_control": {}}
    assert read_conversation([answer], QWEN25) == [answer]
