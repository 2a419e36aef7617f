"""The blocks that the host holds, and their copies to and from the GPU's pools."""

from __future__ import annotations

from collections.abc import Sequence

from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, Event, PinnedBuffer, Stream
from saw_trtllm.runtime.host_cache import BlockCopy


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
    """Pinned memory for blocks, as they lie in each pool.

    Parameters
    ----------
    pools : list of DeviceBuffer
    block_bytes : list of int
        Bytes of a block in each pool.
    num_blocks : int
        Blocks that the host holds.
    """

    def __init__(self, pools: list[DeviceBuffer], block_bytes: list[int], num_blocks: int) -> None:
        self._stream = Stream()
        self._pools = [
            (pool.address, PinnedBuffer(num_blocks * nbytes), nbytes)
            for pool, nbytes in zip(pools, block_bytes, strict=True)
        ]

    def transfer(self, stores: Sequence[BlockCopy], loads: Sequence[BlockCopy], steps: Stream) -> CopiesUnderWay:
        """Begin to copy blocks to the host and from it, beside the steps.

        A block that is stored is final. One that is loaded into may be read by what the stream of the steps has yet to
        do, rows that are copied out of it; so loads come after that.
        """
        for address, host, nbytes in self._pools:
            for block, slot in stores:
                self._stream.download(host.address + slot * nbytes, address + block * nbytes, nbytes)
        if loads:
            self._stream.wait_for(steps)
        for address, host, nbytes in self._pools:
            for block, slot in loads:
                self._stream.upload(address + block * nbytes, host.address + slot * nbytes, nbytes)
        event = Event()
        event.record(self._stream)
        return CopiesUnderWay(event)

    def close(self) -> None:
        """Free it, once nothing is copied any more."""
        self._stream.synchronize()
        self._stream.close()
        for _, host, _ in self._pools:
            host.close()
