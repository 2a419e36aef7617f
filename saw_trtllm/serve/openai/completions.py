"""``/v1/completions``: prompts to texts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from saw_trtllm.serve.openai.errors import ApiError, error_body
from saw_trtllm.serve.openai.logprobs import Place, completion_logprobs, prompt_places, text_places
from saw_trtllm.serve.openai.metrics import Meter
from saw_trtllm.serve.openai.model import ServedModel, finish_reason
from saw_trtllm.serve.openai.protocol import CompletionRequest
from saw_trtllm.serve.openai.sse import DONE, event
from saw_trtllm.serve.openai.usage import Usage

#: Prompts of one request.
_MAX_PROMPTS = 1024


@dataclass
class _Sent:
    """What has been sent of one text."""

    num_characters: int = 0
    begun: bool = False


class CompletionAnswer:
    """The texts of a request's prompts, which are being generated.

    Parameters
    ----------
    model : ServedModel
    request : CompletionRequest
    meter : Meter

    Raises
    ------
    SawError
        What is wrong with the request: nothing has begun then.
    """

    def __init__(self, model: ServedModel, request: CompletionRequest, meter: Meter) -> None:
        _check(request, model)
        self._model, self._request, self._meter = model, request, meter
        self._shown = request.n or 1
        drawn = max(self._shown, request.best_of or 1)
        self._usage = Usage(counts_texts=request.max_tokens != 0)
        self._sent: dict[tuple[int, int], _Sent] = {}
        params = model.sampling(
            request,
            n=drawn,
            max_tokens=16 if request.max_tokens is None else max(1, request.max_tokens),
            logprobs=request.logprobs is not None or drawn > self._shown,
            top_logprobs=request.logprobs or 0,
            return_context_logits=request.echo and request.logprobs is not None,
        )
        self.results: list[GenerationResult] = []
        try:
            for prompt in _prompts(request):
                self.results.append(model.begin(model.salted(prompt, request.cache_salt), params, request.stream))
        except BaseException:
            self.abort()
            raise
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    def abort(self) -> None:
        """End what has not ended."""
        for result in self.results:
            result.abort()

    async def whole(self) -> dict[str, Any]:
        """The texts when they are there."""
        choices = []
        try:
            for i, result in enumerate(self.results):
                output = await result.aresult()
                self._meter.piece(output)
                self._usage.take(output, i)
                for rank, completion in enumerate(self._best(output.outputs)):
                    choice = self._choice(i, output, completion)
                    choices.append({**choice, "index": i * self._shown + rank})
        finally:
            self.abort()
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The texts as they grow."""
        options = self._request.stream_options
        wants_usage = options is not None and options.include_usage
        extra = {"usage": None} if wants_usage else {}
        try:
            async for i, output in merged(self.results):
                self._meter.piece(output)
                self._usage.take(output, i)
                yield event({**self._head, "choices": [self._choice(i, output, output.outputs[0])], **extra})
            if wants_usage:
                yield event({**self._head, "choices": [], "usage": self._usage.body()})
        except Exception as e:
            if not self._usage.begun:
                raise
            yield event(error_body(e))
        finally:
            self.abort()
        yield DONE

    def _best(self, completions: list[CompletionOutput]) -> list[CompletionOutput]:
        """Those of the highest log-probability per token, if more were drawn than are shown."""
        if len(completions) == self._shown:
            return completions
        return sorted(completions, key=lambda c: -(c.cumulative_logprob or 0.0) / max(1, len(c.token_ids)))[
            : self._shown
        ]

    def _choice(self, prompt: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """What is new of a text."""
        request, sent = self._request, self._sent.setdefault((prompt, completion.index), _Sent())
        is_empty = request.max_tokens == 0
        text, reason = ("", "length") if is_empty else (completion.text_diff, finish_reason(completion))
        places: list[Place] = []
        wants = request.logprobs is not None
        if wants and not is_empty:
            places += text_places(completion)
        if request.echo and not sent.begun:
            text = self._prompt_text(output) + text
            if wants and output.context_logits is not None:
                places = prompt_places(output.prompt_token_ids, output.context_logits, request.logprobs or 0) + places
        logprobs = completion_logprobs(self._model, places, sent.num_characters) if wants else None
        sent.begun = True
        sent.num_characters += len(text)
        return {
            "index": prompt * self._shown + completion.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        tokenizer = self._model.llm.tokenizer
        return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False) if tokenizer else ""


def _check(request: CompletionRequest, model: ServedModel) -> None:
    """Reject what does not go together."""
    n = request.n or 1
    if request.best_of is not None and request.best_of < n:
        raise ApiError("invalid_value", f"best_of is {request.best_of} and n is {n}: give at least n", "best_of")
    if request.stream and (request.best_of or 1) > n:
        raise ApiError("invalid_value", "the best of several texts is known at their end: leave out stream", "best_of")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError("invalid_value", "max_tokens is 0, which needs echo: ask for at least 1", "max_tokens")
    if request.stream and request.echo and request.logprobs is not None:
        raise ApiError("invalid_value", "the prompt's logprobs come with the whole text: leave out stream", "echo")
    if request.echo and request.logprobs is not None and not model.llm.config.build_config.gather_context_logits:
        raise ApiError(
            "unsupported_parameter",
            "echo with logprobs needs an engine built with --gather_context_logits: leave out one of them",
            "echo",
        )


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    alone = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    prompts: Any = [prompt] if alone else prompt
    if not 0 < len(prompts) <= _MAX_PROMPTS:
        raise ApiError("invalid_value", f"{len(prompts)} prompts came: give 1 to {_MAX_PROMPTS}", "prompt")
    return prompts


async def merged(results: list[GenerationResult]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The pieces of several results as they come, each with its result's number."""
    if len(results) == 1:
        async for output in results[0]:
            yield 0, results[0].join(output)
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()

    async def read(i: int) -> None:
        try:
            async for output in results[i]:
                await queue.put((i, results[i].join(output)))
        except Exception as e:
            await queue.put((i, e))
        await queue.put((i, None))

    tasks = [asyncio.ensure_future(read(i)) for i in range(len(results))]
    try:
        left = len(results)
        while left:
            i, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield i, piece
    finally:
        for task in tasks:
            task.cancel()
