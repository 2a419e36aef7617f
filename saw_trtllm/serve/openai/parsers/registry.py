"""The formats of tools and reasoning by name, and which of them a chat template writes."""

from __future__ import annotations

from collections.abc import Callable

from saw_trtllm.serve.openai.parsers.calls import LeadingCalls, MarkedCalls
from saw_trtllm.serve.openai.parsers.delta import Parser
from saw_trtllm.serve.openai.parsers.reasoning import BEGIN

#: By name: a parser of calls, and what a chat template holds that was written for the format.
TOOL_FORMATS: dict[str, tuple[Callable[[], Parser], str]] = {
    "hermes": (lambda: MarkedCalls("<tool_call>", "</tool_call>"), "<tool_call>"),
    "mistral": (lambda: LeadingCalls("[TOOL_CALLS]"), "[TOOL_CALLS]"),
    "llama3_json": (LeadingCalls, "ipython"),
}


def tool_format(template: str) -> Callable[[], Parser] | None:
    """The parser of calls that suits a chat template; None for one that knows no tools."""
    return next((parser for parser, mark in TOOL_FORMATS.values() if mark in template), None)


def reasons(template: str) -> bool:
    """Whether a chat template knows reasoning."""
    return BEGIN in template
