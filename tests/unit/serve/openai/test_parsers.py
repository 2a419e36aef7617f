"""Reasoning and calls in a text, however the stream cuts it."""

import json

import pytest

from saw_trtllm.serve.openai.parsers.calls import ForcedCall, LeadingCalls, MarkedCalls
from saw_trtllm.serve.openai.parsers.delta import PlainParser
from saw_trtllm.serve.openai.parsers.reasoning import ReasoningParser
from saw_trtllm.serve.openai.parsers.registry import TOOL_FORMATS, reasons, tool_format
from tests.support.chat_templates import TEMPLATES


def hermes():
    return TOOL_FORMATS["hermes"][0]()


def mistral():
    return TOOL_FORMATS["mistral"][0]()


def llama3():
    return TOOL_FORMATS["llama3_json"][0]()


def thinking(then=PlainParser, inside=False):
    return lambda: ReasoningParser(then(), inside)


CALL = '{"name": "f", "arguments": {"a": "x < y", "b": [1, 2]}}'
ARGUMENTS = {"a": "x < y", "b": [1, 2]}
F, G = ("f", ARGUMENTS), ("g", {})

#: A parser, a text, and its reasoning, answer and calls.
CASES = [
    (PlainParser, "hello <b>", "", "hello <b>", []),
    (hermes, "hello", "", "hello", []),
    (hermes, "a <tool > b <tool_calls> c", "", "a <tool > b <tool_calls> c", []),
    (hermes, f"<tool_call>\n{CALL}\n</tool_call>", "", "", [F]),
    (
        hermes,
        f'Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "g"}}</tool_call>',
        "",
        "Let me see.",
        [F, G],
    ),
    (hermes, f"<tool_call>\n{CALL}", "", "", [F]),
    (hermes, "<tool_call>\n{broken\n</tool_call>", "", "<tool_call>\n{broken\n</tool_call>", []),
    (hermes, "<tool_call>\n{bro", "", "<tool_call>\n{bro", []),
    (mistral, f"[TOOL_CALLS] [{CALL}]", "", "", [F]),
    (mistral, f' [{CALL}, {{"name": "g", "arguments": {{}}}}]', "", "", [F, G]),
    (mistral, "[1, 2] are numbers", "", "[1, 2] are numbers", []),
    (mistral, "hello", "", "hello", []),
    (llama3, '{"name": "f", "parameters": {"a": "x < y", "b": [1, 2]}}', "", "", [F]),
    (llama3, '{"name": "g", "parameters": {}}; {"name": "g", "parameters": {}}', "", "", [G, G]),
    (llama3, '{"answer": 4}', "", '{"answer": 4}', []),
    (llama3, "It is {4}", "", "It is {4}", []),
    (ForcedCall, CALL, "", "", [F]),
    (ForcedCall, '{"name": "f", "argu', "", '{"name": "f", "argu', []),
    (thinking(), "<think>\nHm < hm.\n</think>\n\nIt is 4.\n", "Hm < hm.", "It is 4.\n", []),
    (thinking(inside=True), "Hm.\n</think>\n\nIt is 4.", "Hm.", "It is 4.", []),
    (thinking(), "It is 4.", "", "It is 4.", []),
    (thinking(), "<thin", "", "<thin", []),
    (thinking(), "<think>\nHm", "Hm", "", []),
    (thinking(), "<think>\n\n</think>\n\n", "", "", []),
    (thinking(hermes), f"<think>A <tool_call></think>\n<tool_call>{CALL}</tool_call>", "A <tool_call>", "", [F]),
]


def parsed(make, pieces):
    parser, reasoning, content, calls = make(), "", "", []
    for deltas in (*(parser.push(piece) for piece in pieces), parser.finish()):
        for delta in deltas:
            assert sum(map(bool, delta)) == 1
            reasoning, content = reasoning + delta.reasoning, content + delta.content
            calls += [(delta.call.name, json.loads(delta.call.arguments))] if delta.call else []
    return reasoning, content, calls


@pytest.mark.parametrize(("make", "text", "reasoning", "content", "calls"), CASES)
def test_a_text_is_parsed_the_same_wherever_it_is_cut(make, text, reasoning, content, calls):
    expected = (reasoning, content, calls)
    assert parsed(make, [text]) == expected
    assert parsed(make, text) == expected
    for i in range(1, len(text)):
        assert parsed(make, [text[:i], text[i:]]) == expected


def test_an_answer_is_not_held_back():
    parser = hermes()
    assert [d.content for d in parser.push("It is ")] == ["It is"]
    assert [d.content for d in parser.push("4 <b")] == [" 4 <b"]
    parser = ReasoningParser(PlainParser(), inside=True)
    assert [d.reasoning for d in parser.push("one two")] == ["one two"]


def test_a_template_says_which_format_its_model_writes():
    found = {name: tool_format(template) for name, template in TEMPLATES.items()}
    kinds = {name: type(make()) for name, make in found.items() if make}
    assert kinds == {"llama3": LeadingCalls, "mistral": LeadingCalls, "qwen2.5": MarkedCalls}
    assert [name for name, template in TEMPLATES.items() if reasons(template)] == ["qwen3"]
