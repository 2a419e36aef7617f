"""The blocks that the host holds, and their copies to and from the GPU's pools."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate

import numpy as np

from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, Event, RegisteredBuffer, Stream, call, runtime
from saw_trtllm.errors import KernelError
from saw_trtllm.runtime.host_cache import BlockCopy

log = logging.getLogger(__name__)

#: Bytes that are pinned at a time. Other calls of CUDA wait meanwhile: on an H200's host up to 34 ms, and 474 for
#: 128 MiB that cudaMallocHost makes and pins.
PIECE = 32 << 20
#: Threads that make pages, at most: one makes 1 GiB a second there, and eight 6.7.
_MOST_THREADS = 8


class CopiesUnderWay:
    """Copies that a stream of their own makes."""

    def __init__(self, event: Event) -> None:
        self._event = event
        self._done = False

    def done(self) -> bool:
        """Whether all of them are made."""
        if not self._done and self._event.is_done():
            self._end()
        return self._done

    def wait(self) -> None:
        """Wait until they are."""
        if not self._done:
            self._event.synchronize()
            self._end()

    def _end(self) -> None:
        self._event.close()
        self._done = True


class HostPool:
    """Pinned memory for blocks, the parts of each pool one after the other.

    Threads make its pages and one more pins them, piece by piece, while the first steps run. Copies to the host and
    copies from it go at the same time, on a stream each.

    Parameters
    ----------
    pools : list of DeviceBuffer
    block_bytes : list of int
        Bytes of a block in each pool.
    num_blocks : int
        Blocks that the host is to hold.

    Attributes
    ----------
    num_ready : int
        Blocks that it can hold yet: those of the lowest indices.
    """

    def __init__(self, pools: list[DeviceBuffer], block_bytes: list[int], num_blocks: int) -> None:
        self.num_ready = 0
        self._to_host, self._from_host = Stream(), Stream()
        self._parts = list(zip(pools, accumulate(block_bytes, initial=0), block_bytes, strict=False))
        self._block_bytes = sum(block_bytes)
        self._per_piece = max(1, PIECE // self._block_bytes)
        self._pieces: list[RegisteredBuffer] = []
        self._closing = False
        device = call(runtime.cudaGetDevice)
        self._thread = threading.Thread(target=self._pin, args=(num_blocks, device), name="saw-pin", daemon=True)
        self._thread.start()

    def block(self, slot: int) -> np.ndarray:
        """A block's bytes: uint8, its part in each pool one after the other."""
        piece, place = divmod(slot, self._per_piece)
        return self._pieces[piece].array(np.uint8, (self._block_bytes,), place * self._block_bytes)

    def transfer(self, stores: Sequence[BlockCopy], loads: Sequence[BlockCopy], rows_copied: Event) -> CopiesUnderWay:
        """Begin to copy blocks to the host and from it, beside the steps.

        A block that is stored is final. One that is loaded into may be read by what the steps' stream has yet to do,
        rows that are copied out of it; so loads come after ``rows_copied``.
        """
        for block, slot in stores:
            address = self._address(slot)
            for pool, offset, nbytes in self._parts:
                self._to_host.download(address + offset, pool.address + block * nbytes, nbytes)
        if loads:
            self._from_host.wait_for(rows_copied)
        for block, slot in loads:
            address = self._address(slot)
            for pool, offset, nbytes in self._parts:
                self._from_host.upload(pool.address + block * nbytes, address + offset, nbytes)
        event = Event()
        if stores and loads:
            event.record(self._to_host)
            self._from_host.wait_for(event)
        event.record(self._from_host if loads else self._to_host)
        return CopiesUnderWay(event)

    def close(self) -> None:
        """Free it, once nothing is copied any more."""
        self._closing = True
        self._thread.join()
        for stream in (self._to_host, self._from_host):
            with suppress(KernelError):  # after a failure of the GPU; the memory is freed all the same
                stream.synchronize()
            stream.close()
        for piece in self._pieces:
            piece.close()

    def _address(self, slot: int) -> int:
        piece, place = divmod(slot, self._per_piece)
        return self._pieces[piece].address + place * self._block_bytes

    def _pin(self, num_blocks: int, device: int) -> None:
        starts = range(0, num_blocks, self._per_piece)
        counts = deque(min(self._per_piece, num_blocks - start) for start in starts)
        num_threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
        # An executor makes all that it was given before its interpreter exits: it is given no more than it works at.
        under_way: deque[tuple[int, Future[RegisteredBuffer]]] = deque()
        threads = ThreadPoolExecutor(num_threads, "saw-pages")
        try:
            call(runtime.cudaSetDevice, device)
            while (counts or under_way) and not self._closing:
                while counts and len(under_way) < 2 * num_threads:
                    count = counts.popleft()
                    under_way.append((count, threads.submit(RegisteredBuffer, count * self._block_bytes)))
                count, made = under_way.popleft()
                piece = made.result()
                piece.pin()
                self._pieces.append(piece)
                self.num_ready += count
        except (KernelError, OSError) as e:
            log.warning(
                "of host_cache_size only %d bytes can be pinned, which are used (%s): give it less",
                self.num_ready * self._block_bytes,
                e,
            )
        except RuntimeError as e:  # of the executor, when the interpreter exits
            log.info("of host_cache_size %d bytes are pinned: %s", self.num_ready * self._block_bytes, e)
        finally:
            threads.shutdown(cancel_futures=True)
