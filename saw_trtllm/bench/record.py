"""The record of a run: a JSON file that holds all that a table or a plot shows, and where it came from."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from saw_trtllm.bench.cases import Suite
from saw_trtllm.config import first_error, read_json
from saw_trtllm.errors import ConfigError
from saw_trtllm.files import replacing_file

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
        """Check what :func:`~saw_trtllm.config.read_json` read from ``path``.

        Raises
        ------
        ConfigError
            If it is not a run's record.
        """
        writer = f"saw-bench {cls.command_name} --output writes"
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


class Bandwidth(RecordPart):
    """What the card's memory gives, measured in the same run, in GB/s."""

    read_gbps: float
    copy_gbps: float
    """Read and written bytes together."""


class Measurement(RecordPart):
    """A contender's times in a case."""

    contender: str
    detail: str = ""
    """The variant that was best: a backend, a number of splits."""
    failed: dict[str, str] = {}
    """Variants that could not run, and why: the best is that of the others."""
    median_us: float
    p10_us: float
    p90_us: float
    repetitions: int
    cuda_graph: bool
    bytes: int
    """That must move, at least."""
    gbps: float
    share: float | None = None
    """Of the bandwidth that bounds the suite; None where arithmetic does."""
    tflops: float | None = None
    cosine: float | None = None
    """Between a sample of the output and fp32 attention on the unquantized keys and values."""


class TargetResult(RecordPart):
    """A target and whether it was met; None where a contender is missing."""

    contender: str
    quantity: Literal["time", "share", "ratio", "speedup"]
    limit: float
    against: str | None = None
    value: float | None
    met: bool | None


class CaseResult(RecordPart):
    """A case's measurements."""

    suite: Suite
    name: str
    batch: int
    tokens: int
    history: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    measurements: list[Measurement]
    missing: dict[str, str] = {}
    """Contenders that were not measured, and why."""
    targets: list[TargetResult]

    def find(self, contender: str) -> Measurement | None:
        """A contender's measurement, if there is one."""
        return next((m for m in self.measurements if m.contender == contender), None)


class Results(Record):
    """A run of the kernels' benchmark."""

    command_name: ClassVar[str] = "kernels"

    environment: Environment
    flush: str
    """What emptied the L2 before each run."""
    bandwidth: Bandwidth
    cases: list[CaseResult]
    aborted: str | None = None
    """What ended the run before its last case."""

    def suite(self, name: str) -> list[CaseResult]:
        """The cases of a suite."""
        return [case for case in self.cases if case.suite == name]
