"""Who is woken by a step's pieces, and how often."""

import asyncio
import threading

from saw_trtllm.runtime.outputs import CompletionOutput, GenerationResult, OutputQueue, RequestOutput, whole_step


def piece():
    return RequestOutput(0, None, [1], [CompletionOutput("a", [2], "a", [2], "", "length")], finished=True)


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
