"""Where a server listens."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass

from saw_trtllm.errors import ConfigError


@dataclass(frozen=True)
class Ports:
    """Where a server listens."""

    host: str = "127.0.0.1"
    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    def check_numbers(self) -> None:
        """Reject ports that no machine has.

        Raises
        ------
        ConfigError
            If one is out of range or named twice.
        """
        ports = self._by_name()
        if len(set(ports.values())) < len(ports):
            raise ConfigError(
                f"grpc_port, http_port and metrics_port are {', '.join(map(str, ports.values()))}: they must differ"
            )
        for name, port in ports.items():
            if not 0 < port < 2**16:
                raise ConfigError(f"{name} is {port}: it must be from 1 to 65535")

    def check(self) -> None:
        """Reject ports that cannot be had here.

        Raises
        ------
        ConfigError
            If one is out of range, named twice or in use.
        """
        self.check_numbers()
        for name, port in self._by_name().items():
            try:
                with socket.socket() as s:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    s.bind((self.host, port))
            except OSError as e:
                raise ConfigError(
                    f"--{name} {port} cannot be used on {self.host} ({e.strerror}): choose another"
                ) from e

    def _by_name(self) -> dict[str, int]:
        return {"grpc_port": self.grpc, "http_port": self.http, "metrics_port": self.metrics}
