"""What every record of a benchmark has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, TypeVar

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


class Environment(RecordPart):
    """Where and how a run was made; None for what is unknown or was not used."""

    gpu: str | None = None
    cpu: str | None = None
    cores: int | None = None
    threads: int | None = None
    driver: str | None = None
    cuda: str | None = None
    """Of PyTorch, or of the runtime that CUDA for Python calls."""
    tensorrt: str | None = None
    python: str | None = None
    torch: str | None = None
    triton: str | None = None
    """OpenAI's, the compiler of kernels."""
    flashinfer: str | None = None
    official: str | None = None
    """SHA-256 over the official kernels' files."""
    saw_trtllm: str
    commit: str | None
    dirty: bool | None = None
    command: str
    date: str | None


class Record(RecordPart):
    """A run, as it is kept: JSON without what is empty.

    A class of its own for each command of ``python -m benchmarks``, whose name is the default of ``kind``.
    """

    kind: str
    schema_version: Literal[1] = SCHEMA_VERSION
    environment: Environment

    def save(self, path: Path) -> None:
        """Write JSON.

        Raises
        ------
        ConfigError
            If the file cannot be written.
        """
        check_writable(path)
        # What tells a record's kind is a default, too.
        kind = {"kind": self.kind, "schema_version": self.schema_version}
        filled = kind | self.model_dump(mode="json", exclude_defaults=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = json.dumps(filled, indent=1, ensure_ascii=False) + "\n"
            with replacing_file(path) as file:
                file.write(data.encode())
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
        writer = f"python -m benchmarks {cls.model_fields['kind'].default} --output writes"
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
