"""What the ranks of an engine say to each other on the host: sums and gathers of arrays, over sockets.

Of the reference it is the path of the data. On GPUs it only brings the ranks together: what a step sums goes from GPU
to GPU. Rank 0 stands in the middle: it takes every rank's array, adds them in the order of the ranks, and gives each
rank the same bytes, so that all of them have the same bits.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from saw_trtllm.errors import RankError
from saw_trtllm.runtime.door import Address, Door, Who, exactly, fill, knock

#: Before each array: its number among all that the group has sent, and its bytes.
_HEADER = struct.Struct("<QQ")


class Collectives(Protocol):
    """The group of an engine's ranks, as one of them sees it.

    All ranks make the same calls in the same order, with arrays of one shape and dtype.

    Attributes
    ----------
    rank, size : int
    """

    rank: int
    size: int

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """The sum over all ranks, added in their order: the same bits on each.

        Raises
        ------
        RankError
            If a rank is not there any more, is out of step, or the group was aborted.
        """
        ...

    def all_gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's array, in their order. Raises as :meth:`all_reduce`."""
        ...

    def abort(self) -> None:
        """End the group, from any thread: who waits in a call, here or on another rank, gets a :class:`RankError`."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class _Alone:
    """The group of one."""

    rank, size = 0, 1

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        return array

    def all_gather(self, array: np.ndarray) -> list[np.ndarray]:
        return [array]

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


ALONE: Collectives = _Alone()


class SocketCollectives:
    """A group whose ranks are joined to rank 0 by a socket each; see :class:`Collectives`.

    Parameters
    ----------
    rank, size : int
    peers : sequence of socket
        Of rank 0, those to the others in their order; of another, the one to rank 0.
    """

    def __init__(self, rank: int, size: int, peers: Sequence[socket.socket]) -> None:
        self.rank, self.size = rank, size
        self._peers = dict(zip(range(1, size) if rank == 0 else [0], peers, strict=True))
        self._number = 0
        self._aborted = False

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """The sum over all ranks, on each."""
        array = np.asarray(array, order="C")
        if self.rank != 0:
            self._send(0, array)
            return self._receive(0, array)
        total = array.copy()
        for peer in self._peers:
            total += self._receive(peer, array)
        self._send_all(total)
        return total

    def all_gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's array, on each."""
        array = np.asarray(array, order="C")
        if self.rank != 0:
            self._send(0, array)
            return list(self._receive(0, np.empty((self.size, *array.shape), array.dtype)))
        parts = np.stack([array, *(self._receive(peer, array) for peer in self._peers)])
        self._send_all(parts)
        return list(parts)

    def abort(self) -> None:
        """End the group, from any thread."""
        self._aborted = True
        for peer in self._peers.values():
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:  # it is closed already
                continue

    def close(self) -> None:
        """Leave the group."""
        for peer in self._peers.values():
            peer.close()

    def _send_all(self, array: np.ndarray) -> None:
        for peer in self._peers:
            self._send(peer, array)
        self._number += 1

    def _send(self, peer: int, array: np.ndarray) -> None:
        try:
            self._peers[peer].sendall(_HEADER.pack(self._number, array.nbytes))
            self._peers[peer].sendall(_bytes_of(array))
        except OSError as e:
            raise self._lost(peer) from e

    def _receive(self, peer: int, like: np.ndarray) -> np.ndarray:
        array = np.empty_like(like)
        try:
            number, nbytes = _HEADER.unpack(exactly(self._peers[peer], _HEADER.size))
        except OSError as e:
            raise self._lost(peer) from e
        if (number, nbytes) != (self._number, array.nbytes):
            self.abort()
            raise RankError(
                f"rank {peer} of {self.size} is out of step with rank {self.rank}: it sent array {number} of {nbytes} "
                f"bytes where array {self._number} of {array.nbytes} was due; start all ranks anew"
            )
        try:
            fill(self._peers[peer], _bytes_of(array))
        except OSError as e:
            raise self._lost(peer) from e
        self._number += self.rank != 0
        return array

    def _lost(self, peer: int) -> RankError:
        aborted = self._aborted
        self.abort()  # the other ranks wait for this one
        if aborted:
            return RankError(f"the group of {self.size} ranks was ended: start all of them anew")
        return RankError(f"rank {peer} of {self.size} is not there any more: see its log, and start all ranks anew")


class Rendezvous:
    """Where rank 0 waits for the others.

    Parameters
    ----------
    host : str
        Name or address of this machine, as the others reach it.

    Attributes
    ----------
    address : Address
        To be carried to the others, for :func:`join`. It holds a key, without which nobody is let in.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        try:
            self._door = Door(host)
        except OSError as e:
            raise RankError(
                f"the ranks cannot meet at {host} ({e.strerror or e}): give an address of this machine"
            ) from e
        self.address = self._door.address

    def wait(self, size: int, timeout: float = 60.0) -> Collectives:
        """Rank 0 of a group of ``size``, once all others have joined.

        Raises
        ------
        RankError
            If they have not within ``timeout`` seconds.
        """
        if size == 1:
            return ALONE
        deadline, found = time.monotonic() + timeout, dict[int, socket.socket]()
        while len(found) < size - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = ", ".join(str(rank) for rank in range(1, size) if rank not in found)
                raise RankError(f"of {size} ranks {missing} did not come within {timeout:g} s: see their logs")
            if (came := self._door.let_in(left)) is None:
                continue
            (_, rank, theirs), peer = came
            if theirs != size or not 0 < rank < size or rank in found:
                raise RankError(f"rank {rank} of {theirs} came, where one of {size} was due: start all ranks anew")
            found[rank] = peer
        return SocketCollectives(0, size, [found[rank] for rank in sorted(found)])

    def close(self) -> None:
        """Wait for nobody any more."""
        self._door.close()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def join(address: Address, rank: int, size: int, timeout: float = 60.0) -> Collectives:
    """Rank ``rank``, from 1, of the group that meets at a :attr:`Rendezvous.address`.

    Raises
    ------
    RankError
        If rank 0 is not there within ``timeout`` seconds.
    """
    try:
        peer = knock(address, Who(0, rank, size), timeout)
    except OSError as e:
        place = ":".join(map(str, address.endpoint))
        raise RankError(f"rank {rank} of {size} does not reach rank 0 at {place} ({e}): see its log") from e
    return SocketCollectives(rank, size, [peer])


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
