"""The engine of a server, and who asks it: the model that holds it, and models in other processes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from saw_trtllm.errors import ShutdownError
from saw_trtllm.llm import LLM
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.parts import Part
from saw_trtllm.runtime.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

#: What a step gave to each of a client's prompts, by the key that the client chose: the parts, and an error at the end.
Batch = list[tuple[int, list[Part | Exception]]]


class Asked(NamedTuple):
    """A prompt, and what is asked about it."""

    prompt: list[int]
    params: SamplingParams
    streaming: bool
    cache_salt: str = ""
    #: The id that the client gave its request, perhaps empty.
    request_id: str = ""


class Client(Protocol):
    """Whom a host gives parts to."""

    def deliver(self, batch: Batch) -> None:
        """Take what has come; called from one thread."""
        ...


class Engine(Protocol):
    """What a model asks for texts. Errors too come as parts."""

    def begin(self, key: int, asked: Asked) -> None:
        """Begin a text, whose parts come under this key."""
        ...

    def abort(self, key: int) -> None:
        """End a text; it has a last part all the same."""
        ...

    def close(self) -> None:
        """End all texts."""
        ...


@dataclass(eq=False)
class _Ticket:
    client: Client
    request_id: str
    result: GenerationResult


class EngineHost:
    """Gives each client in one message what a step, or several, have added to its texts.

    Parameters
    ----------
    llm : LLM
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._tickets: dict[tuple[Client, int], _Ticket] = {}
        self._ready: deque[tuple[Client, int]] = deque()
        self._rejected: deque[tuple[Client, int, Exception]] = deque()
        self._wake = threading.Event()
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._run, name="saw-serve", daemon=True)
        self._thread.start()

    def begin(self, client: Client, key: int, asked: Asked) -> None:
        """Begin a text of a client."""
        prompt = {"prompt_token_ids": asked.prompt, "cache_salt": asked.cache_salt}
        try:
            result = self.llm.generate_async(prompt, asked.params, streaming=asked.streaming)
        except Exception as e:
            self._rejected.append((client, key, e))
            self._wake.set()
            return
        self._tickets[client, key] = _Ticket(client, asked.request_id, result)
        result.subscribe(lambda: self._notice(client, key))

    def abort(self, client: Client, key: int) -> None:
        """End a text of a client."""
        ticket = self._tickets.get((client, key))
        if ticket is not None:
            ticket.result.abort()

    def stop(self, request_id: str) -> None:
        """End the texts of all requests of this id."""
        for ticket in list(self._tickets.values()):
            if request_id and ticket.request_id == request_id:
                ticket.result.abort()

    def leave(self, client: Client) -> None:
        """End the texts of a client that takes no more."""
        for ticket in list(self._tickets.values()):
            if ticket.client is client:
                ticket.result.abort()

    def close(self) -> None:
        """End all texts and release the engine; every client gets its last parts."""
        self._closing = True
        self.llm.shutdown()
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _notice(self, client: Client, key: int) -> None:
        self._ready.append((client, key))
        if not self._wake.is_set():
            self._wake.set()

    def _run(self) -> None:
        # It is woken when a whole step has been handed out: that makes the messages large.
        while not self._closed or self._ready or self._rejected:
            self._wake.wait()
            self._wake.clear()
            batches: dict[Client, Batch] = {}
            while self._rejected:
                client, key, error = self._rejected.popleft()
                batches.setdefault(client, []).append((key, [error]))
            while self._ready:
                client, key = self._ready.popleft()
                if parts := self._take(client, key):
                    batches.setdefault(client, []).append((key, parts))
            for client, batch in batches.items():
                try:
                    client.deliver(batch)
                except Exception:  # the others go on
                    logger.exception("parts could not be delivered")

    def _take(self, client: Client, key: int) -> list[Part | Exception]:
        """What has come of a text since: it may have been taken already, with an earlier notice."""
        parts: list[Part | Exception] = []
        ticket = self._tickets.get((client, key))
        if ticket is None:
            return parts
        for part in ticket.result.take_parts():
            if isinstance(part, Part) and part.reason == "cancelled" and self._closing:
                part = ShutdownError("the server is shutting down: send the request again later")
            parts.append(part)
        last = parts[-1] if parts else None
        if isinstance(last, Exception) or (last is not None and last.finished):
            del self._tickets[client, key]
        return parts


class LocalEngine:
    """A host's engine for a model in the same process.

    Parameters
    ----------
    host : EngineHost
    client : Client
    """

    def __init__(self, host: EngineHost, client: Client) -> None:
        self._host, self._client = host, client

    def begin(self, key: int, asked: Asked) -> None:
        """As :class:`Engine` has it."""
        self._host.begin(self._client, key, asked)

    def abort(self, key: int) -> None:
        """As :class:`Engine` has it."""
        self._host.abort(self._client, key)

    def close(self) -> None:
        """As :class:`Engine` has it."""
        self._host.close()
