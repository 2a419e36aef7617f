"""Who comes first where threads take turns: what a test holds, no machine is too fast or too slow for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

from saw_trtllm import LLM, RequestOutput, SamplingParams


@contextmanager
def held_steps(llm: LLM, first: int = 0) -> Iterator[SimpleNamespace]:
    """Let the reference run so many steps; the next one waits for the end of the context, or for ``go_on``.

    Gives events: ``begun``, that a step waits; ``aborted``, that a request has been told to end; and ``go_on``.
    """
    core, executor, number = llm._core, llm._core._executor, count()
    execute, abort = executor.execute, core.abort
    events = SimpleNamespace(begun=threading.Event(), aborted=threading.Event(), go_on=threading.Event())

    def held(*step):
        if next(number) >= first:
            events.begun.set()
            assert events.go_on.wait(120)
        return execute(*step)

    def noticed(request_id):
        abort(request_id)
        events.aborted.set()

    executor.execute, core.abort = held, noticed
    try:
        yield events
    finally:
        events.go_on.set()
        executor.execute, core.abort = execute, abort


def generate_at_once(llm: LLM, prompts: Sequence, params: Sequence[SamplingParams]) -> list[RequestOutput]:
    """As :meth:`LLM.generate`, but that no request begins before all of them are queued."""
    with llm._core._changed:
        handles = [llm.generate_async(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    return [handle.result() for handle in handles]
