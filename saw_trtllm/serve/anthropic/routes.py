"""The routes of Anthropic's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from saw_trtllm.serve.anthropic.messages import MessagesAnswer
from saw_trtllm.serve.anthropic.protocol import CountRequest, MessagesRequest, as_chat
from saw_trtllm.serve.openai.chat import read_tools
from saw_trtllm.serve.openai.connection import start_stream, while_connected
from saw_trtllm.serve.openai.metrics import Meter, Metrics
from saw_trtllm.serve.openai.model import Models, ServedModel, beside_the_loop, name_user

#: Where they are; errors below it have Anthropic's shape.
MESSAGES = "/v1/messages"


def add_messages(app: FastAPI, models: Models, metrics: Metrics, guard: Sequence[Any]) -> None:
    """Add them to an application."""

    @app.post(MESSAGES, dependencies=list(guard))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        model, chat = models.find(body.model), as_chat(body)
        name_user(body.metadata.user_id if body.metadata else None)
        answer = await beside_the_loop(len(str(chat.messages)), MessagesAnswer, model, chat, Meter(metrics, model.name))
        if body.stream:
            return await start_stream(request, answer.events())
        return JSONResponse(await while_connected(request.receive, answer.whole()))

    @app.post(f"{MESSAGES}/count_tokens", dependencies=list(guard))
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        model, chat = models.find(body.model), as_chat(body)

        def count(model: ServedModel) -> int:
            tools, _ = read_tools(model, chat)
            return len(model.chat_prompt(chat, tools)["prompt_token_ids"])

        return {"input_tokens": await beside_the_loop(len(str(chat.messages)), count, model)}
