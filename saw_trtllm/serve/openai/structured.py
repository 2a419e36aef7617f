"""What an answer must be, from ``response_format`` and ``tool_choice``."""

from __future__ import annotations

from typing import Any, Literal

from saw_trtllm.runtime.guided_decoding import GuidedDecodingParams
from saw_trtllm.serve.openai.errors import ApiError
from saw_trtllm.serve.openai.parsers.reasoning import BEGIN, END
from saw_trtllm.serve.openai.protocol import ResponseFormat


def response_guide(response_format: ResponseFormat | None) -> GuidedDecodingParams | None:
    """The guide of a ``response_format``."""
    if response_format is None:
        return None
    kind = response_format.type
    if others := [
        name for name in ("json_schema", "regex", "grammar") if name != kind and getattr(response_format, name)
    ]:
        what = f"a response_format of type {kind} has no {others[0]}: leave it out, or give that type"
        raise ApiError("invalid_value", what, "response_format")
    if kind == "text":
        return None
    if kind == "json_object":
        return GuidedDecodingParams(json_object=True)
    value = getattr(response_format, kind)
    if value is None:
        raise ApiError("invalid_value", f"a response_format of type {kind} needs {kind}: give it", "response_format")
    if kind == "json_schema":
        return GuidedDecodingParams(json=value.schema_)
    return GuidedDecodingParams(**{kind: value})


def call_guide(tools: list[dict[str, Any]], forced: str) -> GuidedDecodingParams:
    """A guide that allows one call: of the function that is named, or of any if ``required`` is."""
    functions = [tool["function"] for tool in tools if forced in ("required", tool["function"]["name"])]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return GuidedDecodingParams(json=calls[0] if len(calls) == 1 else {"anyOf": calls})


def reasoning_of(prompt: str, continued: str, template_reasons: bool) -> Literal["may come", "begun"] | None:
    """Whether a model thinks after a prompt before it answers.

    Parameters
    ----------
    prompt : str
    continued : str
        What of the answer the prompt ends with already.
    template_reasons : bool
    """
    end = prompt.rstrip()
    if not template_reasons or end.endswith(END):
        return None
    return "begun" if end.endswith(BEGIN) or continued.rfind(BEGIN) > continued.rfind(END) else "may come"
