"""Chat templates: equal to transformers' ``apply_chat_template``, and safe from the templates of strangers."""

import json
import shutil

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from saw_trtllm.errors import CheckpointError, RequestError
from saw_trtllm.runtime.chat_template import ChatTemplate
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.chat_templates import CHATML, TEMPLATES
from tests.support.example import EXAMPLE

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, with <angles> & \u00fcmlauts",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "K\u00f6ln"}}}
USER, ANSWER = {"role": "user", "content": " What is 2 + 2? "}, {"role": "assistant", "content": "It is 4.\n"}
SYSTEM = {"role": "system", "content": "Be terse."}
CALLED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "content": '{"degrees": 7}'}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is 4."}

CONVERSATIONS = {
    "one": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "several": ([SYSTEM, USER, ANSWER, USER], {}),
    "answered": ([USER, ANSWER], {"add_generation_prompt": False}),
    "continued": ([USER, {"role": "assistant", "content": "It is"}], {"continue_final_message": True}),
    "tools": ([SYSTEM, USER], {"tools": [TOOL, TOOL]}),
    "called": ([*CALLED, RESULT], {"tools": [TOOL]}),
    "thinking off": ([USER], {"variables": {"enable_thinking": False}}),
    "thought": ([USER, THOUGHT, USER], {}),
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, tmp_path):
    """A folder with the example's tokenizer and a family's template, opened by transformers and by us."""
    shutil.copy(EXAMPLE / "tokenizer.json", tmp_path)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>", "__type": "AddedToken"}}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATES[request.param]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_rendered_conversation_is_that_of_transformers(tokenizer, name):
    theirs, ours = tokenizer
    messages, options = CONVERSATIONS[name]
    options = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    reference = {name: value for name, value in options.items() if name != "variables"}
    reference |= options.get("variables", {})
    try:
        text = ours.chat_template.render(messages, **options)
    except RequestError:
        with pytest.raises((jinja2.TemplateError, TypeError)):
            theirs.apply_chat_template(messages, **reference)
        return
    assert text == theirs.apply_chat_template(messages, tokenize=False, **reference)
    ids = theirs.apply_chat_template(messages, **reference)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == ids


def test_a_template_has_a_file_of_its_own_and_another_for_tools(tmp_path):
    shutil.copy(EXAMPLE / "tokenizer.json", tmp_path)
    config = {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path)
    assert (template.render([USER]), template.render([USER], tools=[TOOL])) == ("D", "T")
    (tmp_path / "chat_template.jinja").write_text("F{{ messages|length }}\n")
    assert ChatTemplate.load(tmp_path).render([USER]) == "F1"
    assert ChatTemplate.load(EXAMPLE) is None
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read as a chat template"):
        ChatTemplate.load(tmp_path)


def test_contents_may_be_parts_and_arguments_text():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = template.render([{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call]}])
    assert text.startswith("one\ntwo[{")
    assert "{'a': 1}" in text


def test_an_answer_that_was_refused_has_its_refusal_as_content():
    answer = {"role": "assistant", "content": None, "refusal": "I cannot say."}
    assert ChatTemplate("{{ messages[1].content }}").render([USER, answer]) == "I cannot say."


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is []: give a list of at least one message"),
        ("hello", "messages is 'hello'"),
        (["hello"], "message 0 is 'hello'"),
        ([{"content": "x"}], "message 0 is"),
        ([{"role": "user"}], "message 0 has no content"),
        ([USER, {"role": "user", "content": 7}], "message 1 has the content 7"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "has a part 'image_url': this model takes text alone"),
        ([{"role": "user", "content": object()}], "the messages hold"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "that are not JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "has the tool call"),
    ],
)
def test_malformed_messages_are_rejected_in_a_sentence(messages, said):
    with pytest.raises(RequestError) as e:
        ChatTemplate(CHATML).render(messages)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("{{ raise_exception('no') }}", RequestError, "rejects the messages: no"),
        ("{{ missing.field }}", RequestError, "'missing' is undefined"),
        ("{{ 1 // 0 }}", RequestError, "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", RequestError, "RecursionError"),
        ("{% for", CheckpointError, "cannot be read"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", CheckpointError, "turns"),
        ("{{ 'x' * 10000000000 }}", CheckpointError, "too large"),
        ("{{ 9 ** 9 ** 9 }}", CheckpointError, "too large"),
        ("{{ ''.__class__.__mro__ }}", CheckpointError, "is stopped"),
        ("{{ messages.append(1) }}", CheckpointError, "is stopped"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_stopped(source, error, said):
    with pytest.raises(error) as e:
        ChatTemplate(source).render([USER])
    assert said in str(e.value)


def test_the_prompt_ends_in_a_new_message_or_in_the_last_one():
    with pytest.raises(RequestError, match="exclude each other"):
        ChatTemplate(CHATML).render([USER], continue_final_message=True)
    with pytest.raises(RequestError, match="needs text"):
        ChatTemplate(CHATML).render([{**USER, "content": ""}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate("x").render([USER], add_generation_prompt=False, continue_final_message=True)
