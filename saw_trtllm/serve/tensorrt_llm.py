"""The model ``tensorrt_llm``: token ids to token ids."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import secrets
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saw_trtllm.errors import EngineError, RequestError, SawError, ShutdownError
from saw_trtllm.llm import LLM
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.outputs import GenerationResult, RequestOutput
from saw_trtllm.serve import names
from saw_trtllm.serve.metrics import MetricsReporter
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.request import Generation, parse
from saw_trtllm.serve.response import answer, stack
from saw_trtllm.serve.triton import Tensors, error_response, read_tensors, to_triton

logger = logging.getLogger(__name__)

#: Share of the loop's time that asking Triton about cancellation may take. A question takes about 0.1 ms.
_WATCH_SHARE = 0.1

#: Responses in a second of all streams where there are several. Triton takes postprocessing's requests one by one, 2000
#: in a second on a fast host: beyond that a new stream's first piece would wait behind all that others have piled up.
_RESPONSES_PER_S = 1000

#: Seconds between a piece and an error that follows it. Triton 2.51 never finishes an ensemble that fails while a step,
#: here postprocessing, works.
_ERROR_DELAY = 0.2


def _reject_several_responses(generations: Sequence[Generation]) -> None:
    for g in generations:
        asked = "stream is true" if g.streaming else f"num_return_sequences is {g.params.n}" if g.params.n > 1 else None
        if asked:
            raise RequestError(
                f"{asked}, and this server gives one response to a request: leave it out, or start saw-triton with "
                "--decoupled_mode true"
            )


class RequestCancelledError(SawError):
    """The client has gone."""

    triton_code = "CANCELLED"


@dataclass(eq=False)
class Job:
    """A request of Triton in flight.

    Attributes
    ----------
    key : int
        Names the job to ``postprocessing``. Not to be guessed, for who has it can stop the job; never 0.
    request_id : str
        The client's, perhaps empty.
    sender : object
        Triton's response sender.
    parts : list of (Generation, GenerationResult)
        One for each prompt.
    unfinished : int
        Prompts that have more to come.
    rows : dict
        Tensors of the finished prompts by their index, where they all go into one response.
    checked : float
        When ``postprocessing`` was last asked about cancellation.
    """

    key: int
    request_id: str
    sender: Any
    parts: list[tuple[Generation, GenerationResult]]
    unfinished: int
    rows: dict[int, Tensors] = field(default_factory=dict)
    checked: float = float("-inf")
    #: Whether the client itself has cancelled the request.
    cancelled: bool = False
    closed: bool = False

    def abort(self) -> None:
        """Let the runtime stop all prompts."""
        for _, result in self.parts:
            result.abort()


class TensorrtLlmModel:
    """Runs an engine for any number of requests at once.

    ``execute`` only hands a request to the runtime. A thread with an event loop sends the pieces, watches for
    cancellation and updates the metrics; all talk with Triton about a request in flight is on that thread.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    parameters : Parameters

    Raises
    ------
    EngineError
        If there is no engine, or it cannot run here.
    """

    def __init__(self, pb_utils: Any, parameters: Parameters) -> None:
        if parameters.gpt_model_path is None:
            raise EngineError(
                "config.pbtxt names no engine: set its parameter gpt_model_path, or let saw-triton write it"
            )
        self._pb_utils = pb_utils
        self._parameters = parameters
        kv_cache = KvCacheConfig(
            max_tokens=parameters.max_tokens_in_paged_kv_cache,
            free_gpu_memory_fraction=parameters.kv_cache_free_gpu_mem_fraction,
            host_cache_size=parameters.kv_cache_host_memory_bytes,
            disk_cache_dir=parameters.disk_cache_dir,
            disk_cache_size=parameters.disk_cache_size,
            enable_block_reuse=parameters.enable_kv_cache_reuse,
            enable_partial_reuse=parameters.enable_partial_reuse,
            deterministic=parameters.deterministic,
        )
        self._llm = LLM(
            parameters.gpt_model_path,
            tokenizer=parameters.tokenizer_dir,
            kv_cache_config=kv_cache,
            max_queue_size=parameters.max_queue_size,
            verify=parameters.verify_engine,
            parallel_config=ParallelConfig(ranks=parameters.ranks, step_timeout=parameters.step_timeout),
            retry=parameters.retry,
        )
        self._metrics = MetricsReporter(pb_utils, names.TENSORRT_LLM, names.VERSION)
        self._jobs: dict[int, Job] = {}
        self._streams = 0
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="saw-serve", daemon=True)
        self._thread.start()
        self._submit(self._forever(self._watch()))
        self._submit(self._forever(self._report()))

    def execute(self, requests: list[Any]) -> None:
        """Begin the requests; the answers follow through their response senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(request, sender)
            except Exception as e:
                if not isinstance(e, SawError):
                    logger.exception("a request failed")
                self._send(sender, error_response(self._pb_utils, e), final=True)

    def finalize(self) -> None:
        """Cancel what is in flight, and release the engine."""
        self._closing = True
        self._llm.shutdown()
        self._submit(self._drain()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _submit(self, coroutine: Coroutine[Any, Any, None]) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _begin(self, request: Any, sender: Any) -> None:
        tensors = read_tensors(request, names.TENSORRT_LLM_MODEL)
        if "stop" in tensors and tensors["stop"].any():
            self._submit(self._stop(tensors, request.request_id()))
            self._send(sender, self._pb_utils.InferenceResponse([]), final=True)
            return
        generations = parse(tensors, self._parameters.exclude_input_in_output)
        if not self._parameters.decoupled_mode:
            _reject_several_responses(generations)
        parts: list[tuple[Generation, GenerationResult]] = []
        job = Job(secrets.randbits(64) or 1, request.request_id(), sender, parts, unfinished=len(generations))
        try:
            for g in generations:
                prompt = {"prompt_token_ids": g.prompt, "cache_salt": g.cache_salt}
                parts.append((g, self._llm.generate_async(prompt, g.params, streaming=g.streaming)))
        except Exception:
            job.abort()
            raise
        self._submit(self._serve(job))

    async def _serve(self, job: Job) -> None:
        self._jobs[job.key] = job
        try:
            await asyncio.gather(*(self._serve_part(job, i) for i in range(len(job.parts))))
        except Exception as e:
            if not isinstance(e, SawError):
                logger.exception("a request failed")
            job.abort()
            await asyncio.sleep(_ERROR_DELAY)
            self._close(job, error_response(self._pb_utils, e))
        finally:
            del self._jobs[job.key]

    async def _serve_part(self, job: Job, index: int) -> None:
        generation, result = job.parts[index]
        self._streams += generation.streaming
        try:
            await self._serve_pieces(job, index, generation.streaming, result)
        finally:
            self._streams -= generation.streaming

    async def _serve_pieces(self, job: Job, index: int, streaming: bool, result: GenerationResult) -> None:
        async for output in result:
            if streaming:
                output = result.join(output)
            if job.closed:  # another prompt of the request has failed
                return
            if output.outputs[0].finish_reason == "cancelled":
                self._check_cancelled(job)
            tensors = self._tensors(job, index, output)
            job.unfinished -= output.finished
            if self._parameters.decoupled_mode or len(job.parts) == 1:
                self._respond(job, tensors)
            else:
                job.rows[index] = tensors
                if not job.unfinished:
                    self._respond(job, stack([job.rows[i] for i in range(len(job.parts))]))
            if self._streams > 1 and not output.finished:
                await asyncio.sleep((self._streams - 1) / _RESPONSES_PER_S)

    def _check_cancelled(self, job: Job) -> None:
        """Say why a text ended early. One that another request has stopped is an answer as it is."""
        if self._closing:
            raise ShutdownError("the server is shutting down: send the request again later")
        if job.cancelled:
            raise RequestCancelledError("the request was cancelled")

    def _respond(self, job: Job, tensors: Tensors) -> None:
        response = self._pb_utils.InferenceResponse(to_triton(self._pb_utils, tensors))
        if job.unfinished:
            self._send(job.sender, response)
        else:
            self._close(job, response)

    def _tensors(self, job: Job, index: int, output: RequestOutput) -> Tensors:
        generation, _ = job.parts[index]
        now = time.monotonic()
        ask = generation.streaming and now - job.checked >= self._parameters.cancellation_check_period_ms / 1000
        if ask:
            job.checked = now
        tensors = answer(generation, output, self._llm.tokenizer, job.key if ask else 0)
        if len(job.parts) > 1 or generation.params.n > 1:
            tensors["batch_index"] = np.array([[index]], np.int32)
            tensors["sequence_index"] = np.array([[output.outputs[0].index]], np.int32)
        return tensors

    def _close(self, job: Job, response: Any) -> None:
        """Send a job's last response."""
        if not job.closed:
            job.closed = True
            self._send(job.sender, response, final=True)

    def _send(self, sender: Any, response: Any, final: bool = False) -> None:
        flags = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        sender.send(response, flags=flags)

    async def _stop(self, tensors: Tensors, request_id: str) -> None:
        key = int(tensors["request_key"].reshape(-1)[0]) if "request_key" in tensors else 0
        for job in list(self._jobs.values()):
            if job.key == key or (request_id and job.request_id == request_id):
                job.abort()

    async def _forever(self, background: Coroutine[Any, Any, None]) -> None:
        try:
            await background
        except Exception:  # else it would be lost with the task
            logger.exception("a background task of tensorrt_llm ended")

    async def _watch(self) -> None:
        """Abort requests whose clients have gone. It sees those sent to this model, not those of the ensemble."""
        period = self._parameters.cancellation_check_period_ms / 1000
        spent = 0.0
        while True:
            await asyncio.sleep(max(period, spent / _WATCH_SHARE))
            spent = 0.0
            for job in list(self._jobs.values()):
                start = time.monotonic()
                if not job.closed and job.sender.is_cancelled():
                    job.cancelled = True
                    job.abort()
                spent += time.monotonic() - start
                await asyncio.sleep(0)  # let pieces out between two questions

    async def _report(self) -> None:
        while True:
            self._metrics.update(self._llm.stats())
            await asyncio.sleep(self._parameters.stats_check_period_ms / 1000)

    async def _drain(self) -> None:
        """Wait until every request has its last response, and end the background tasks."""
        while self._jobs:
            await asyncio.sleep(0.01)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
