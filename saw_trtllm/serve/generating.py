"""What the models that generate texts share: requests in flight, and their answers."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saw_trtllm.errors import RequestError, SawError, ShutdownError
from saw_trtllm.runtime.parts import Part, join
from saw_trtllm.serve.engine_host import Asked, Batch, Engine
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.request import Generation
from saw_trtllm.serve.response import stack
from saw_trtllm.serve.triton import Tensors, error_response, to_triton

logger = logging.getLogger(__name__)

#: Share of a thread's time that asking Triton about cancellation may take. A question takes about 0.1 ms, and costs the
#: processes on its way half of what a response does.
_WATCH_SHARE = 0.02

#: Seconds without a question at most. One may have taken long because the machine was busy, and others go away too.
_MAX_PAUSE = 1.0

#: Threads that send. Each waits for Triton to take a response before it sends the next.
_SENDERS = 4


class RequestCancelledError(SawError):
    """The client has gone."""

    triton_code = "CANCELLED"


@dataclass(eq=False)
class Job:
    """A request of Triton in flight.

    Attributes
    ----------
    request_id : str
        The client's, perhaps empty.
    sender : object
        Triton's response sender.
    generations : list of Generation
        One for each prompt.
    unfinished : int
        Prompts that have more to come.
    keys : list of int
        The engine's names of the prompts.
    waiting : list of (int, list)
        What has come of which prompt and was not answered yet.
    sending : bool
        Whether a thread answers what waits, or will.
    rows : dict
        Tensors of the finished prompts by their index, where they all go into one response.
    """

    request_id: str
    sender: Any
    generations: list[Generation]
    unfinished: int
    keys: list[int] = field(default_factory=list)
    waiting: list[tuple[int, list[Part | Exception]]] = field(default_factory=list)
    sending: bool = False
    rows: dict[int, Tensors] = field(default_factory=dict)
    #: Whether the client itself has cancelled the request.
    cancelled: bool = False
    closed: bool = False
    #: Held while Triton is asked about the request, and while it gets its last response.
    asking: threading.Lock = field(default_factory=threading.Lock)


class GeneratingModel:
    """Answers any number of requests at once with texts of an engine.

    ``execute`` only hands a request to the engine. What comes of its texts is answered by a few threads; a request that
    has to wait for one gets all that has come meanwhile in one response.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    parameters : Parameters
    """

    def __init__(self, pb_utils: Any, parameters: Parameters) -> None:
        self._pb_utils = pb_utils
        self._parameters = parameters
        self._keys = itertools.count(1)
        self._lock = threading.Lock()
        self._jobs: dict[Job, None] = {}
        self._prompts: dict[int, tuple[Job, int]] = {}  # by the engine's keys
        self._ready: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._threads = [threading.Thread(target=self._answer, name="saw-serve", daemon=True) for _ in range(_SENDERS)]
        self._threads.append(threading.Thread(target=self._watch, name="saw-serve", daemon=True))

    #: What the model asks for texts.
    _engine: Engine

    def _start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _generations(self, request: Any) -> list[Generation] | None:
        """What a request asks for; None if it is no request for texts, and has been answered."""
        raise NotImplementedError

    def _tensors(self, generation: Generation, part: Part) -> dict[str, np.ndarray]:
        """The outputs for a part of a text."""
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> None:
        """Begin the requests; the answers follow through their response senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(request, sender)
            except Exception as e:
                self._send_last(sender, self._error(e))

    def finalize(self) -> None:
        """Cancel what is in flight, and release the engine."""
        self._closing.set()
        self._engine.close()
        with self._idle:
            self._idle.wait_for(lambda: not self._jobs)
        for _ in range(_SENDERS):
            self._ready.put(None)
        for thread in self._threads:
            thread.join()

    def deliver(self, batch: Batch) -> None:
        """Take what a step gave to the texts; called by the engine."""
        with self._lock:
            for key, parts in batch:
                job, index = self._prompts[key]
                job.waiting.append((index, parts))
                if not job.sending:
                    job.sending = True
                    self._ready.put(job)

    def _begin(self, request: Any, sender: Any) -> None:
        generations = self._generations(request)
        if generations is None:
            self._send_last(sender, self._pb_utils.InferenceResponse([]))
            return
        if self._closing.is_set():
            raise _shutting_down()
        if not self._parameters.decoupled_mode:
            _reject_several_responses(generations)
        job = Job(request.request_id(), sender, generations, len(generations))
        with self._lock:
            self._jobs[job] = None
            for i in range(len(generations)):
                job.keys.append(next(self._keys))
                self._prompts[job.keys[i]] = (job, i)
        for key, g in zip(job.keys, generations, strict=True):
            try:
                self._engine.begin(key, Asked(g.prompt, g.params, g.streaming, g.cache_salt, job.request_id))
            except Exception as e:
                self.deliver([(key, [e])])
        if job.closed or job.cancelled:  # while some had not begun, which an abort then did not know of
            self._abort(job)

    def _answer(self) -> None:
        while (job := self._ready.get()) is not None:
            with self._lock:
                waiting, job.waiting = job.waiting, []
            try:
                self._respond(job, waiting)
            except Exception as e:
                self._fail(job, e)
            with self._lock:
                if job.waiting:
                    self._ready.put(job)
                else:
                    job.sending = False
                    self._forget(job)

    def _respond(self, job: Job, waiting: Sequence[tuple[int, list[Part | Exception]]]) -> None:
        came: dict[int, list[Part]] = {}
        errors: list[Exception] = []
        for index, parts in waiting:
            for part in parts:
                if isinstance(part, Exception):
                    errors.append(part)
                    job.unfinished -= 1
                else:
                    came.setdefault(index, []).append(part)
                    job.unfinished -= part.finished
        joined = [(index, part) for index, parts in came.items() for part in join(parts)]
        for number, (index, part) in enumerate(joined, 1):
            self._respond_part(job, index, part, last=number == len(joined) and not job.unfinished and not errors)
        if errors:
            raise errors[0]

    def _respond_part(self, job: Job, index: int, part: Part, last: bool) -> None:
        if job.closed:  # another prompt of the request has failed
            return
        if part.reason == "cancelled":  # one that another request has stopped is an answer as it is
            if self._closing.is_set():
                raise _shutting_down()
            if job.cancelled:
                raise RequestCancelledError("the request was cancelled")
        generation = job.generations[index]
        tensors = self._tensors(generation, part)
        if len(job.generations) > 1 or generation.params.n > 1:
            tensors["batch_index"] = np.array([[index]], np.int32)
            tensors["sequence_index"] = np.array([[part.number]], np.int32)
        if self._parameters.decoupled_mode or len(job.generations) == 1:
            self._send_tensors(job, tensors, last)
        else:
            job.rows[index] = tensors
            if last:
                self._send_tensors(job, stack([job.rows[i] for i in range(len(job.generations))]), last)

    def _send_tensors(self, job: Job, tensors: Tensors, last: bool) -> None:
        response = self._pb_utils.InferenceResponse(to_triton(self._pb_utils, tensors))
        if last:
            self._close(job, response)
        else:
            job.sender.send(response, flags=0)

    def _close(self, job: Job, response: Any) -> None:
        with job.asking:  # what Triton is asked about must not have ended
            job.closed = True
            self._send_last(job.sender, response)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a request with an error; what its other prompts still give is dropped."""
        if not job.closed:
            job.closed = True  # before it aborts: see _begin
            self._abort(job)
            self._close(job, self._error(error))

    def _error(self, error: Exception) -> Any:
        if not isinstance(error, SawError):
            logger.error("a request failed", exc_info=error)
        return error_response(self._pb_utils, error)

    def _forget(self, job: Job) -> None:
        """Let go of a request that has been answered; the lock is held."""
        if job.closed and not job.unfinished:
            self._jobs.pop(job, None)
            for key in job.keys:
                self._prompts.pop(key, None)
            if not self._jobs:
                self._idle.notify_all()

    def _abort(self, job: Job) -> None:
        for key in job.keys:
            self._engine.abort(key)

    def _send_last(self, sender: Any, response: Any) -> None:
        try:
            sender.send(response, flags=self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:  # nobody is left to be told, and others wait for this thread
            logger.exception("the last response of a request could not be sent")

    def _watch(self) -> None:
        """Abort requests whose clients have gone."""
        period = self._parameters.cancellation_check_period_ms / 1000
        spent = 0.0
        while not self._closing.wait(max(period, min(spent / _WATCH_SHARE, _MAX_PAUSE))):
            with self._lock:
                jobs = [job for job in self._jobs if not job.closed and not job.cancelled]
            start = time.monotonic()
            for job in jobs:
                try:
                    with job.asking:
                        job.cancelled = not job.closed and job.sender.is_cancelled()
                    if job.cancelled:
                        self._abort(job)
                except Exception as e:  # the others are asked about, and this one the next time
                    logger.warning("Triton could not be asked whether a client has gone: %s", e)
            spent = time.monotonic() - start


def every(seconds: float, closing: threading.Event, act: Callable[[], None]) -> threading.Thread:
    """A thread that acts again and again until ``closing`` is set."""

    def run() -> None:
        while True:
            try:
                act()
            except Exception:  # it may go well the next time
                logger.exception("a background task failed")
            if closing.wait(seconds):
                return

    return threading.Thread(target=run, name="saw-serve", daemon=True)


def _shutting_down() -> ShutdownError:
    return ShutdownError("the server is shutting down: send the request again later")


def _reject_several_responses(generations: Sequence[Generation]) -> None:
    for g in generations:
        asked = "stream is true" if g.streaming else f"num_return_sequences is {g.params.n}" if g.params.n > 1 else None
        if asked:
            raise RequestError(
                f"{asked}, and this server gives one response to a request: leave it out, or start saw-triton with "
                "--decoupled_mode true"
            )
