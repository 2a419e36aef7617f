"""What a tritonserver logs: to a file, to stderr, and the cause of a failed start in it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import BinaryIO

from saw_trtllm.errors import ConfigError

#: Bytes at which what was already copied to stderr is cut off the file, so that no server fills a disk.
_MAX_BYTES = 64 << 20

#: What Triton complains about on a machine without a GPU, though nothing is missing.
_NO_GPU_COMPLAINTS = re.compile(
    r"CudaDriverHelper has not been|unable to create stream|initialize NVML|DCGM unable|pinned system memory"
)

#: Where the cause of a failed start stands, the best place first: what a model raised, what else kept one from loading
#: (an ensemble fails only because another has), what the server, the C++ runtime and the loader say.
_CAUSES = (
    r"failed to load '(?!ensemble')[^']*' version \d+: \w[\w ]*: (?:TritonModelException: )?(.*?)(?:\\n|\"?$)",
    r"failed to load '[^']*'[^:]*: (.*?)(?:\\n|\"?$)",
    r"failed to start (.*?)\"?$",
    r"^what\(\): *(.*)$",
    r"tritonserver: (unrecognized .*|.* requires an argument|option .*)$",
    r"error while loading shared libraries: .*$",
    r"^invalid argument .*$",
    r"^error: (.*)$",
)
#: The cause when Triton's Python backend has ended the server because one of its processes waited too long for another:
#: seen where models load beside so much other work that each step of a start takes seconds.
BUSY = "boost::interprocess::lock_exception"


class ServerLog:
    """A server's log.

    The server writes to a file, which holds it up less than a pipe, and which no orphaned process can keep open so that
    a reader waits forever.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ConfigError
        If it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._quiet_gpu = not Path("/dev/nvidiactl").exists()
        self._rest = b""
        try:
            path.write_bytes(b"")
            self._reader: BinaryIO = path.open("rb")
        except OSError as e:
            raise ConfigError(f"the log {path} cannot be written ({e.strerror}): give another --model_repo") from e

    def open(self) -> BinaryIO:
        """The file, for the server to write to; at its end, wherever that is by then."""
        return self.path.open("ab", buffering=0)

    def follow(self) -> None:
        """Copy what is new to stderr, whole lines only."""
        *lines, self._rest = (self._rest + self._reader.read()).split(b"\n")
        texts = [line.decode("utf-8", "replace") for line in lines]
        with contextlib.suppress(BrokenPipeError):  # whoever read it has seen enough, and the server goes on
            sys.stderr.writelines(
                f"{text}\n" for text in texts if not (self._quiet_gpu and _NO_GPU_COMPLAINTS.search(text))
            )
            sys.stderr.flush()
        if self._reader.tell() > _MAX_BYTES:
            os.truncate(self.path, 0)
            self._reader.seek(0)

    def close(self) -> None:
        """Stop following."""
        self._reader.close()

    def cause(self) -> str | None:
        """What a failed start comes from, in one sentence, if the log tells."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        for pattern in _CAUSES:
            for line in lines:
                if match := re.search(pattern, line.strip()):
                    return match[match.lastindex or 0].replace('\\"', '"')
        return None
