"""uvicorn with the application: one process, one loop."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from saw_trtllm.errors import ConfigError


class ServerOptions(BaseModel):
    """``saw-serve``'s flags for the network: each field is one, its description the help."""

    model_config = ConfigDict(protected_namespaces=())

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every one, open to the network")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 is any that is free")
    ssl_keyfile: str | None = Field(None, description="key for TLS")
    ssl_certfile: str | None = Field(None, description="certificate for TLS")
    ssl_ca_certs: str | None = Field(None, description="certificates that clients' own must come from")
    root_path: str = Field("", description="where a proxy puts the server")
    limit_concurrency: int | None = Field(None, ge=1, description="connections at once; more are answered by 503")
    timeout_keep_alive: int = Field(5, ge=0, description="seconds that an idle connection stays open")
    timeout_graceful_shutdown: int = Field(
        10, ge=0, description="seconds that requests have to end when the server is told to stop"
    )


class Protocol(HttpToolsProtocol):
    """uvicorn's, of which each request learns that its connection has ended.

    uvicorn tells the last one that came, and that not before what follows on a closed transport. One that others were
    pipelined behind, or whose body was longer than it said, would go on, and write to what uvloop has closed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cycles: list[RequestResponseCycle] = []

    def on_headers_complete(self) -> None:
        """Begin a request, or have it wait for those before it."""
        super().on_headers_complete()
        self._cycles = [cycle for cycle in (*self._cycles, self.cycle) if cycle and not cycle.response_complete]

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and close the connection."""
        super().send_400_response(msg)
        self._end_cycles()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let nobody write any more."""
        super().connection_lost(exc)
        self._end_cycles()

    def _end_cycles(self) -> None:
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()


def listen(options: ServerOptions) -> tuple[socket.socket, str]:
    """A socket that listens, and the address at which it is reached.

    Raises
    ------
    ConfigError
        If the address is taken, or is none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listening = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as e:
        raise ConfigError(
            f"{options.host}:{options.port} cannot be listened on ({e.strerror}): give another --host or --port"
        ) from e
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(options.host, options.host)
    host = f"[{host}]" if ":" in host else host
    return listening, f"http{'s' if options.ssl_certfile else ''}://{host}:{listening.getsockname()[1]}"


def make_server(app: ASGIApp, options: ServerOptions, log_level: str = "warning") -> uvicorn.Server:
    """A server, to be run.

    Raises
    ------
    ConfigError
        If the key and the certificate cannot be used.
    """
    settings: dict[str, Any] = options.model_dump()
    for name in ("ssl_keyfile", "ssl_ca_certs"):
        if settings[name] and not options.ssl_certfile:
            raise ConfigError(f"--{name} is given and --ssl_certfile is not: TLS needs a certificate and its key")
    settings |= {"http": Protocol, "log_level": log_level, "access_log": log_level == "debug", "server_header": False}
    config = uvicorn.Config(app, **settings)
    try:
        config.load()
    except OSError as e:  # ssl.SSLError is one
        raise ConfigError(
            f"--ssl_certfile {options.ssl_certfile} with --ssl_keyfile {options.ssl_keyfile} and --ssl_ca_certs "
            f"{options.ssl_ca_certs} cannot be used ({e.strerror or e}): give a certificate, its key and the "
            "authorities' certificates as PEM files"
        ) from e
    return uvicorn.Server(config)
