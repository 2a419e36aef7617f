"""``LLM.chat``, and ``saw-run --chat`` as a user types it."""

import io
import json
import logging
import re
import sys

import pytest

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.cli import run as saw_run
from saw_trtllm.errors import RequestError
from tests.support.rejection import rejected

USER = {"role": "user", "content": "write a class"}
PROMPT = "<|begin_of_text|># user: write a class\n# assistant:"


@pytest.fixture
def llm(chat_engine):
    with LLM(chat_engine, kv_cache_config={"max_tokens": 2048, "deterministic": True}) as llm:
        yield llm


def test_a_conversation_is_its_prompt_with_one_bos(llm):
    output = llm.chat([USER], SamplingParams(max_tokens=8))
    assert output.prompt == PROMPT
    assert output.prompt_token_ids == llm.tokenizer.encode(PROMPT, add_special_tokens=False)
    assert output.prompt_token_ids.count(llm.tokenizer.bos_id) == 1
    assert output.outputs == llm.generate(output.prompt_token_ids, SamplingParams(max_tokens=8)).outputs
    several = llm.chat([[USER], [{**USER, "content": "x"}]], SamplingParams(max_tokens=2))
    assert [o.prompt for o in several] == [PROMPT, PROMPT.replace("write a class", "x")]
    other = llm.chat(
        [USER], SamplingParams(max_tokens=2), chat_template="{{ bos_token }}{{ x }}", chat_template_kwargs={"x": 1}
    )
    assert other.prompt == "<|begin_of_text|>1"


@pytest.mark.parametrize("messages", ["hello", b"hello", USER, None, []])
def test_what_is_no_conversation_is_shown_whole(llm, messages):
    with pytest.raises(RequestError, match=re.escape(f"messages is {messages!r}: give a list")):
        llm.chat(messages)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "the chat template knows no tools: leave"),
        ({"tools": "look"}, "tools is 'look': give a list"),
        ({"tools": ["look"]}, r"tools is \['look'\]: give a list"),
        ({"chat_template": 5}, "chat_template is 5: give the text"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x': give a dict"),
    ],
)
def test_what_a_template_cannot_take_is_rejected_not_ignored(llm, options, said):
    with pytest.raises(RequestError, match=said):
        llm.chat([USER], **options)


def test_a_model_without_a_template_says_so(open_llm):
    with pytest.raises(RequestError, match="has no chat template: give a prompt"):
        open_llm(kv_cache_config={"max_tokens": 256}).chat([USER])


def test_a_prompt_without_the_template_brings_one_hint(llm, caplog):
    llm.generate([PROMPT, [1, 2]], SamplingParams(max_tokens=1))
    assert not caplog.messages
    llm.generate(["def", "class"], SamplingParams(max_tokens=1))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "use LLM.chat, saw-run --chat" in caplog.text


def run(engine, *argv):
    return saw_run.main(["--engine_dir", str(engine), "--kv_cache_max_tokens", "2048", *argv])


def test_run_answers_one_message_each(chat_engine, llm, capsys):
    flags = ("--chat", "--system_prompt", "be brief", "--max_output_len", "8")
    assert run(chat_engine, *flags, "--input_text", "write a class") == 0
    expected = llm.chat([{"role": "system", "content": "be brief"}, USER], SamplingParams(max_tokens=8))
    assert capsys.readouterr().out == expected.outputs[0].text + "\n"
    assert run(chat_engine, *flags, "--json", "--input_text", "write a class") == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected.outputs[0].text


def test_run_talks_and_remembers(chat_engine, llm, capsys, monkeypatch):
    too_long = "x " * 5000
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"write a class\n\n{too_long}\nand a test\n"))
    assert run(chat_engine, "--chat", "--max_output_len", "6") == 0
    said, params = capsys.readouterr(), SamplingParams(max_tokens=6)
    first = llm.chat([USER], params).outputs[0].text
    history = [USER, {"role": "assistant", "content": first}, {"role": "user", "content": "and a test"}]
    assert said.out == f"{first}\n{llm.chat(history, params).outputs[0].text}\n"
    assert said.err.startswith("error: the prompt has ")


def test_run_gives_an_answer_the_room_that_is_left(chat_engine, capsys):
    assert run(chat_engine, "--chat", "--input_text", "x " * 2010, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_input_tokens"] + answer["num_output_tokens"] <= 2048


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--system_prompt", "x", "--input_text", "y"], "--system_prompt is part of a conversation: give --chat too"),
        (["--chat", "--json"], "--json prints answers to prompts: give --input_text or --input_file too"),
    ],
)
def test_run_says_which_flags_belong_together(chat_engine, argv, said, capsys):
    assert said in rejected(capsys, saw_run.main, "--engine_dir", chat_engine, *argv)
