"""An executor that runs the reference's steps in a thread of its own, beside the engine's, as a GPU does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from saw_trtllm.backends.reference.executor import ReferenceExecutor
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.runtime.executor import StepOutput
from saw_trtllm.runtime.sampling import SamplingState


class AsyncExecutor:
    """Checks what it is asked for against the protocol.

    Attributes
    ----------
    gate : threading.Event
        Steps wait for it.
    num_ahead, num_late, num_unknown, num_rows : int
        Steps launched while another was under way, those of them whose draws came later, tokens that were not known
        then, and sequences computed.
    fail_in : str
        ``launch`` or ``result``: where a step with token ``fail_on`` among its known ones fails.
    """

    asynchronous = True

    def __init__(self, inner: ReferenceExecutor) -> None:
        self.num_blocks, self.num_host_blocks = inner.num_blocks, 0
        self.gate = threading.Event()
        self.gate.set()
        self.num_ahead = self.num_late = self.num_unknown = self.num_rows = 0
        self.fail_in, self.fail_on = "", 0
        self.is_shut_down = False
        self._inner = inner
        self._thread = ThreadPoolExecutor(1)
        self._under_way: list[Pending] = []
        self._tokens = np.empty(0, dtype=np.int32)
        self._last_size = 0

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> Pending:
        assert all(pending.drawn for pending in self._under_way), "a step is launched before the last one's draws"
        assert len(self._under_way) < 2, "a third step is launched before the first one's result is taken"
        fails = bool(self.fail_in) and self.fail_on in step.input_ids
        if fails and self.fail_in == "launch":
            raise RuntimeError("it would not start")
        unknown = step.input_ids < 0
        assert self._under_way or not unknown.any(), "a token is not known though no step is under way"
        assert (step.input_ids >= -self._last_size).all(), "a token of no sequence of the last step"
        assert self._under_way or sampling is not None, "draws are late though all tokens are known"
        self.num_ahead += len(self._under_way) > 0
        self.num_late += sampling is None
        self.num_unknown += int(unknown.sum())
        self.num_rows += len(context_logits)
        self._last_size = len(context_logits)
        pending = Pending(self)
        if sampling is not None:
            pending.draw(sampling)
        pending.computed = self._thread.submit(self._run, step, pending.draws, list(context_logits), fails)
        self._under_way.append(pending)
        return pending

    def shutdown(self) -> None:
        assert not self._under_way, "shut down while a step is under way"
        self.is_shut_down = True
        self._thread.shutdown()
        self._inner.shutdown()

    def _run(
        self,
        step: StepInputs,
        draws: Future[list[SamplingState | None]],
        context_logits: list[bool],
        fails: bool,
    ) -> StepOutput:
        assert self.gate.wait(60)
        sampling = draws.result(60)
        ids, unknown = step.input_ids.copy(), step.input_ids < 0
        ids[unknown] = self._tokens[-1 - ids[unknown]]
        if fails:
            self._tokens = np.zeros(len(sampling), dtype=np.int32)
            raise RuntimeError("a bit fell over")
        output = self._inner.execute(replace(step, input_ids=ids), sampling, context_logits)
        self._tokens = np.array(output.token_ids, dtype=np.int32)
        return output

    def taken(self, step: Pending) -> None:
        assert self._under_way.pop(0) is step, "results are taken out of order"


class Pending:
    def __init__(self, executor: AsyncExecutor) -> None:
        self._executor = executor
        self.draws: Future[list[SamplingState | None]] = Future()
        self.computed: Future[StepOutput] = Future()

    @property
    def drawn(self) -> bool:
        return self.draws.done()

    def draw(self, sampling: Sequence[SamplingState | None]) -> None:
        for state in sampling:
            known = state is None or state.draw == len(state.generated)
            assert known or not state.params.needs_last_token, "a draw depends on a token that is not known"
        frozen = [s and s._replace(generated=list(s.generated), number=s.draw) for s in sampling]
        self.draws.set_result(frozen)  # which fails where it has been

    def result(self) -> StepOutput:
        assert self.drawn, "the result of a step is taken whose draws nobody has said"
        try:
            return self.computed.result(60)
        finally:
            self._executor.taken(self)
