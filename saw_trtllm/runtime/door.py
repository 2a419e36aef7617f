"""Where the processes of one engine meet: sockets that whoever has the key is let in by, and nobody else."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import shutil
import socket
import struct
import tempfile
import time
from typing import NamedTuple

#: Seconds that a stranger may keep a door from the next who knocks.
PATIENCE = 5.0
_NONCE = 32
_WHO = struct.Struct("!BII")
_DIGEST = "sha256"


class Address(NamedTuple):
    """Where a door is, and the key to it.

    The key is of this door alone: a process of an earlier start cannot come in.
    """

    endpoint: str | tuple[str, int]
    key: bytes


class Who(NamedTuple):
    """What a process says of itself.

    Attributes
    ----------
    purpose : int
        Of the connection, in the words of those who meet.
    rank, size : int
    """

    purpose: int
    rank: int
    size: int


class Door:
    """A socket that listens.

    Parameters
    ----------
    host : str, optional
        Name or address of this machine, as the others reach it; None where all of them are on this machine.
    backlog : int
        How many may knock at once.

    Attributes
    ----------
    address : Address
        To be carried to the others, for :func:`knock`.

    Raises
    ------
    OSError
        If the machine has no such address.
    """

    def __init__(self, host: str | None = None, backlog: int = 64) -> None:
        self._folder = None if host else tempfile.mkdtemp(prefix="saw-")
        if self._folder is None:
            self._listener = socket.create_server((host, 0), backlog=backlog)
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"{self._folder}/door")
            self._listener.listen(backlog)
        endpoint = self._listener.getsockname()
        # A name is kept: what it stands for here may not be what the others reach.
        self.address = Address(endpoint if host is None else (host, endpoint[1]), secrets.token_bytes(32))

    def let_in(self, timeout: float) -> tuple[Who, socket.socket] | None:
        """The next who knocks within so many seconds, and its socket; None if nobody has, or a stranger."""
        self._listener.settimeout(timeout)
        try:
            peer, _ = self._listener.accept()
        except (TimeoutError, ConnectionError):  # nobody, or one who did not wait
            return None
        peer.settimeout(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        ours = secrets.token_bytes(_NONCE)
        with contextlib.suppress(OSError):
            peer.sendall(ours)
            said = exactly(peer, _WHO.size + _NONCE, deadline)
            proof = _proof(self.address.key, ours, said)
            if hmac.compare_digest(exactly(peer, len(proof), deadline), proof):
                peer.sendall(_proof(self.address.key, said, ours))
                return Who(*_WHO.unpack_from(said)), _ready(peer)
        peer.close()
        return None

    def close(self) -> None:
        """Let in nobody any more."""
        self._listener.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def knock(address: Address, who: Who, timeout: float) -> socket.socket:
    """A socket to those behind a door.

    Raises
    ------
    OSError
        If they are not there within ``timeout`` seconds, or have another key.
    """
    deadline = time.monotonic() + timeout
    if isinstance(address.endpoint, str):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(timeout)
    else:
        peer = socket.create_connection(address.endpoint, timeout)
    try:
        if isinstance(address.endpoint, str):
            peer.connect(address.endpoint)
        theirs = exactly(peer, _NONCE, deadline)
        said = _WHO.pack(*who) + secrets.token_bytes(_NONCE)
        peer.sendall(said + _proof(address.key, theirs, said))
        proof = _proof(address.key, said, theirs)
        if not hmac.compare_digest(exactly(peer, len(proof), deadline), proof):
            raise ConnectionRefusedError("it has another key")
    except BaseException:
        peer.close()
        raise
    return _ready(peer)


def fill(peer: socket.socket, target: memoryview, deadline: float | None = None) -> None:
    """Receive so many bytes.

    Raises
    ------
    OSError
        If the peer has gone, or has not sent all of them by ``deadline``, of :func:`time.monotonic`.
    """
    while len(target):
        if deadline is not None:  # a byte now and then gets no further time
            peer.settimeout(max(deadline - time.monotonic(), 1e-6))
        count = peer.recv_into(target)
        if count == 0:
            raise ConnectionResetError("it hung up")
        target = target[count:]


def exactly(peer: socket.socket, count: int, deadline: float | None = None) -> bytearray:
    """So many bytes; raises as :func:`fill`."""
    data = bytearray(count)
    fill(peer, memoryview(data), deadline)
    return data


def _proof(key: bytes, *parts: bytes | bytearray) -> bytes:
    """What shows that a process has the key, without sending it: of both sides' random numbers, in another order."""
    return hmac.digest(key, b"".join(parts), _DIGEST)


def _ready(peer: socket.socket) -> socket.socket:
    """The socket as calls need it: they wait for as long as a step takes, and small messages are sent at once."""
    peer.settimeout(None)
    if peer.family != socket.AF_UNIX:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer
