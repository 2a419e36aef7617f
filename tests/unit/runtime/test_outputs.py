"""A request's pieces: their two forms, who is woken by them, and how often."""

import asyncio
import copy
import dataclasses
import pickle
import threading

import numpy as np
import pytest

from saw_trtllm import SamplingParams
from saw_trtllm.errors import EngineError
from saw_trtllm.runtime.detokenizer import Detokenizer
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.output_queue import OutputQueue, whole_step
from saw_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from saw_trtllm.runtime.parts import Part
from saw_trtllm.runtime.request import Request
from saw_trtllm.runtime.sequence import Sequence


class Last:
    """A text's only piece."""

    def output(self):
        return RequestOutput(0, None, [1], [CompletionOutput("a", [2], "a", [2], "", "length")], finished=True)

    def part(self):
        return Part(0, "a", [2], "", "length", finished=True)


piece = Last()


def test_a_step_wakes_when_all_of_it_has_been_handed_out():
    """Who takes the first piece while the others come has a message for each."""
    queues, woken = [OutputQueue(), OutputQueue()], []
    for i, queue in enumerate(queues):
        queue.wakers.append(lambda i=i: woken.append((i, [len(q.pieces) for q in queues])))
    with whole_step():
        for queue in queues:
            queue.put(piece)
        assert woken == []
    assert woken == [(0, [1, 1]), (1, [1, 1])]
    queues[0].put(piece)
    assert woken[2:] == [(0, [2, 1])]


def test_a_loop_is_called_once_for_all_that_comes_before_its_turn():
    queues = [OutputQueue() for _ in range(5)]
    results = [GenerationResult(i, queue, lambda: None) for i, queue in enumerate(queues)]

    def put():
        for queue in queues:
            queue.put(piece)

    async def run():
        loop, calls = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), call(*args))
        waiting = [asyncio.ensure_future(result.aresult()) for result in results]
        await asyncio.sleep(0)  # until they wait
        thread = threading.Thread(target=put)
        thread.start()
        thread.join()  # and the loop has no turn meanwhile
        outputs = await asyncio.wait_for(asyncio.gather(*waiting), 30)
        return len(calls), [output.finished for output in outputs]

    assert asyncio.run(run()) == (1, [True] * 5)
    # Another loop, after the first has been closed.
    queue = OutputQueue()

    async def again():
        threading.Timer(0.01, queue.put, [piece]).start()
        return (await GenerationResult(9, queue, lambda: None).aresult()).finished

    assert asyncio.run(again())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("end", ["length", "cancelled"])
def test_parts_are_what_is_new_in_the_outputs(streaming, end):
    """Servers take parts, whose cost does not grow with the text, and must answer what LLM does."""
    params = SamplingParams(
        max_tokens=4, logprobs=True, top_logprobs=1, return_generation_logits=True, return_context_logits=True
    )

    def result():
        outputs = OutputQueue()
        request = Request(Sequence(0, [5, 6], params), None, set(), Detokenizer(None), streaming, outputs)
        request.num_reused_tokens = 1
        logits = np.arange(10, dtype=np.float32).reshape(5, 2)
        request.keep_logits(logits[:1], 0, samples=False)
        for i in range(4 if end == "length" else 3):
            request.keep_logits(logits[i + 1 : i + 2], i + 1, samples=True)
            request.push(7 + i, -0.5 * i, [(i, -0.25)])
        if end == "cancelled":
            request.cancel()
        return GenerationResult(0, outputs, abort=lambda: None)

    outputs, parts = list(result()), result().take_parts()
    assert len(parts) == len(outputs) == (1 if not streaming else 4)
    for output, part in zip(outputs, parts, strict=True):
        piece = output.outputs[0]
        assert piece.cumulative_logprob == sum(piece.logprobs)
        new = slice(len(piece.token_ids) - len(piece.token_ids_diff), None)
        assert (piece.logprobs[new], piece.top_logprobs[new]) == (piece.logprobs_diff, piece.top_logprobs_diff)
        shown = (piece.index, piece.text_diff, piece.token_ids_diff, piece.leading_space, piece.finish_reason)
        counts = (output.finished, output.num_reused_tokens, piece.logprobs_diff, piece.cumulative_logprob)
        assert part[:9] == shown + counts
        np.testing.assert_array_equal(part.generation_logits, piece.generation_logits)
        assert (part.context_logits is None) == (output.context_logits is None) == (not part.finished)
    np.testing.assert_array_equal(parts[-1].context_logits, outputs[-1].context_logits)


class Counted(float):
    """A log-probability that counts how often one is added."""

    uses = 0

    def __add__(self, other):
        Counted.uses += 1
        return Counted(float(self) + float(other))

    __radd__ = __add__


@pytest.mark.parametrize("read", [GenerationResult.take_parts, list])
def test_the_sum_of_a_piece_costs_no_more_late_in_a_text(read, monkeypatch):
    monkeypatch.setattr(Counted, "uses", 0)
    params, outputs = SamplingParams(max_tokens=100, logprobs=True), OutputQueue()
    request = Request(Sequence(0, [5], params), None, set(), Detokenizer(None), True, outputs)
    for i in range(100):
        request.push(i, Counted(-0.125))
    last = read(GenerationResult(0, outputs, abort=lambda: None))[-1]
    assert getattr(last, "outputs", [last])[0].cumulative_logprob == -12.5
    assert Counted.uses == 100


def test_pieces_that_are_joined_have_all_that_is_new():
    params, outputs = SamplingParams(max_tokens=4, logprobs=True, top_logprobs=1), OutputQueue()
    request = Request(Sequence(0, [5], params), None, set(), Detokenizer(None), True, outputs)
    for i in range(4):
        request.push(7 + i, -0.5 * i, [(i, -0.25)])
    result = GenerationResult(0, outputs, abort=lambda: None)
    next(iter(result))
    joined = result.join(next(iter(result))).outputs[0]
    assert (joined.token_ids_diff, joined.logprobs_diff) == ([8, 9, 10], [-0.5, -1.0, -1.5])
    assert joined.top_logprobs_diff == joined.top_logprobs[1:] == [[(i, -0.25)] for i in (1, 2, 3)]


def test_the_last_part_of_several_texts_ends_them_and_an_error_ends_all():
    queue, aborted = OutputQueue(), []
    result = GenerationResult(0, queue, lambda: aborted.append(True), n=2)
    queue.put(piece)
    queue.put(piece)
    assert [part.finished for part in result.take_parts()] == [False, True]
    queue = OutputQueue()
    result = GenerationResult(0, queue, lambda: aborted.append(True), n=2)
    error = EngineError("it has failed")
    for each in (piece, error, piece):
        queue.put(each)
    assert not aborted
    first, last = result.take_parts()
    assert (first.finished, last, aborted) == (False, error, [True])
    assert result.take_parts() == []


def test_a_streamed_piece_is_as_it_was_and_like_any_other():
    """It is put together when it is asked, after which its request may have gone on."""
    texts, tokens, logprobs = ["a", "b"], [1, 2], [-0.5, -0.25]
    new = {"text_diff": "b", "token_ids_diff": [2], "leading_space": "", "logprobs_diff": [-0.25]}
    whole = CompletionOutput("ab", [1, 2], logprobs=[-0.5, -0.25], **new)
    of_tokens = {"token_ids": tokens, "logprobs": logprobs}
    made = [CompletionOutput.streamed(texts, 2, of_tokens, 2, **new) for _ in range(6)]
    texts.append("c")
    tokens.append(3)
    logprobs.append(-1.0)
    assert (made[0].text, made[0].token_ids, made[0].logprobs) == ("ab", [1, 2], [-0.5, -0.25])
    assert made[0].token_ids is made[0].token_ids is not tokens
    assert made[1] == whole
    assert repr(made[1]) == repr(whole)
    assert pickle.loads(pickle.dumps(made[2])) == whole
    assert dataclasses.replace(made[3], index=1) == dataclasses.replace(whole, index=1)
    assert {"text", "token_ids"} <= set(dir(made[4]))
    assert copy.deepcopy(made[4]) == whole
    assert dataclasses.asdict(made[5]) == dataclasses.asdict(whole)
    with pytest.raises(AttributeError, match="no attribute 'txt'"):
        made[0].txt  # noqa: B018
