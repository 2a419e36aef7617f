"""Copies between the GPU's pool and the host's: what they wait for, and what its end waits for."""

import subprocess
import sys
import threading

import pytest

from saw_trtllm.runtime.host_cache import BlockCopy
from tests.support.fakes import cuda as fake


@pytest.fixture
def machine(monkeypatch):
    return fake.install(monkeypatch)


def test_copies_wait_for_rows_that_are_copied_and_for_nothing_else(machine):
    """Neither for the step that is under way, nor those to the host for those from it."""
    from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, Event, Stream
    from saw_trtllm.backends.tensorrt.host_pool import HostPool

    pool, steps, rows_copied = DeviceBuffer(4 * 64), Stream(), Event()
    host = HostPool([pool], [64], 4)
    host._thread.join()
    blocks = machine.array(pool.address, "u1", (4, 64))
    blocks[:] = [[i] * 64 for i in range(4)]
    host.transfer([], [BlockCopy(3, 1)], rows_copied).wait()  # no step has copied rows yet

    done = []
    work = machine.streams[steps.handle]
    work.put(lambda: done.append("rows"))
    rows_copied.record(steps)
    work.put(lambda: done.append("step"))
    load = host.transfer([], [BlockCopy(1, 0)], rows_copied)
    host.transfer([BlockCopy(2, 0)], [], rows_copied).wait()
    assert done == []
    assert set(host.block(0)) == {2}
    assert set(blocks[1]) == {1}
    load.wait()
    assert done == ["rows"]
    assert set(blocks[1]) == {2}

    both = host.transfer([BlockCopy(1, 2)], [BlockCopy(0, 0)], rows_copied)
    both.wait()
    assert set(host.block(2)) == set(blocks[0]) == {2}
    host.close()
    for resource in (pool, steps, rows_copied):
        resource.close()
    assert machine.everything() == []


def test_memory_that_cannot_be_pinned_is_not_used(machine, caplog):
    from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer
    from saw_trtllm.backends.tensorrt.host_pool import HostPool

    machine.failing["cudaHostRegister"] = fake.cudaError_t.cudaErrorMemoryAllocation
    pool = DeviceBuffer(64)
    host = HostPool([pool], [64], 4)
    host._thread.join()
    assert host.num_ready == 0
    assert "of host_cache_size only 0 bytes can be pinned" in caplog.text
    host.close()
    pool.close()
    assert machine.everything() == []


def test_its_end_waits_for_the_piece_that_is_being_pinned_alone(machine, monkeypatch):
    from saw_trtllm.backends.tensorrt import host_pool
    from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer

    begun, go_on, pinned = threading.Event(), threading.Event(), []

    class Piece(host_pool.RegisteredBuffer):
        def pin(self):
            begun.set()
            go_on.wait()
            pinned.append(self)
            super().pin()

    monkeypatch.setattr(host_pool, "PIECE", 64)
    monkeypatch.setattr(host_pool, "RegisteredBuffer", Piece)
    pool = DeviceBuffer(64)
    host = host_pool.HostPool([pool], [64], 200)
    begun.wait()
    closing = threading.Thread(target=host.close)
    closing.start()
    while not host._closing:
        pass
    go_on.set()
    closing.join()
    assert len(pinned) == 1
    pool.close()
    assert machine.everything() == []


def test_an_exit_does_not_wait_for_all_pages():
    """An executor's threads make what it holds before any handler of the exit runs."""
    code = """
import atexit, pytest, time
from tests.support.fakes import cuda as fake
fake.install(pytest.MonkeyPatch())
from saw_trtllm.backends.tensorrt import host_pool
from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer
made = []
class Piece(host_pool.RegisteredBuffer):
    def __init__(self, nbytes):
        super().__init__(nbytes)
        made.append(self)
        time.sleep(0.01)
host_pool.PIECE, host_pool.RegisteredBuffer = 64, Piece
host = host_pool.HostPool([DeviceBuffer(64)], [64], 2000)
while not host.num_ready:
    time.sleep(0.001)
atexit.register(lambda: (host.close(), print(len(made))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000
    assert done.stderr == ""
