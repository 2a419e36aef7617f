"""Ports that nobody listens on."""

from __future__ import annotations

import random
import socket
from pathlib import Path

#: Each holds a name that no other process can take from here until this one ends.
_taken: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """As many different ones, which nobody gets before they are listened on.

    The kernel gives none of them away by itself while there are others outside of the range from which it takes those
    of connections and of listeners on port 0; and processes that call this tell each other which are theirs.
    """
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = list(range(10_000, 1 << 16))
    random.SystemRandom().shuffle(ports)  # whatever seed the callers have in common
    ports.sort(key=lambda port: not first <= port <= last)  # the last are taken first
    found: list[int] = []
    while len(found) < count:
        if _take(port := ports.pop()):
            found.append(port)
    return found


def _take(port: int) -> bool:
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0saw_port_{port}")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
    except OSError:
        name.close()
        return False
    _taken.append(name)
    return True
