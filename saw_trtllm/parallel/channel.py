"""The way between the leader and its ranks: numbered messages, in order and to every rank alike.

Each rank has two connections. Steps and what they give go over one. Nothing goes over the other: it ends with the
process at its other end, which both sides watch.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from typing import Any, Literal, NamedTuple, get_args

from saw_trtllm.errors import RankError

_HEAD = struct.Struct("!QB")
_LENGTH = struct.Struct("!I")
Command = Literal["open", "launch", "take", "transfer", "wait", "close"]
#: Seconds in which a process that connects must say who it is.
_ARRIVAL_TIME = 5.0
_COMMANDS: tuple[Command, ...] = get_args(Command)


class Address(NamedTuple):
    """Where a rank finds its leader, and the key that they know each other by.

    The key is of one start of a group: a process of an earlier one cannot connect.
    """

    endpoint: str | tuple[str, int]
    key: bytes


class Message(NamedTuple):
    """What the leader sends to all ranks."""

    number: int
    command: Command
    frames: Sequence[bytes]


class LeaderChannel:
    """The leader's end.

    Parameters
    ----------
    size : int
        Ranks.
    host : str, optional
        This machine's address in the network of the ranks; None where all of them are on this machine.
    """

    def __init__(self, size: int, host: str | None = None) -> None:
        self._size = size
        self._folder = None if host else tempfile.mkdtemp(prefix="saw-")
        self._key = secrets.token_bytes(32)
        if self._folder is None:
            self._listener = socket.create_server((host, 0), backlog=2 * size)
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"{self._folder}/ranks")
            self._listener.listen(2 * size)
        self.address = Address(self._listener.getsockname(), self._key)
        self._arrived: dict[tuple[str, int], Connection] = {}
        self._steps: list[Connection] = []
        self._number = 0

    def accept(self, timeout: float) -> bool:
        """Let in who knocks within so many seconds; whether all ranks have come."""
        self._listener.settimeout(timeout)
        with contextlib.suppress(TimeoutError, AuthenticationError, OSError, EOFError):  # or who knocked has gone
            knocking, _ = self._listener.accept()
            knocking.setblocking(True)
            connection = Connection(knocking.detach())
            _limit(connection, socket.SO_RCVTIMEO, _ARRIVAL_TIME)  # nobody who says nothing holds up the others
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            _send_at_once(connection)
            who = connection.recv()
            _limit(connection, socket.SO_RCVTIMEO, 0)
            self._arrived[who] = connection
        return len(self._arrived) == 2 * self._size

    def begin(self, send_timeout: float) -> list[Connection]:
        """Once all have come, let in nobody else. The connections that end with the ranks' processes.

        From then on a rank that takes nothing of a message for ``send_timeout`` seconds counts as lost.
        """
        self._listener.close()
        self._steps = [self._arrived["steps", rank] for rank in range(self._size)]
        for connection in self._steps:
            _limit(connection, socket.SO_SNDTIMEO, send_timeout)
        return [self._arrived["life", rank] for rank in range(self._size)]

    def send(self, command: Command, *frames: bytes) -> int:
        """Send a command to all ranks, and give its number.

        Raises
        ------
        RankError
            If a rank has gone, or has not read so much before that there is no room for more.
        """
        self._number += 1
        head = _HEAD.pack(self._number, _COMMANDS.index(command))
        message = b"".join((head, *(_LENGTH.pack(len(frame)) + frame for frame in frames)))
        for rank, connection in enumerate(self._steps):
            try:
                connection.send_bytes(message)
            except OSError as e:
                raise RankError(f"the process of rank {rank} has ended or hangs") from e
        return self._number

    def receive(self, timeout: float) -> list[tuple[int, int, Any]]:
        """What ranks say, within so many seconds: rank, number of the message that it answers, and the answer.

        Raises
        ------
        RankError
            If a rank has gone.
        """
        said = []
        for connection in wait(self._steps, timeout):
            rank = self._steps.index(connection)  # type: ignore[arg-type]
            try:
                number, content = pickle.loads(self._steps[rank].recv_bytes())
            except (EOFError, OSError) as e:
                raise _gone(rank) from e
            said.append((rank, number, content))
        return said

    def close(self) -> None:
        """Let go of it; ranks that still listen end."""
        self._listener.close()
        for connection in self._arrived.values():
            connection.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


class RankChannel:
    """A rank's end.

    Attributes
    ----------
    host : str
        This machine's address in the network of the ranks.
    """

    def __init__(self, address: Address, rank: int) -> None:
        self._steps = self._connect(address, "steps", rank)
        self._life = self._connect(address, "life", rank)
        with socket.socket(fileno=os.dup(self._steps.fileno())) as end:
            self.host: str = "127.0.0.1" if end.family == socket.AF_UNIX else end.getsockname()[0]
        self._number = 0

    def say(self, content: Any) -> None:
        """Answer the last message."""
        self._steps.send_bytes(pickle.dumps((self._number, content), 5))

    def receive(self) -> Message:
        """Wait for the next message.

        Raises
        ------
        EOFError
            If the leader has gone.
        RankError
            If it is not the one after the last.
        """
        message = memoryview(self._steps.recv_bytes())
        number, command = _HEAD.unpack_from(message)
        if number != self._number + 1:
            raise RankError(f"message {number} came after {self._number}")
        self._number = number
        frames, at = [], _HEAD.size
        while at < len(message):
            start = at + _LENGTH.size
            (length,) = _LENGTH.unpack_from(message, at)
            at = start + length
            frames.append(bytes(message[start:at]))
        return Message(number, _COMMANDS[command], frames)

    def end_with_leader(self) -> None:
        """End this process, whatever it does, when the leader's has ended."""

        def watch() -> None:
            with contextlib.suppress(EOFError, OSError):
                self._life.recv_bytes()
            os._exit(1)

        threading.Thread(target=watch, name="saw-leader", daemon=True).start()

    def close(self) -> None:
        """Let go of it."""
        self._steps.close()

    @staticmethod
    def _connect(address: Address, kind: str, rank: int) -> Connection:
        connection = Client(address.endpoint, authkey=address.key)
        _send_at_once(connection)
        connection.send((kind, rank))
        return connection


def _gone(rank: int) -> RankError:
    return RankError(f"the process of rank {rank} has ended")


def _send_at_once(connection: Connection) -> None:
    """Have TCP send small messages without waiting for answers to earlier ones."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        if end.family != socket.AF_UNIX:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _limit(connection: Connection, option: int, seconds: float) -> None:
    """Have reads or writes of a socket fail that get nowhere for so many seconds; 0 for no limit."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
