"""Anthropic's requests, and what they are in OpenAI's words."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from saw_trtllm.runtime.keywords import shown
from saw_trtllm.serve.openai.errors import ApiError
from saw_trtllm.serve.openai.protocol import ChatRequest, Flag, Number, Strict, Whole


class Tool(Strict):
    """A function that the model may call."""

    name: str
    description: str = ""
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"
    cache_control: dict[str, Any] | None = None


class ToolChoice(Strict):
    """Which of them it must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Flag = False


class Thinking(Strict):
    """Whether it thinks first; the budget is ``max_tokens``."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Whole | None = None
    display: str | None = None


class Metadata(Strict):
    """Who asks."""

    user_id: str | None = None


class CountRequest(Strict):
    """``/v1/messages/count_tokens``. Whatever ``cache_control`` marks is found again anyway, as all prefixes are."""

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest):
    """``/v1/messages``."""

    max_tokens: Whole = Field(ge=1)
    stream: Flag = False
    stop_sequences: list[str] | None = None
    temperature: Number | None = Field(None, ge=0, le=1)
    top_p: Number | None = Field(None, ge=0, le=1)
    top_k: Whole | None = Field(None, ge=0)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] = "auto"


def as_chat(request: CountRequest) -> ChatRequest:
    """The same request in OpenAI's words.

    Raises
    ------
    ApiError
        If a block is of a kind that this model does not take.
    """
    fields: dict[str, Any] = {}
    if isinstance(request, MessagesRequest):
        fields = {
            "max_tokens": request.max_tokens,
            "stream": request.stream,
            "stop": request.stop_sequences,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
        }
    messages = [] if request.system is None else [{"role": "system", "content": _text(request.system)}]
    for message in request.messages:
        messages += _messages(message)
    thinks = request.thinking is not None and request.thinking.type != "disabled"
    return ChatRequest(
        model=request.model,
        messages=messages,
        tools=[_tool(tool) for tool in request.tools or ()] or None,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.tool_choice is None or not request.tool_choice.disable_parallel_tool_use,
        chat_template_kwargs={"enable_thinking": thinks},
        **fields,
    )


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


#: What blocks hold, by type, beside it and ``cache_control``. Other servers' signatures and encrypted thoughts say
#: nothing to this one's models, citations are marks on the text, and of a result that is an error the content says so.
_BLOCKS = {
    "text": {"text", "citations"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
    "tool_use": {"id", "name", "input", "caller"},
    "tool_result": {"tool_use_id", "content", "is_error"},
}
#: What an answer that is sent back holds beside its role and content.
_ANSWER = {"id", "type", "model", "stop_reason", "stop_sequence", "stop_details", "usage", "container"}


def _messages(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message, and one for each result of a tool in it: those are messages of their own in OpenAI's words."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise _error(f"a message has the role {shown(role)}: it must be user or assistant")
    _check("a message", message, {"role", "content", *_ANSWER})
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    made: dict[str, Any] = {"role": role, "content": ""}
    results, texts = [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind not in _BLOCKS:
            raise _error(f"a message has a block {shown(kind)}: this model takes text alone")
        _check(f"a block {kind}", block, {"type", "cache_control", *_BLOCKS[kind]})
        if kind == "text":
            texts.append(block)
        elif kind == "thinking":
            made["reasoning_content"] = made.get("reasoning_content", "") + _string(block, "thinking")
        elif kind == "tool_use":
            function = {"name": _string(block, "name"), "arguments": json.dumps(block.get("input") or {})}
            call = {"id": _string(block, "id"), "type": "function", "function": function}
            made.setdefault("tool_calls", []).append(call)
        elif kind == "tool_result":
            answer = {"tool_call_id": _string(block, "tool_use_id"), "content": _text(block.get("content") or "")}
            results.append({"role": "tool", **answer})
    made["content"] = _text(texts)
    keeps = made["content"] or made.get("tool_calls") or not results
    return [*results, *([made] if keeps else [])]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _error(f"a content is {shown(content)}: give text or a list of blocks")
    if not all(isinstance(block, dict) and isinstance(block.get("text"), str) for block in content):
        raise _error("a block holds no text: this model takes text alone")
    return "\n".join(block["text"] for block in content)


def _string(block: dict[str, Any], field: str) -> str:
    if not isinstance(value := block.get(field), str):
        raise _error(f"a block {block['type']} has the {field} {shown(value)}: give text")
    return value


def _check(what: str, fields: dict[str, Any], known: set[str]) -> None:
    for field, value in fields.items():
        if value is not None and field not in known:
            raise _error(f"{what} has a field {shown(field)}: leave it out")


def _error(message: str) -> ApiError:
    return ApiError("invalid_value", message, "messages")
