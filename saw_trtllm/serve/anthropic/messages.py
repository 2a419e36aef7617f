"""``/v1/messages``: the answer to a conversation in Anthropic's shape."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from saw_trtllm.runtime.outputs import CompletionOutput
from saw_trtllm.serve.openai.chat import ChatAnswer
from saw_trtllm.serve.openai.errors import answer_to, error_body
from saw_trtllm.serve.openai.parsers.delta import Delta

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
#: By status; what OpenAI's table gives has these names here.
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class MessagesAnswer(ChatAnswer):
    """The answer, which is being generated; see :class:`ChatAnswer`."""

    async def whole(self) -> dict[str, Any]:
        """The message when it is there."""
        [completion] = (await self.finished()).outputs
        message = self.messages[0]
        for delta in message.take(completion):
            message.add(delta)
        content: list[dict[str, Any]] = []
        if message.reasoning:
            content.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
        if message.content or not message.calls:
            content.append({"type": "text", "text": message.content})
        content += [
            {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": _arguments(call)}
            for call in message.calls
        ]
        return {**self._opening(content), **self._end(completion), "usage": self._counts()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The message as it grows: blocks that begin, grow and end one after the other."""
        blocks = _Blocks()
        begun = False
        try:
            async for output in self.pieces():
                completion = output.outputs[0]
                if not begun:
                    begun = True
                    start = {**self._opening([]), "stop_reason": None, "stop_sequence": None, "usage": self._counts()}
                    yield _event("message_start", message=start)
                for delta in self.messages[0].take(completion):
                    self.messages[0].add(delta)
                    call_id = self.messages[0].calls[-1]["id"] if delta.call else ""
                    for event in blocks.add(delta, call_id):
                        yield event
                if completion.finish_reason is not None:
                    for event in blocks.end():
                        yield event
                    yield _event("message_delta", delta=self._end(completion), usage=self._counts())
                    yield _event("message_stop")
        except Exception as e:
            if not begun:
                raise
            yield _event("error", error=anthropic_error(e)["error"])
        finally:
            self.result.abort()

    def _opening(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        identifier = f"msg_{secrets.token_hex(12)}"
        name = self.model.name
        return {"id": identifier, "type": "message", "role": "assistant", "model": name, "content": content}

    def _end(self, completion: CompletionOutput) -> dict[str, Any]:
        reason = _REASONS[self.reason(self.messages[0], completion) or "stop"]
        stop = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        return {"stop_reason": "stop_sequence" if stop else reason, "stop_sequence": stop}

    def _counts(self) -> dict[str, int]:
        usage = self.usage.body()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
        }


class _Blocks:
    """The blocks of a streamed message, of which one is open at a time."""

    def __init__(self) -> None:
        self._kind = ""
        self._index = -1

    def add(self, delta: Delta, call_id: str) -> list[bytes]:
        if delta.call is not None:
            block = {"type": "tool_use", "id": call_id, "name": delta.call.name, "input": {}}
            grown = {"type": "input_json_delta", "partial_json": delta.call.arguments}
            return [*self.end(), *self._begin("tool_use", block), self._grow(grown), *self.end()]
        if delta.reasoning:
            kind, block = "thinking", {"type": "thinking", "thinking": "", "signature": ""}
            grown = {"type": "thinking_delta", "thinking": delta.reasoning}
        else:
            kind, block = "text", {"type": "text", "text": ""}
            grown = {"type": "text_delta", "text": delta.content}
        begun = [] if kind == self._kind else [*self.end(), *self._begin(kind, block)]
        return [*begun, self._grow(grown)]

    def end(self) -> list[bytes]:
        if not self._kind:
            return []
        self._kind = ""
        return [_event("content_block_stop", index=self._index)]

    def _begin(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        self._kind, self._index = kind, self._index + 1
        return [_event("content_block_start", index=self._index, content_block=block)]

    def _grow(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def anthropic_error(error: Exception) -> dict[str, Any]:
    """An error as Anthropic's API writes it."""
    kind = _ERRORS.get(answer_to(error).status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error_body(error)["error"]["message"]}}


def _arguments(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["function"]["arguments"])
    except ValueError:
        return {}


def _event(kind: str, **body: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **body}, ensure_ascii=False)}\n\n".encode()
