"""Replicas of a server behind one address, as a deployment of Ray Serve, whose routers share the requests out.

The process that listens has no engine. It reads a request, has Serve choose a replica, and passes on what the
application there answers. A replica that dies is started again by Serve; a request that it had not begun to answer can
be sent to another one.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError, RankError
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.parallel.ray_ranks import connect
from saw_trtllm.serve.garbage import set_start_aside
from saw_trtllm.serve.openai.app import Outermost, body_limit, error_response, make_app
from saw_trtllm.serve.openai.connection import BodyLimit, ClientGoneError, while_connected
from saw_trtllm.serve.openai.model import ModelSpec

log = logging.getLogger(__name__)

RouteBy = Literal["load", "prefix"]
#: What of a request's scope can be sent to another process.
_SCOPE = ("type", "http_version", "method", "path", "raw_path", "query_string", "headers", "root_path", "scheme")
#: Requests that a replica takes; its own queue rejects what is too much.
_MAX_ONGOING = 100_000
#: Where Serve's router by prefixes is: its public name loads beside vLLM or SGLang only, itself it needs neither.
_PREFIX_ROUTERS = (
    "ray.serve.llm.request_router",
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router",
)
#: Requests that a replica may have more than another before Serve looks at their load alone.
_IMBALANCE = 16


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica.

    Attributes
    ----------
    scope : dict
    body : bytes
    prompt : str
        By whose beginning Serve may choose the replica.
    """

    scope: dict[str, Any]
    body: bytes
    prompt: str


class Replica:
    """What runs in the process of a replica: the models, and the application over them."""

    def __init__(self, specs: Sequence[ModelSpec], api_keys: Sequence[str], cors_origins: Sequence[str]) -> None:
        self._models = [spec.open() for spec in specs]
        self._app = make_app(self._models, api_keys, cors_origins)
        set_start_aside()

    async def answer(self, call: Call) -> AsyncIterator[Message]:
        """What the application sends for a request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies = iter([{"type": "http.request", "body": call.body, "more_body": False}])

        async def receive() -> Message:
            if (body := next(bodies, None)) is not None:
                return body
            await asyncio.Event().wait()  # the client's leaving cancels all of this
            raise AssertionError

        task = asyncio.ensure_future(self._app(call.scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            task.result()
        finally:
            task.cancel()

    def check_health(self) -> None:
        """Asked by Serve, which starts a replica again that raises."""
        if not all(model.llm.alive for model in self._models):
            raise EngineError("the runtime has failed")


class Front:
    """The application that listens.

    Parameters
    ----------
    handle : ray.serve.handle.DeploymentHandle
        Of the replicas.
    retry : int
        How often a request is sent to another replica when one dies that had not begun to answer it.
    route_by : str
    """

    def __init__(self, handle: Any, retry: int, route_by: RouteBy) -> None:
        self._handle = handle.options(stream=True)
        self._retry, self._route_by = retry, route_by

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, until the client leaves."""
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        prompt = _beginning(scope["path"], body) if self._route_by == "prefix" else ""
        call = Call({name: scope[name] for name in _SCOPE if name in scope}, body, prompt)
        with suppress(ClientGoneError):
            await while_connected(receive, self._pass_on(call, send))

    async def _pass_on(self, call: Call, send: Send) -> None:
        from ray.exceptions import RayError

        for left in range(self._retry, -1, -1):
            begun, answers = False, self._handle.answer.remote(call)
            try:
                async for message in answers:
                    await send(message)
                    begun = True
                return
            except RayError as e:
                log.error("a replica was lost: %s", str(e).splitlines()[0])
                if begun:
                    raise  # uvicorn closes the connection: the client sees that the answer is not whole
                if not left:
                    error = RankError("the replica of this request was lost: send it again, or start with --retry 1")
                    await error_response(call.scope["path"], error)(call.scope, _nothing, send)
            finally:
                answers.cancel()


@contextmanager
def replicas(
    specs: Sequence[ModelSpec],
    count: int,
    api_keys: Sequence[str],
    cors_origins: Sequence[str],
    retry: int,
    route_by: RouteBy,
) -> Iterator[ASGIApp]:
    """Start replicas, and give the application over them; at the end they are stopped.

    Parameters
    ----------
    specs : sequence of ModelSpec
        The models of each replica.
    count : int
    api_keys, cors_origins
        As for :func:`saw_trtllm.serve.openai.app.make_app`.
    retry, route_by
        As for :class:`Front`.

    Raises
    ------
    ConfigError
        If the engines are split over ranks with GPUs that Ray does not start.
    BackendUnavailableError
        If Ray, or its router, is missing.
    EngineError
        If there is no room for the replicas, or they do not start.
    """
    configs = [spec.config() for spec in specs]
    sizes = [config.tp_size for config in configs if config.saw_int4.backend != "reference"]
    own_gpus, rank_gpus = int(1 in sizes), sum(size for size in sizes if size > 1)
    if rank_gpus and any(ParallelConfig.of(spec.options.get("parallel_config")).ranks != "ray" for spec in specs):
        raise ConfigError("--replicas of an engine of several ranks need --ranks ray, which gives each its GPUs")
    ray = connect(num_cpus=1 + count * sum(config.tp_size for config in configs))
    has, needed = ray.cluster_resources().get("GPU", 0), count * (own_gpus + rank_gpus)
    if has < needed:
        raise EngineError(
            f"{count} replicas need {needed} GPUs and the Ray cluster has {has:g}: give fewer --replicas, or add "
            "machines to it"
        )
    from ray import serve

    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    deployment = _deployment(count, own_gpus, route_by)
    name = f"saw-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        # A cluster that others share may have applications of theirs.
        stack.callback(partial(serve.delete, name) if os.environ.get("RAY_ADDRESS") else serve.shutdown)
        try:
            bound = deployment.bind(list(specs), list(api_keys), list(cors_origins))
            handle = serve.run(bound, name=name, route_prefix=None)
        except RuntimeError as e:
            raise EngineError(f"the replicas do not start ({_last_line(e)}): see their logs") from e
        longest = max(config.build_config.max_seq_len for config in configs)
        yield Outermost(BodyLimit(Front(handle, retry, route_by), body_limit(longest)))


def _deployment(count: int, num_gpus: int, route_by: RouteBy) -> Any:
    """The replicas as Serve is told of them, each with so many GPUs of its own process's."""
    from ray import serve

    return serve.deployment(
        Replica,
        num_replicas=count,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "num_gpus": num_gpus},
        health_check_period_s=2,
        **_router(route_by),
    )


def _router(route_by: RouteBy) -> dict[str, Any]:
    """Serve's own way to choose a replica: of two the one with fewer requests, or by what it has computed."""
    if route_by == "load":
        return {}
    from ray.serve.config import RequestRouterConfig

    kwargs = {"imbalanced_threshold": _IMBALANCE, "do_eviction": True}
    router = RequestRouterConfig(request_router_class=_prefix_router(), request_router_kwargs=kwargs)
    return {"request_router_config": router}


def _prefix_router() -> Any:
    """Serve's router for language models.

    Raises
    ------
    BackendUnavailableError
        If it is not where Ray's releases have it.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        for module in _PREFIX_ROUTERS:
            with suppress(ImportError):
                return importlib.import_module(module).PrefixCacheAffinityRouter
    finally:  # it has this process say every request of every library
        root.handlers[:] = handlers
        root.setLevel(level)
    raise BackendUnavailableError(
        f"--route_by prefix needs Ray Serve's router for language models, which this Ray ({version('ray')}) does not "
        "have without more: install Ray 2.60 or 'ray[llm]', or leave the flag out"
    )


def _beginning(path: str, body: bytes) -> str:
    """The text of a prompt or a conversation, or what stands for a request without one."""
    try:
        fields = json.loads(body)
        prompt = fields.get("messages") or fields.get("prompt")
    except (ValueError, AttributeError):  # the replica will say what is wrong
        prompt = None
    return prompt if isinstance(prompt, str) else json.dumps(prompt) if prompt else path


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


async def _nothing() -> Message:
    raise AssertionError("an answer reads nothing")
