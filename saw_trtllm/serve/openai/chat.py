"""``/v1/chat/completions``: a conversation to its next message."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from saw_trtllm.serve.openai.errors import ApiError, error_body
from saw_trtllm.serve.openai.logprobs import chat_logprobs
from saw_trtllm.serve.openai.metrics import Meter
from saw_trtllm.serve.openai.model import ServedModel, finish_reason
from saw_trtllm.serve.openai.parsers.calls import ForcedCall
from saw_trtllm.serve.openai.parsers.delta import Delta, Parser, PlainParser
from saw_trtllm.serve.openai.parsers.reasoning import ReasoningParser
from saw_trtllm.serve.openai.parsers.registry import reasons, tool_format
from saw_trtllm.serve.openai.protocol import ChatRequest
from saw_trtllm.serve.openai.sse import DONE, event
from saw_trtllm.serve.openai.structured import call_guide, reasoning_of, response_guide
from saw_trtllm.serve.openai.usage import Usage


@dataclass
class Message:
    """What has come of one choice."""

    parser: Parser
    many_calls: bool = True
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0

    def take(self, completion: CompletionOutput) -> list[Delta]:
        """A piece of the text, parsed."""
        deltas = self.parser.push(completion.text_diff)
        if completion.finish_reason is not None:
            deltas += self.parser.finish()
        return deltas if self.many_calls else self._up_to_one_call(deltas)

    def _up_to_one_call(self, deltas: list[Delta]) -> list[Delta]:
        calls = [i for i, delta in enumerate(deltas) if delta.call is not None]
        extra = set(calls if self.calls else calls[1:])
        return [delta for i, delta in enumerate(deltas) if i not in extra]

    def add(self, delta: Delta) -> dict[str, Any]:
        """Take a delta in, and give it in OpenAI's words."""
        if delta.call is not None:
            call = {
                "id": secrets.token_hex(5)[:9],  # Mistral's templates take nothing else
                "type": "function",
                "function": delta.call._asdict(),
            }
            self.calls.append(call)
            return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}
        self.content += delta.content
        self.reasoning += delta.reasoning
        return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.content}

    def whole(self) -> dict[str, Any]:
        """The message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        message["refusal"] = None
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class ChatAnswer:
    """The answer to a conversation, which is being generated.

    Parameters
    ----------
    model : ServedModel
    request : ChatRequest
    meter : Meter

    Attributes
    ----------
    result : GenerationResult
    messages : list of Message
        What has come of each choice.
    usage : Usage

    Raises
    ------
    SawError
        What is wrong with the request: nothing has begun then.
    """

    def __init__(self, model: ServedModel, request: ChatRequest, meter: Meter) -> None:
        self.model, self._request, self._meter = model, request, meter
        tools, forced = read_tools(model, request)
        prompt = model.chat_prompt(request, tools)
        continued = request.messages[-1].get("content") if request.continue_final_message else ""
        thinks = reasoning_of(prompt["prompt"], str(continued), reasons(model.template_text))
        self._parser = _parser(model, tools, forced, thinks == "begun")
        room = model.room(len(prompt["prompt_token_ids"]))
        limit = request.max_completion_tokens or request.max_tokens or room
        if request.top_logprobs and not request.logprobs:
            raise ApiError("invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
        guide = call_guide(tools or [], forced) if forced else response_guide(request.response_format)
        if guide:
            guide = guide.with_reasoning(thinks)
        params = model.sampling(
            request,
            max_tokens=limit,
            logprobs=bool(request.logprobs),
            top_logprobs=request.top_logprobs or 0,
            guided_decoding=guide,
        )
        self.result: GenerationResult = model.begin(prompt, params, request.stream)
        self.messages = [Message(self._parser(), request.parallel_tool_calls) for _ in range(params.n)]
        self.usage = Usage()
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer when it is there."""
        output = await self.finished()
        choices = [self._choice(completion) for completion in output.outputs]
        return {**self._head, "choices": choices, "usage": self.usage.body()}

    async def finished(self) -> RequestOutput:
        """All texts when they are there, counted."""
        try:
            output = await self.result.aresult()
        finally:
            self.result.abort()
        self._meter.piece(output)
        self.usage.take(output)
        return output

    async def pieces(self) -> AsyncIterator[RequestOutput]:
        """The texts as they grow, counted."""
        async for output in self.result:
            output = self.result.join(output)
            self._meter.piece(output)
            self.usage.take(output)
            yield output

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as it grows."""
        wants_usage = self._request.stream_options is not None and self._request.stream_options.include_usage
        extra = {"usage": None} if wants_usage else {}
        try:
            async for output in self.pieces():
                chunks = self._chunks(output.outputs[0])
                yield b"".join(event({**self._head, "choices": [chunk], **extra}) for chunk in chunks)
            if wants_usage:
                yield event({**self._head, "choices": [], "usage": self.usage.body()})
        except Exception as e:
            if not self.usage.begun:  # the stream has not opened: this is an error of its own
                raise
            yield event(error_body(e))
        finally:
            self.result.abort()
        yield DONE

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        message = self.messages[completion.index]
        for delta in message.take(completion):
            message.add(delta)
        return {
            "index": completion.index,
            "message": message.whole(),
            "logprobs": self._logprobs(completion),
            "finish_reason": self.reason(message, completion),
        }

    def _chunks(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """A piece of a text as chunks: first the role, last the reason of the end."""
        message = self.messages[completion.index]
        begun = message.num_tokens
        message.num_tokens += len(completion.token_ids_diff)
        deltas = [] if begun else [{"role": "assistant", "content": ""}]
        deltas += [message.add(delta) for delta in message.take(completion)]
        logprobs = self._logprobs(completion)
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        chunks = [_chunk(completion.index, delta) for delta in deltas]
        if logprobs and chunks:
            chunks[-1]["logprobs"] = logprobs
        if completion.finish_reason is not None:
            chunks.append(_chunk(completion.index, {}, self.reason(message, completion)))
        return chunks

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        return chat_logprobs(self.model, completion) if self._request.logprobs else None

    def reason(self, message: Message, completion: CompletionOutput) -> str | None:
        """Why a text ended."""
        reason = finish_reason(completion)
        return "tool_calls" if message.calls and reason == "stop" else reason


def _chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def read_tools(model: ServedModel, request: ChatRequest) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The tools for the prompt, and the one that must be called: a name, or ``required`` for any.

    Raises
    ------
    ApiError
        If they are malformed, or the model knows none.
    """
    choice, tools = request.tool_choice, request.tools
    if isinstance(choice, dict):
        function = choice.get("function")
        forced = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or not isinstance(forced, str):
            raise ApiError("invalid_value", "tool_choice names no function", "tool_choice")
    elif choice in (None, "auto", "none", "required"):
        forced = choice if choice == "required" else None
    else:
        raise ApiError("invalid_value", "tool_choice must be none, auto, required or a function", "tool_choice")
    if not tools:
        if forced:
            raise ApiError("invalid_value", "tool_choice needs tools: give some", "tool_choice")
        return None, None
    names = [_tool_name(tool) for tool in tools]
    if choice == "none":
        return None, None
    if isinstance(choice, dict) and forced not in names:
        known = ", ".join(names)
        raise ApiError("invalid_value", f"tool_choice names {forced}, and the tools are {known}", "tool_choice")
    if tool_format(model.template_text) is None:
        raise ApiError("unsupported_parameter", f"the chat template of {model.name} knows no tools", "tools")
    return tools, forced


def _tool_name(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError("invalid_value", 'a tool must be {"type": "function", "function": {"name": ...}}', "tools")
    return function["name"]


def _parser(
    model: ServedModel, tools: list[dict[str, Any]] | None, forced: str | None, thinks: bool
) -> Callable[[], Parser]:
    """What makes the parser of each choice, which ``thinks`` already or not."""
    template = model.template_text
    calls = ForcedCall if forced else tool_format(template) if tools else None
    rest = calls or PlainParser
    if not reasons(template):
        return rest
    return lambda: ReasoningParser(rest(), thinks)
