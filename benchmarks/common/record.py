"""What every record of a benchmark has."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from saw_trtllm.errors import ConfigError, first_error
from saw_trtllm.files import replacing_file
from saw_trtllm.paths import read_json

SCHEMA_VERSION = 1


R = TypeVar("R", bound="Record")


def check_writable(path: Path) -> None:
    """Whether a file may be written, without touching it: worth knowing before minutes on a GPU.

    Raises
    ------
    ConfigError
        If it may not.
    """
    # os.path's own answer where a folder may not be looked at is no; pathlib's is an exception.
    above = next(p for p in path.absolute().parents if os.path.exists(p))
    target = path if os.path.exists(path) else above
    if os.path.isdir(path) or not os.path.isdir(above) or not os.access(target, os.W_OK):
        raise ConfigError(f"{path} cannot be written: give a file in a folder of yours")


class RecordPart(BaseModel):
    """What a record is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Record(RecordPart):
    """A run, as it is kept: JSON on one line, without what is empty."""

    #: The command that writes it.
    command_name: ClassVar[str]

    schema_version: Literal[1] = SCHEMA_VERSION

    def save(self, path: Path) -> None:
        """Write JSON, compressed to a fifth if the name ends in ``.gz``.

        Raises
        ------
        ConfigError
            If the file cannot be written.
        """
        check_writable(path)
        # What tells a record's kind is a default, too.
        kind = {name: getattr(self, name) for name in ("kind", "schema_version") if name in type(self).model_fields}
        filled = kind | self.model_dump(mode="json", exclude_defaults=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = (json.dumps(filled, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
            with replacing_file(path) as file:
                file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        except OSError as e:
            raise ConfigError(f"{path} cannot be written ({e.strerror}): give a file in a folder of yours") from e

    @classmethod
    def parse(cls: type[R], raw: dict, path: Path) -> R:
        """Check what :func:`~saw_trtllm.paths.read_json` read from ``path``.

        Raises
        ------
        ConfigError
            If it is not a run's record.
        """
        writer = f"python -m benchmarks {cls.command_name} --output writes"
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"{path} has schema_version {raw.get('schema_version')}: this version reads {SCHEMA_VERSION}, as "
                f"{writer} it"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as e:
            raise ConfigError(f"{path} is not what {writer}: {first_error(e)}") from e

    @classmethod
    def load(cls: type[R], path: Path) -> R:
        """Read JSON; raises as :meth:`parse`."""
        return cls.parse(read_json(path), path)


class Environment(RecordPart):
    """Where and how a run was made; None for what is unknown or was not used."""

    gpu: str
    driver: str | None
    cuda: str | None
    python: str
    torch: str
    triton: str | None
    flashinfer: str | None
    official: str | None
    """SHA-256 over the official kernels' files."""
    saw_trtllm: str
    commit: str | None
    dirty: bool | None
    command: str
    date: str


class TargetResult(RecordPart):
    """A target and whether it was met; None where a contender is missing."""

    contender: str
    quantity: Literal["time", "share", "ratio", "speedup"]
    limit: float
    against: str | None = None
    value: float | None
    met: bool | None
