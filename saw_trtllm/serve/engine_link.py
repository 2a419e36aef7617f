"""The way to the engine for models in other processes of the same server: a message for what a step gave to all texts.

Triton's Python backend has a process for each model, and what goes from model to model by way of Triton costs a request
for each piece of each text.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from saw_trtllm.errors import EngineError, SawError
from saw_trtllm.serve.engine_host import Asked, Batch, Client, EngineHost

logger = logging.getLogger(__name__)

#: Seconds that a model may take nothing of what is sent to it, while the texts of all models wait.
_PATIENCE = 10.0


def engine_address(model: str) -> str:
    """Where a model of the same server is reached, which holds the engine.

    It is a name of Linux's own kind, of no file; that of the namespace tells containers apart that share a network.
    """
    return f"\0saw_triton_{os.stat('/proc/self/ns/pid').st_ino}_{os.getppid()}_{model}"


def _is_own(end: socket.socket) -> bool:
    """Whether the other end is the same user's: what comes is unpickled."""
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()


class LinkServer:
    """Lets models of other processes ask a host.

    Parameters
    ----------
    host : EngineHost
    address : str
        As :func:`engine_address` has it.

    Raises
    ------
    EngineError
        If the address is taken.
    """

    def __init__(self, host: EngineHost, address: str) -> None:
        self._host = host
        self._closed = False
        self._listening = socket.socket(socket.AF_UNIX)
        try:
            self._listening.bind(address)
        except OSError as e:
            raise EngineError(
                f"the socket {address!r} of this model cannot be had ({e.strerror}): let no other process take it"
            ) from e
        self._listening.listen()
        threading.Thread(target=self._accept, name="saw-link", daemon=True).start()

    def close(self) -> None:
        """Take no further models."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                self._let_in(self._listening.accept()[0])
            except (OSError, RuntimeError) as e:
                if not self._closed:  # too many open files or threads, for one: that may pass
                    logger.warning("a model could not be let in: %s", e)
                    time.sleep(0.1)

    def _let_in(self, end: socket.socket) -> None:
        if _is_own(end):
            client = _RemoteClient(self._host, end)
            threading.Thread(target=client.run, name="saw-link", daemon=True).start()
        else:
            end.close()


class _RemoteClient:
    """A model of another process, as the host sees it."""

    def __init__(self, host: EngineHost, end: socket.socket) -> None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *divmod(int(_PATIENCE * 1e6), 10**6)))
        self._host, self._end = host, end
        self._connection = Connection(os.dup(end.fileno()))
        self._lock = threading.Lock()  # held while something is sent, so that its descriptor stays its own

    def deliver(self, batch: Batch) -> None:
        """As :class:`Client` has it."""
        with self._lock:
            try:
                self._connection.send([(key, [_sendable(part) for part in parts]) for key, parts in batch])
            except Exception as e:
                self._hang_up()  # a part of a message may have been sent, and texts lack what was in it
                if not isinstance(e, OSError):
                    raise

    def run(self) -> None:
        """Take what it asks for until it goes."""
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    key, asked = self._connection.recv()
                    if asked is None:
                        self._host.abort(self, key)
                    else:
                        self._host.begin(self, key, asked)
        finally:
            self._hang_up()
            self._host.leave(self)
            with self._lock:
                self._connection.close()
                self._end.close()

    def _hang_up(self) -> None:
        """End both directions: run() notices, and the model answers its requests with an error."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)


def _sendable(part: Any) -> Any:
    """A part, or an error without what another process could not have."""
    if isinstance(part, Exception) and not isinstance(part, SawError):
        return RuntimeError(f"{type(part).__name__}: {part}")
    return part


class RemoteEngine:
    """The engine, for a model in another process than the one that holds it.

    It is connected to at the first request: until all models of a server are loaded there is none.

    Parameters
    ----------
    client : Client
    address : str
    """

    def __init__(self, client: Client, address: str) -> None:
        self._client, self._address = client, address
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._open: set[int] = set()

    def begin(self, key: int, asked: Asked) -> None:
        """As :class:`Engine` has it.

        Raises
        ------
        EngineError
            If the process that holds the engine cannot be reached.
        """
        with self._lock:
            if self._connection is None:
                self._connection = self._connect()
            self._send(key, asked)
            self._open.add(key)

    def abort(self, key: int) -> None:
        """As :class:`Engine` has it."""
        with self._lock:
            self._send(key, None)

    def close(self) -> None:
        """As :class:`Engine` has it."""
        with self._lock:
            keys = list(self._open)
        for key in keys:
            self.abort(key)

    def _send(self, key: int, asked: Asked | None) -> None:
        """Send a message; the lock is held."""
        with contextlib.suppress(OSError):  # it has gone: whoever reads notices
            if self._connection is not None:
                self._connection.send((key, asked))

    def _connect(self) -> Connection:
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(self._address)
        except OSError as e:
            end.close()
            raise EngineError(f"the model tensorrt_llm cannot be reached ({e.strerror}): see the server's log") from e
        if not _is_own(end):
            end.close()
            raise EngineError("the model tensorrt_llm is another user's")
        connection = Connection(end.detach())
        threading.Thread(target=self._read, args=(connection,), name="saw-link", daemon=True).start()
        return connection

    def _read(self, connection: Connection) -> None:
        try:
            while True:
                batch = connection.recv()
                ended = [key for key, parts in batch if isinstance(parts[-1], Exception) or parts[-1].finished]
                with self._lock:
                    self._open.difference_update(ended)
                self._client.deliver(batch)
        except (EOFError, OSError):
            pass  # it has gone
        except Exception:  # nobody may wait for what no thread reads
            logger.exception("what the model tensorrt_llm sent cannot be taken")
        with self._lock:
            lost, self._open, self._connection = self._open, set(), None
        connection.close()
        error = EngineError("the model tensorrt_llm has gone: send the request again later")
        self._client.deliver([(key, [error]) for key in lost])
