"""The scheduler over a model whose every row, and so every token, is a hash of all that it may see."""

import random
import subprocess
import sys
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from saw_trtllm.engine.step import DECODE, PREFILL
from saw_trtllm.engine.windows import most_blocks
from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.block_table import Content
from saw_trtllm.runtime.host_cache import HostCache
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.scheduler import Scheduler
from saw_trtllm.runtime.sequence import Sequence
from tests.support import ROOT

VOCAB = 5  # few, so that prompts share beginnings
QUANTIZED, FROM_THE_POOL = range(2)


class FakeModel:
    """A pool of numbers. A row is the hash of its token, its position and all rows that it sees through the table.

    For each table, whose window bounds what it sees, a layer takes the rows of the one below for its tokens.

    In a cache that is not exact, a row in the pool is another number than the same row within its own chunk, as a
    4-bit cache would have it. Only numbers are hashed, which gives the same in every process.
    """

    def __init__(self, exact, tokens_per_block, windows=(None,)):
        self.exact, self.tokens_per_block, self.windows = exact, tokens_per_block, windows
        self.pool = {}

    def stored(self, row):
        return row if self.exact else hash((QUANTIZED, row))

    def copy(self, copies):
        for source, target, rows in copies:
            self.pool.update({(target, i): self.pool[source, i] for i in range(rows)})

    def compute(self, inputs):
        tokens, start, end = list(inputs.token_ids), inputs.start, inputs.start + len(inputs.token_ids)
        for i, window in enumerate(self.windows):
            table = inputs.block_table[i :: len(self.windows)]
            slots = [(table[i // self.tokens_per_block], i % self.tokens_per_block) for i in range(end)]
            low = [0 if window is None else max(0, place - window + 1) for place in range(end)]
            seen = [None] * low[start] + [self.pool[slot] for slot in slots[low[start] : start]]
            for position, token in enumerate(tokens, start):
                row = hash((token, position, tuple(seen[low[position] :])))
                if inputs.kind == DECODE and not self.exact:
                    row = hash((FROM_THE_POOL, row))
                seen.append(row)
                self.pool[slots[position]] = self.stored(row)
            tokens = seen[start:]
        return tokens[-1] % VOCAB


class FakeHost:
    """Copies that are made some time after they were begun, in any order: what is read or written too early shows."""

    def __init__(self, model, rng, num_blocks):
        self.model, self.rng, self.under_way = model, rng, []
        self.host = np.zeros((num_blocks, model.tokens_per_block), np.int64)
        self.num_host_blocks, self._num_ready = num_blocks, 0

    @property
    def num_ready_host_blocks(self):
        self._num_ready = min(self._num_ready + 3, self.num_host_blocks)
        return self._num_ready

    def host_block(self, slot):
        return self.host[slot].view(np.uint8)

    def transfer(self, stores, loads):
        copies = FakeCopies(self, stores, loads, self.rng.randrange(4))
        self.under_way.append(copies)
        return copies


class FakeCopies:
    def __init__(self, transfers, stores, loads, delay):
        self.transfers, self.stores, self.loads, self.delay = transfers, stores, loads, delay

    def done(self):
        self.delay -= 1
        if self.delay < 0 and self in self.transfers.under_way:
            self.wait()
        return self.delay < 0

    def wait(self):
        self.delay = -1
        if self in self.transfers.under_way:
            self.transfers.under_way.remove(self)
            self.make()

    def make(self):
        pool, host = self.transfers.model.pool, self.transfers.host
        size = range(self.transfers.model.tokens_per_block)
        for block, slot in self.stores:
            host[slot] = [pool.get((block, i), -1) for i in size]  # of a tail some were never written
        pool.update({(block, i): int(host[slot, i]) for block, slot in self.loads for i in size})


class FakeDisk:
    """Files in memory, some of which cannot be read. What is begun is done some time later, in turn."""

    def __init__(self, rng):
        self.rng, self.files, self.bad, self.jobs = rng, {}, set(), deque()

    def holds(self, key):
        self.go_on(self.rng.randrange(2))
        return key in self.files and key not in self.bad

    def read(self, key, block):
        def read():
            if miss:
                self.bad.add(key)
                return None
            content, block[:] = self.files[key]
            return content

        miss = self.rng.random() < 0.02
        return self.submit(read)

    def write(self, content, block):
        def write():
            self.files[content.key] = content, block.copy()

        return self.submit(write)

    def wait(self, reads):
        while not any(read.done() for read in reads):
            self.go_on(1)

    def submit(self, job):
        future = Future()
        self.jobs.append((future, job))
        self.go_on(self.rng.randrange(3))
        return future

    def go_on(self, num_jobs):
        """The oldest are done; the one after them runs, so that it is too late to cancel it."""
        while self.jobs:
            future, job = self.jobs[0]
            if future.running() or future.set_running_or_notify_cancel():
                if num_jobs == 0:
                    return
                num_jobs -= 1
                future.set_result(job())
            self.jobs.popleft()


class Runtime:
    """Drives a scheduler step by step, and checks each."""

    def __init__(
        self,
        num_blocks=100,
        tokens_per_block=4,
        max_batch_size=8,
        max_num_tokens=40,
        prefill_chunk=8,
        exact=False,
        reuse=True,
        partial=True,
        host_slots=0,
        disk=False,
        ids=None,
        windows=(None,),
    ):
        multiple = 1 if exact else prefill_chunk
        self.blocks = BlockManager(num_blocks, tokens_per_block, reuse, partial, multiple, windows, prefill_chunk)
        self.model = FakeModel(exact, tokens_per_block, windows)
        self.host = None
        if host_slots and reuse:
            rng = random.Random(host_slots)
            self.host = HostCache(self.blocks, FakeHost(self.model, rng, host_slots), FakeDisk(rng) if disk else None)
        self.scheduler = Scheduler(self.blocks, max_batch_size, max_num_tokens, prefill_chunk, exact, self.host)
        self.limits = (max_batch_size, max_num_tokens, prefill_chunk)
        self.finished = {}
        self.ids = count() if ids is None else ids
        self.queued = []

    def add(self, prompt, max_tokens, **params):
        sequence = Sequence(next(self.ids), list(prompt), SamplingParams(max_tokens=max_tokens, **params))
        self.scheduler.check(sequence)
        self.scheduler.add(sequence)
        self.queued.append(sequence)
        return sequence

    @property
    def has_work(self):
        return self.scheduler.has_work

    def step(self):
        while True:
            running, preemptions = list(self.scheduler.running), self.scheduler.num_preemptions
            unfinished = [*running, *self.scheduler.waiting]
            step = self.scheduler.schedule()
            if step or self.host is None or not self.host.wait():
                break
        self.check(step, unfinished)
        if self.scheduler.num_preemptions > preemptions:
            assert all(s in running for s in self.scheduler.running), "a step that lacks blocks lets others in"
        self.model.copy(self.scheduler.copies)
        for scheduled in step:
            token = self.model.compute(scheduled)
            sequence = scheduled.sequence
            samples = scheduled.samples
            self.scheduler.advance([scheduled])
            if samples:
                sequence.generated.append(token)
                if len(sequence.generated) == sequence.params.max_tokens:
                    self.scheduler.remove(sequence)
                    self.finished[sequence.request_id] = sequence.generated
        self.blocks.check()
        return step

    def check(self, step, unfinished):
        max_batch_size, max_num_tokens, prefill_chunk = self.limits
        assert step, "nothing is computed though there is work"
        sequences = [s.sequence for s in step]
        assert len({s.request_id for s in sequences}) == len(sequences) <= max_batch_size
        assert sum(len(s.token_ids) for s in step) <= max_num_tokens
        kinds = [s.kind for s in step]
        assert kinds == sorted(kinds)
        oldest = next(s for s in self.queued if s in unfinished)
        fetching = self.host is not None and self.host.is_fetching(oldest.table)
        assert oldest in sequences or fetching, "the oldest request does not come on"
        for s in step:
            inputs, sequence = s, s.sequence
            end = inputs.start + len(inputs.token_ids)
            known = [*sequence.prompt, *sequence.generated]
            assert list(inputs.token_ids) == known[inputs.start : end]
            assert inputs.start == sequence.num_computed
            assert inputs.prompt_len == len(sequence.prompt)
            assert len(inputs.block_table) * self.blocks.tokens_per_block >= end * self.blocks.num_tables
            assert inputs.block_table is sequence.table.blocks, "a sequence of the step was preempted by it"
            if inputs.kind == DECODE:
                assert len(inputs.token_ids) == 1
                assert inputs.start >= len(sequence.prompt)
            else:
                whole = len(known) if self.model.exact else len(sequence.prompt)
                assert end == whole or end % prefill_chunk == 0
                assert len(inputs.token_ids) <= prefill_chunk

    def settle(self):
        while self.host is not None and self.host.wait():
            pass

    def run(self, limit=100_000):
        for _ in range(limit):
            if not self.scheduler.has_work:
                self.settle()
                return self.finished
            self.step()
        raise AssertionError("it does not end")


def alone(prompt, max_tokens, prefill_chunk=8, exact=False, windows=(None,)):
    """What a request gives with the whole machine for itself."""
    runtime = Runtime(500, prefill_chunk=prefill_chunk, exact=exact, reuse=False, windows=windows)
    runtime.add(prompt, max_tokens)
    return runtime.run()[0]


def test_it_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None;"
        "import tests.unit.runtime.test_scheduler as t; assert len(t.alone([1] * 20, 5)) == 5"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_fake_model_sees_chunks_and_blocks():
    """The oracle would notice a wrong chunk (when not exact), a wrong block and a wrong position."""
    prompt = [1, 2, 3, 4, 0] * 7
    assert alone(prompt, 20, 8) != alone(prompt, 20, 16)
    assert alone(prompt, 20, 8, exact=True) == alone(prompt, 20, 16, exact=True)
    for exact in (False, True):
        runtime = Runtime(exact=exact)
        sequence = runtime.add(prompt, 20)
        for _ in range(7):
            runtime.step()
        blocks = sequence.table.blocks
        blocks[0], blocks[1] = blocks[1], blocks[0]
        assert runtime.run()[0] != alone(prompt, 20, exact=exact)


# -- one property at a time


def test_decodes_first_then_begun_prefills_then_arrivals():
    runtime = Runtime(max_num_tokens=16, max_batch_size=8)
    a = runtime.add([1] * 4, 10)
    runtime.step()
    b, c, d = runtime.add([2] * 20, 3), runtime.add([3] * 20, 3), runtime.add([4] * 5, 3)
    # One token of a, eight of b; c's eight would make 17, and d must not overtake it.
    assert [(s.sequence, len(s.token_ids)) for s in runtime.step()] == [(b, 8), (a, 1)]
    assert [s.sequence for s in runtime.step()] == [b, a]
    # b's last four, and room for c now; d waits behind it.
    assert [(s.sequence, len(s.token_ids)) for s in runtime.step()] == [(b, 4), (c, 8), (a, 1)]
    assert d in runtime.scheduler.waiting
    runtime.run()


def test_a_chunk_that_does_not_fit_waits_whole():
    runtime = Runtime(max_num_tokens=15, max_batch_size=7, prefill_chunk=8)
    runtime.add([1] * 24, 1)
    runtime.add([2] * 24, 1)
    counts = [[len(s.token_ids) for s in runtime.step()] for _ in range(6)]
    assert counts == [[8]] * 6


def test_no_more_sequences_than_the_batch_holds():
    runtime = Runtime(max_batch_size=3)
    for i in range(7):
        runtime.add([i % VOCAB], 4)
    sizes = []
    while runtime.scheduler.has_work:
        sizes.append(len(runtime.step()))
    assert max(sizes) == 3
    assert sum(sizes) == 7 * 4


def test_requests_that_can_never_fit_are_rejected():
    runtime = Runtime(num_blocks=5, tokens_per_block=4)
    runtime.add([1] * 12, 8)
    with pytest.raises(RequestError, match="21 tokens, 6 blocks, and the KV cache has 5"):
        runtime.add([1] * 12, 9)
    assert len(runtime.run()[0]) == 8


def test_the_last_arrived_is_preempted_and_comes_back_first():
    runtime = Runtime(num_blocks=6, tokens_per_block=4, reuse=False)
    sequences = [runtime.add([i] * 4, 12) for i in range(3)]
    late = runtime.add([4] * 4, 1)
    running = []
    while runtime.scheduler.has_work:
        runtime.step()
        running.append([s.request_id for s in runtime.scheduler.running])
        if runtime.scheduler.num_preemptions == 1 and 2 in [s.request_id for s in runtime.scheduler.waiting]:
            assert runtime.scheduler.waiting[0] is sequences[2]
            assert late in runtime.scheduler.waiting
            assert (sequences[2].num_computed, sequences[2].table.blocks) == (0, [])
    assert runtime.scheduler.num_preemptions > 0
    assert all(r == sorted(r) for r in running)
    assert list(runtime.finished)[:2] == [0, 1]
    assert runtime.finished == {i: alone([i] * 4, 12) for i in range(3)} | {3: alone([4] * 4, 1)}


@pytest.mark.parametrize("num_blocks", [6, 7, 9])
def test_the_queue_gives_the_order_and_not_the_ids(num_blocks):
    """Two threads may queue in another order than they named their requests in."""
    runtime = Runtime(num_blocks=num_blocks, reuse=False, ids=count(3, -1))
    for i in range(4):
        runtime.add([i] * 4, 12)
    finished = runtime.run()
    assert runtime.scheduler.num_preemptions > 0
    assert next(iter(finished)) == 3
    assert finished == {3 - i: alone([i] * 4, 12) for i in range(4)}


def test_a_step_that_preempts_its_own_sequence_is_an_error(monkeypatch):
    """Two of its sequences would write to one block, and both would go on with wrong tokens."""
    runtime = Runtime(num_blocks=6, reuse=False)
    for i in range(3):
        runtime.add([i] * 4, 12)
    make_room = runtime.scheduler._make_room

    def preempt_the_first(part):
        runtime.scheduler._preempt(runtime.scheduler.running[0])
        return make_room(part)

    monkeypatch.setattr(runtime.scheduler, "_make_room", preempt_the_first)
    with pytest.raises(RuntimeError, match="request 0 was preempted by the step that it is part of"):
        runtime.run()


@pytest.mark.parametrize("exact", [False, True])
def test_a_preempted_sequence_replays_as_it_was_computed(exact):
    runtime = Runtime(num_blocks=9, tokens_per_block=4, prefill_chunk=8, exact=exact, reuse=False)
    runtime.add([0] * 6, 20)
    second = runtime.add([1] * 6, 20)
    while not runtime.scheduler.num_preemptions:
        runtime.step()
    generated = len(second.generated)
    assert generated > 2
    parts = []
    while second.num_computed < 6 + generated:
        parts += [s for s in runtime.step() if s.sequence is second]
    if exact:  # chunk by chunk, the generated tokens with the prompt
        ends = [p.start + len(p.token_ids) for p in parts]
        assert all(p.kind == PREFILL or len(p.token_ids) == 1 for p in parts)
        assert ends == [*range(8, 6 + generated, 8), 6 + generated]
    else:  # the prompt, then token by token
        assert [(p.kind, len(p.token_ids)) for p in parts] == [(PREFILL, 6)] + [(DECODE, 1)] * generated
    runtime.run()
    assert runtime.finished[1] == alone([1] * 6, 20, exact=exact)


def test_prefixes_are_reused_in_whole_chunks_of_an_inexact_cache():
    prompt = list(range(4)) * 6
    for exact, within, expected in ((False, True, 16), (True, False, 20), (True, True, 23)):
        runtime = Runtime(exact=exact, prefill_chunk=8, tokens_per_block=4, partial=within)
        runtime.add(prompt[:23], 2)
        runtime.run()
        second = runtime.add(prompt, 2)
        first_step = runtime.step()
        assert second.num_reused == expected
        assert first_step[0].start == expected
        assert runtime.run()[1] == alone(prompt, 2, exact=exact)


@pytest.mark.parametrize("num_blocks", [12, 14, 21, 30])
def test_what_the_pool_gives_up_comes_back_from_the_host(num_blocks):
    """Conversations that do not fit the pool together, turn by turn: none computes a token twice but its last.

    Not even where so many wait that what is held for the later ones must be let go of for the first.
    """
    runtime = Runtime(num_blocks=num_blocks, exact=True, host_slots=1000)
    prompts = [[i, i, 1, 2, 3] * 4 for i in range(20)]
    for turn in range(3):
        sequences = [runtime.add(prompt, 3) for prompt in prompts]
        runtime.run()
        for i, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            assert sequence.generated == alone(prompt, 3, exact=True)
            if turn:  # whole blocks are kept on the host
                assert sequence.num_reused >= (len(prompt) - 3) // 4 * 4
            prompts[i] = [*prompt, *sequence.generated, 4, turn]
    assert runtime.host.num_loaded > 20
    assert runtime.blocks.num_free == num_blocks


def test_a_block_that_is_being_read_from_the_disk_takes_no_second_place_on_the_host():
    runtime = Runtime(host_slots=4, disk=True)
    host, read = runtime.host, Future()
    content = Content(b"k" * 32, b"p" * 32, np.arange(4, dtype=np.int32))
    host._reads[content.key] = host._take_slot(), read
    assert not runtime.blocks.adopt(0, content)  # a sequence that computed it meanwhile lets go of it
    read.set_result(content)
    host.poll()
    assert (len(host._held), host._num_used, host._free_slots) == (1, 1, [])


def test_what_the_host_gives_up_comes_back_from_the_disk():
    runtime = Runtime(num_blocks=12, exact=True, host_slots=14, disk=True)
    disk, write = runtime.host._disk, runtime.host._disk.write

    def write_at_once(*block):
        write(*block)
        disk.go_on(len(disk.jobs))
        return Future()

    disk.write = write_at_once  # none is given up
    prompts = [[i, i, 1, 2, 3] * 4 for i in range(20)]
    possible = reused = 0
    for turn in range(3):
        sequences = [runtime.add(prompt, 3) for prompt in prompts]
        runtime.run()
        for i, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            assert sequence.generated == alone(prompt, 3, exact=True)
            prompts[i] = [*prompt, *sequence.generated, 4, turn]
            possible += (len(prompt) - 3) // 4 * 4 if turn else 0
            reused += sequence.num_reused
    assert runtime.host.num_evicted > 100
    assert reused > possible / 2  # some files cannot be read, nor what comes after them be used


@pytest.mark.parametrize("partial", [False, True])
def test_a_conversation_finds_its_own_text(partial):
    """The next turn's prompt is the last one with its answer: all of it that was computed is found again."""
    runtime, prompt = Runtime(exact=True, partial=partial), [1, 2, 3, 0] * 3
    for turn in range(4):
        first = runtime.add(prompt, 7)
        runtime.run()
        # The last token of an answer has been drawn, and never computed.
        computed = 0 if turn == 0 else len(prompt) - 2 - 1
        assert first.num_reused == (computed if partial else computed - computed % 4)
        assert first.generated == alone(prompt, 7, exact=True)
        prompt = [*prompt, *first.generated, 4, turn]


def test_a_salt_keeps_prompts_apart():
    runtime, prompt = Runtime(exact=True), [1, 2, 3, 0] * 4
    for salt, expected in (("", 0), ("a", 0), ("a", 15), ("b", 0), ("", 15)):
        sequence = Sequence(next(runtime.ids), list(prompt), SamplingParams(max_tokens=1), cache_salt=salt)
        runtime.scheduler.add(sequence)
        runtime.queued.append(sequence)
        runtime.run()
        assert sequence.num_reused == expected


def test_a_prompt_whose_logits_are_wanted_is_computed_whole():
    runtime = Runtime()
    for wants in (False, True, False):
        sequence = runtime.add([1, 2, 3, 4] * 5, 1, return_context_logits=wants)
        runtime.run()
        assert sequence.num_reused == (16 if sequence.request_id == 2 else 0)


def test_removed_at_any_time():
    runtime = Runtime(num_blocks=12)
    sequences = [runtime.add([i % VOCAB] * 9, 12) for i in range(6)]
    runtime.scheduler.remove(sequences[5])  # not begun
    runtime.step()
    runtime.scheduler.remove(sequences[0])  # in the middle of its prompt
    for _ in range(4):
        runtime.step()
    runtime.scheduler.remove(sequences[1])  # decoding
    runtime.scheduler.remove(sequences[1])  # already gone
    runtime.run()
    assert sorted(runtime.finished) == [2, 3, 4]
    assert runtime.blocks.num_free == 12


def test_sequences_of_one_step_may_end_and_share():
    """Twins that arrive together compute the same, and leave nothing behind."""
    runtime = Runtime()
    for _ in range(4):
        runtime.add([1, 2, 3] * 6, 5)
    runtime.run()
    assert set(map(tuple, runtime.finished.values())) == {tuple(alone([1, 2, 3] * 6, 5))}
    assert runtime.blocks.num_free == runtime.blocks.num_blocks


# -- random loads


LOADS = {
    "seed": st.integers(0, 2**32 - 1),
    "exact": st.booleans(),
    "reuse": st.booleans(),
    "partial": st.booleans(),
    "host_slots": st.sampled_from([0, 0, 3, 12, 100]),
    "disk": st.booleans(),
    "tokens_per_block": st.sampled_from([1, 2, 4, 8]),
    "chunk_blocks": st.integers(1, 4),
    "max_batch_size": st.integers(1, 9),
    "spare": st.integers(0, 30),
    "spare_blocks": st.integers(0, 20),
    "windows": st.sampled_from([(None,)] * 4 + [(3,), (11,), (None, 3), (6, None), (1, None, 9), (4, 4, 17)]),
}
many_loads = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check_random_load(make_runtime, load, cancelled_share, penalized_share=0.0, expected=lambda tokens: tokens):
    """Requests come and go at random; each that stays gives what it gives alone, as ``expected`` has it."""
    rng, longest = random.Random(load["seed"]), 40
    tokens_per_block, max_batch_size, exact = load["tokens_per_block"], load["max_batch_size"], load["exact"]
    chunk, windows = load["chunk_blocks"] * tokens_per_block, load["windows"]
    runtime = make_runtime(
        num_blocks=most_blocks(longest, windows, tokens_per_block, max(chunk, 2)) + load["spare_blocks"],
        tokens_per_block=tokens_per_block,
        max_batch_size=max_batch_size,
        max_num_tokens=max_batch_size + chunk + load["spare"],
        prefill_chunk=chunk,
        exact=exact,
        reuse=load["reuse"],
        partial=load["partial"],
        host_slots=load["host_slots"],
        disk=load["disk"],
        ids=iter(rng.sample(range(1000), 25)),
        windows=windows,
    )
    stem = [rng.randrange(VOCAB) for _ in range(30)]
    requests, cancelled = {}, set()
    for _ in range(rng.randint(1, 25)):
        prompt = stem[: rng.randint(0, 25)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 5))]
        max_tokens = rng.randint(1, longest - len(prompt))
        penalty = {"presence_penalty": 0.1} if rng.random() < penalized_share else {}
        sequence = runtime.add(prompt, max_tokens, **penalty)
        requests[sequence.request_id] = (prompt, max_tokens)
        for _ in range(rng.choice([0, 0, 1, 3, 10])):
            if runtime.has_work:
                runtime.step()
        if rng.random() < cancelled_share:
            victim = rng.choice([*runtime.scheduler.running, *runtime.scheduler.waiting, sequence])
            if victim.request_id not in runtime.finished:
                runtime.scheduler.remove(victim)
                cancelled.add(victim.request_id)
    finished = runtime.run()
    assert set(finished) == set(requests) - cancelled
    for request_id, tokens in finished.items():
        assert tokens == expected(alone(*requests[request_id], chunk, exact, windows))
    assert runtime.blocks.num_free == runtime.blocks.num_blocks


#: A sequence that needs the whole pool, and of which more is held than the whole chunks that it opens.
WHOLE_POOL = {"exact": False, "reuse": True, "partial": False, "host_slots": 3, "disk": False, "tokens_per_block": 4}
WHOLE_POOL |= {"chunk_blocks": 4, "max_batch_size": 1, "spare": 0, "spare_blocks": 0, "windows": (None,)}

#: A prefill for which a decode of its step gives way, and which must give way itself all the same.
NOT_ENOUGH = WHOLE_POOL | {"host_slots": 12, "tokens_per_block": 2, "chunk_blocks": 3, "max_batch_size": 2, "spare": 4}
NOT_ENOUGH |= {"spare_blocks": 7, "windows": (3,)}
#: One that has the pool for itself, while blocks that it was promised are on their way to the host.
PROMISED = NOT_ENOUGH | {"tokens_per_block": 1, "max_batch_size": 6, "spare": 5, "spare_blocks": 3}
PROMISED |= {"windows": (4, 4, 17)}


@many_loads
@given(**LOADS)
@example(seed=0, **WHOLE_POOL)
@example(seed=21387231, **NOT_ENOUGH)
@example(seed=1238808148, **PROMISED)
def test_everything_ends_as_it_would_alone(**load):
    check_random_load(Runtime, load, cancelled_share=0.1)


# -- a step ahead


class AheadRuntime(Runtime):
    """Schedules a step while the one before it is under way. A text ends at its stop token, too."""

    def __init__(self, stop, **options):
        super().__init__(**options)
        self.stop = stop
        self.under_way = []
        self.num_ahead = self.num_late = self.num_thrown_away = 0

    @property
    def has_work(self):
        return super().has_work or bool(self.under_way)

    def step(self):
        step, ahead, preemptions = [], bool(self.under_way), self.scheduler.num_preemptions
        if self.scheduler.has_work:
            step = self.scheduler.schedule()
            while not step and not ahead and self.host is not None and self.host.wait():
                step = self.scheduler.schedule()
        assert step or ahead or not self.scheduler.has_work, "nothing is computed though there is work"
        assert not ahead or self.scheduler.num_preemptions == preemptions
        if step:
            self.launch(step)
            self.num_ahead += ahead
        while len(self.under_way) > bool(step):
            self.finish(*self.under_way.pop(0))
        self.blocks.check()
        return step

    def launch(self, step):
        """Compute at once: later steps see what earlier ones wrote, as in one stream of a GPU."""
        last, last_tokens = self.under_way[0] if self.under_way else ([], [])
        written, held = [(p, self.written(p)) for p in last], self.blocks.held
        for scheduled in step:
            for part, blocks in written:
                other = part.sequence is not scheduled.sequence
                assert not (other and blocks & set(held(scheduled.sequence.table))), "a block is given away too early"
        depends = [p.sequence.needs_last_token and p.num_drawn > len(p.sequence.generated) for p in step if p.samples]
        assert self.scheduler.draws_late or not any(depends), "a draw does not wait for the token that it depends on"
        self.num_late += any(depends)
        self.scheduler.launched(step)
        self.model.copy(self.scheduler.copies)
        tokens = []
        for scheduled in step:
            known = [last_tokens[-1 - t] if t < 0 else t for t in scheduled.token_ids]
            tokens.append(self.model.compute(replace(scheduled, token_ids=known)))
        self.under_way.append((step, tokens))

    def written(self, part):
        size, tables = self.blocks.tokens_per_block, self.blocks.num_tables
        return set(part.block_table[part.start // size * tables : ((part.end - 1) // size + 1) * tables])

    def finish(self, step, tokens):
        for scheduled, token in zip(step, tokens, strict=True):
            sequence = scheduled.sequence
            if sequence not in self.scheduler.running:
                self.num_thrown_away += 1
                self.scheduler.done(scheduled)
                continue
            assert len(sequence.generated) == scheduled.num_drawn
            self.scheduler.advance([scheduled])
            if scheduled.samples:
                sequence.generated.append(token)
                if token == self.stop or len(sequence.generated) == sequence.params.max_tokens:
                    self.scheduler.remove(sequence)
                    self.finished[sequence.request_id] = sequence.generated

    def run(self, limit=100_000):
        finished = super().run(limit)
        self.step()
        self.settle()
        return finished


def cut(tokens, stop):
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_ahead_of_decodes(exact):
    runtime = AheadRuntime(stop=None, exact=exact)
    prompts = [[i] * (3 + 7 * i) for i in range(4)]
    for prompt in prompts:
        runtime.add(prompt, 12)
    assert runtime.run() == {i: alone(p, 12, exact=exact) for i, p in enumerate(prompts)}
    assert runtime.num_ahead > 12
    assert runtime.num_thrown_away == 0, "something is computed past max_tokens"


def test_what_a_removed_sequence_holds_is_freed_behind_its_step():
    runtime = AheadRuntime(stop=None, num_blocks=4)
    first, second = runtime.add([1] * 6, 8), runtime.add([2] * 3, 4)
    runtime.step()
    runtime.step()
    held = runtime.blocks.num_blocks - runtime.blocks.num_free
    runtime.scheduler.remove(first)
    assert runtime.blocks.num_blocks - runtime.blocks.num_free == held
    assert runtime.run() == {1: alone([2] * 3, 4)}
    assert runtime.num_thrown_away > 0
    assert (first.table.blocks, second.table.blocks) == ([], [])


@pytest.mark.parametrize(("params", "num_blocks"), [({"repetition_penalty": 1.5}, 100), ({}, 6)])
def test_preemptions_wait_for_the_step_under_way_and_penalties_with_their_draws(params, num_blocks):
    runtime = AheadRuntime(stop=None, num_blocks=num_blocks, reuse=False)
    for i in range(3):
        runtime.add([i] * 4, 12, **params)
    waited = []
    while runtime.scheduler.has_work:
        under_way = bool(runtime.under_way)
        waited.append(not runtime.step() and under_way and bool(runtime.scheduler.running))
        assert params or not runtime.scheduler.draws_late
    assert runtime.run() == {i: alone([i] * 4, 12) for i in range(3)}
    assert (any(waited), runtime.scheduler.num_preemptions > 0) == (not params, not params)
    assert runtime.num_late == (11 if params else 0), "each step but the prompts'"


@many_loads
@given(stop=st.sampled_from([None, 0]), **LOADS)
def test_a_step_ahead_everything_ends_as_it_would_alone(stop, **load):
    check_random_load(
        partial(AheadRuntime, stop), load, cancelled_share=0.2, penalized_share=0.1, expected=partial(cut, stop=stop)
    )
