"""What the ranks of an engine say to each other on the host: sums and gathers of arrays, over sockets.

Of the reference it is the path of the data. On GPUs it only brings the ranks together: what a step sums goes from GPU
to GPU. Rank 0 stands in the middle: it takes every rank's array, adds them in the order of the ranks, and gives each
rank the same bytes, so that all of them have the same bits.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from saw_trtllm.errors import RankError

#: Before each array: its number among all that the group has sent, and its bytes.
_HEADER = struct.Struct("<QQ")
#: What a rank says of itself when it joins.
_RANK = struct.Struct("<II")
#: Bytes of the number that each rank's proof is for.
_NONCE = 32
#: Seconds that a stranger may keep rank 0 from the next who comes.
_PATIENCE = 5.0


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
        header, array = bytearray(_HEADER.size), np.empty_like(like)
        self._fill(peer, memoryview(header))
        number, nbytes = _HEADER.unpack(header)
        if (number, nbytes) != (self._number, array.nbytes):
            self.abort()
            raise RankError(
                f"rank {peer} of {self.size} is out of step with rank {self.rank}: it sent array {number} of {nbytes} "
                f"bytes where array {self._number} of {array.nbytes} was due; start all ranks anew"
            )
        self._fill(peer, _bytes_of(array))
        self._number += self.rank != 0
        return array

    def _fill(self, peer: int, target: memoryview) -> None:
        try:
            while len(target):
                count = self._peers[peer].recv_into(target)
                if count == 0:
                    raise ConnectionResetError
                target = target[count:]
        except OSError as e:
            raise self._lost(peer) from e

    def _lost(self, peer: int) -> RankError:
        aborted = self._aborted
        self.abort()  # the other ranks wait for this one
        if aborted:
            return RankError(f"the group of {self.size} ranks was ended: start all of them anew")
        return RankError(f"rank {peer} of {self.size} is not there any more: see its log, and start all ranks anew")


def local_group(size: int) -> list[Collectives]:
    """A group within this process, for a thread each."""
    if size == 1:
        return [ALONE]
    pairs = [socket.socketpair() for _ in range(size - 1)]
    others: list[Collectives] = [SocketCollectives(i + 1, size, [theirs]) for i, (_, theirs) in enumerate(pairs)]
    return [SocketCollectives(0, size, [ours for ours, _ in pairs]), *others]


class Rendezvous:
    """Where rank 0 waits for the others.

    Parameters
    ----------
    host : str
        Name or address of this machine, as the others reach it.

    Attributes
    ----------
    address : bytes
        To be carried to the others, for :func:`join`. It holds a key, without which nobody is let in.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        try:
            self._listener = socket.create_server((host, 0))
        except OSError as e:
            raise RankError(
                f"the ranks cannot meet at {host} ({e.strerror or e}): give an address of this machine"
            ) from e
        self._key = secrets.token_bytes(32)
        port = self._listener.getsockname()[1]
        self.address = json.dumps({"host": host, "port": port, "key": self._key.hex()}).encode()

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
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                missing = ", ".join(str(rank) for rank in range(1, size) if rank not in found)
                raise RankError(
                    f"of {size} ranks {missing} did not come within {timeout:g} s: see their logs"
                ) from None
            introduction = _let_in(peer, self._key)
            if introduction is None:
                peer.close()
                continue
            rank, theirs = introduction
            if theirs != size or not 0 < rank < size or rank in found:
                raise RankError(f"rank {rank} of {theirs} came, where one of {size} was due: start all ranks anew")
            found[rank] = peer
        return SocketCollectives(0, size, [_ready(found[rank]) for rank in sorted(found)])

    def close(self) -> None:
        """Wait for nobody any more."""
        self._listener.close()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def join(address: bytes, rank: int, size: int, timeout: float = 60.0) -> Collectives:
    """Rank ``rank``, from 1, of the group that meets at a :attr:`Rendezvous.address`.

    Raises
    ------
    RankError
        If rank 0 is not there within ``timeout`` seconds.
    """
    place = json.loads(address)
    host, port = place["host"], place["port"]
    try:
        peer = socket.create_connection((host, port), timeout)
        introduction = _RANK.pack(rank, size)
        peer.sendall(introduction + _proof(bytes.fromhex(place["key"]), _exactly(peer, _NONCE), introduction))
    except OSError as e:
        raise RankError(f"rank {rank} of {size} does not reach rank 0 at {host}:{port} ({e}): see its log") from e
    return SocketCollectives(rank, size, [_ready(peer)])


def _let_in(peer: socket.socket, key: bytes) -> tuple[int, int] | None:
    """The rank and the size that a peer gives, or None if it is a stranger."""
    peer.settimeout(_PATIENCE)
    nonce = secrets.token_bytes(_NONCE)
    try:
        peer.sendall(nonce)
        introduction = _exactly(peer, _RANK.size)
        proof = _exactly(peer, len(_proof(key, nonce, introduction)))
    except OSError:
        return None
    rank, size = _RANK.unpack(introduction)
    return (rank, size) if hmac.compare_digest(proof, _proof(key, nonce, introduction)) else None


def _proof(key: bytes, nonce: bytes, introduction: bytes) -> bytes:
    """What shows that a rank has the key, without sending it."""
    return hmac.digest(key, nonce + introduction, "sha256")


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = peer.recv(count - len(data))
        if not part:
            raise ConnectionResetError("it hung up")
        data += part
    return data


def _ready(peer: socket.socket) -> socket.socket:
    """The socket as the calls need it: they wait for as long as a step takes, and send at once."""
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
