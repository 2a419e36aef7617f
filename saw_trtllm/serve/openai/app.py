"""The application: routes, who may call them, and how errors are answered."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from saw_trtllm.errors import SawError
from saw_trtllm.serve.anthropic.messages import anthropic_error
from saw_trtllm.serve.anthropic.routes import MESSAGES, add_messages
from saw_trtllm.serve.openai.chat import ChatAnswer
from saw_trtllm.serve.openai.completions import CompletionAnswer
from saw_trtllm.serve.openai.connection import BodyLimit, ClientGoneError, start_stream, while_connected
from saw_trtllm.serve.openai.errors import ApiError, answer_to, error_body, from_validation
from saw_trtllm.serve.openai.metrics import Meter, Metrics
from saw_trtllm.serve.openai.model import Models, ServedModel, beside_the_loop, name_user
from saw_trtllm.serve.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from saw_trtllm.version import __version__

logger = logging.getLogger(__name__)

#: Bytes of a body: those of the longest prompt as text, escaped and with all else that a request may hold.
_BODY_PER_TOKEN, _LEAST_BODY = 32, 1 << 20


def make_app(models: Sequence[ServedModel], api_keys: Sequence[str] = (), cors_origins: Sequence[str] = ()) -> ASGIApp:
    """The application over some models.

    Parameters
    ----------
    models : sequence of ServedModel
    api_keys : sequence of str
        Of which a client must send one; none for anybody.
    cors_origins : sequence of str
        Sites whose pages may call it from a browser.
    """
    served = Models(list(models))
    metrics = Metrics({model.name: model.llm.stats for model in models})
    app = FastAPI(title="saw_trtllm", version=__version__, docs_url=None, redoc_url=None)
    _add_error_handlers(app, metrics)
    guard = [Depends(_guard(api_keys))] if api_keys else []
    _add_generation(app, served, metrics, guard)
    add_messages(app, served, metrics, guard)
    _add_models(app, served, guard)
    _add_tokens(app, served, guard)
    _add_state(app, served, metrics)
    longest = max(model.llm.max_seq_len for model in models)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    return Outermost(BodyLimit(app, body_limit(longest)), metrics)


def body_limit(max_seq_len: int) -> int:
    """Bytes that the body of a request may have."""
    return max(_LEAST_BODY, _BODY_PER_TOKEN * max_seq_len)


class Outermost:
    """Answers what is raised around an application, where no handler of its own is."""

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        try:
            await self._app(scope, receive, send)
        except ApiError as e:
            await error_response(scope["path"], e, self._metrics)(scope, receive, send)


def _guard(api_keys: Sequence[str]) -> Any:
    keys = [key.encode() for key in api_keys]

    async def check(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        sent = given.encode("latin-1").strip()  # the bytes as they came, of which 0xa0 may be part of a letter
        # All are compared, in the time that one takes: how long it takes tells nothing of a key.
        if sum([hmac.compare_digest(sent, key) for key in keys]) == 0:
            raise ApiError("invalid_api_key", "the API key is missing or wrong: send one as Authorization: Bearer KEY")

    return check


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, error, metrics)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(request.url.path, from_validation(error.errors()[0]), metrics)

    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # of the body, while it was read
            return error_response(request.url.path, error.__cause__, metrics)
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_json")
        path = request.url.path
        if error.status_code == 400:  # FastAPI's own, which does not say what is wrong
            whys = {RecursionError: "it is nested too deeply", UnicodeDecodeError: "it is not UTF-8"}
            why = whys.get(type(error.__cause__), "it holds a number of too many digits")
            return error_response(path, ApiError(code, f"the body cannot be read: {why}; send a JSON object"), metrics)
        response = error_response(path, ApiError(code, f"{request.method} {path}: {error.detail}"), metrics)
        response.headers.update(error.headers or {})  # which methods there are
        return response

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # which nobody reads

    app.exception_handler(ClientGoneError)(gone)
    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(HTTPException)(http_error)
    app.exception_handler(Exception)(api_error)
    app.exception_handler(SawError)(api_error)


def error_response(path: str, error: Exception, metrics: Metrics | None = None) -> JSONResponse:
    """An error as the API of a path writes it."""
    answer = answer_to(error)
    if metrics is not None:
        metrics.errors.labels(answer.code).inc()
    if answer.status >= 500:
        logger.error("a request failed: %s", error, exc_info=error)
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(answer.status)
    prompt = "prompt" if path in ("/v1/completions", "/tokenize") else "messages"
    body = anthropic_error(error) if path.startswith(MESSAGES) else error_body(error, prompt)
    return JSONResponse(body, answer.status, headers)


def _add_generation(app: FastAPI, models: Models, metrics: Metrics, guard: list[Any]) -> None:
    @app.post("/v1/chat/completions", dependencies=guard)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        model = models.find(body.model)
        name_user(body.user)
        meter = Meter(metrics, model.name)
        size = sum(len(str(message.get("content", ""))) for message in body.messages)
        answer = await beside_the_loop(size, ChatAnswer, model, body, meter)
        if body.stream:
            return await start_stream(request, answer.events())
        return JSONResponse(await while_connected(request.receive, answer.whole()))

    @app.post("/v1/completions", dependencies=guard)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model = models.find(body.model)
        name_user(body.user)
        meter = Meter(metrics, model.name)
        size = sum(len(p) if isinstance(p, str | list) else 1 for p in body.prompt)
        answer = await beside_the_loop(size, CompletionAnswer, model, body, meter)
        if body.stream:
            return await start_stream(request, answer.events())
        return JSONResponse(await while_connected(request.receive, answer.whole()))


def _add_models(app: FastAPI, models: Models, guard: list[Any]) -> None:
    def describe(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "saw_trtllm",
            "max_model_len": model.llm.max_seq_len,
        }

    @app.get("/v1/models", dependencies=guard)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(model) for model in models]}

    @app.get("/v1/models/{name:path}", dependencies=guard)
    async def one_model(name: str) -> dict[str, Any]:
        return describe(models.find(name))


def _add_tokens(app: FastAPI, models: Models, guard: list[Any]) -> None:
    @app.post("/tokenize", dependencies=guard)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        model = models.find(body.model)
        size = len(body.prompt or "") + sum(len(str(message)) for message in body.messages or ())
        ids = await beside_the_loop(size, model.tokenize, body)
        answer = {"count": len(ids), "max_model_len": model.llm.max_seq_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [model.token_text(token)[0] for token in ids]
        return answer

    @app.post("/detokenize", dependencies=guard)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return {"prompt": models.find(body.model).detokenize(body.tokens)}


def _add_state(app: FastAPI, models: Models, metrics: Metrics) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if all(model.llm.alive for model in models) else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.head("/", include_in_schema=False)
    @app.get("/")
    async def page() -> Response:
        return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")

    @app.get("/kv")
    async def kv() -> dict[str, Any]:
        return {"models": [model.kv_numbers() for model in models]}
