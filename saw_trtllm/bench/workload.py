"""The requests of a benchmark: read from a dataset, or made of random tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field, ValidationError, model_validator

from saw_trtllm.errors import ConfigError, first_error


class Job(NamedTuple):
    """A prompt, as text or token ids, and the tokens that are generated for it."""

    prompt: str | list[int]
    output_len: int


class _Line(BaseModel):
    """A line of a dataset in ``trtllm-bench``'s form; other keys, such as ``task_id``, are passed over."""

    prompt: str | None = None
    input_ids: list[int] | None = Field(None, min_length=1)
    output_tokens: int = Field(gt=0)

    @model_validator(mode="after")
    def _one_prompt(self) -> _Line:
        if (self.prompt is None) == (self.input_ids is None):
            raise ValueError("give one of prompt and input_ids")
        return self


def read_dataset(path: Path, num_requests: int | None) -> list[Job]:
    """The first ``num_requests`` lines of a JSONL file, or all of them.

    A line is ``{"prompt": TEXT, "output_tokens": N}`` or ``{"input_ids": [...], "output_tokens": N}``.

    Raises
    ------
    ConfigError
        If the file cannot be read, a line is of another form, or there are too few.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--dataset {path} cannot be read ({e}): give a JSONL file") from e
    jobs = list(_parse(path, lines))
    if not jobs or (num_requests or 0) > len(jobs):
        asked = "" if num_requests is None else f" and {num_requests} were asked for"
        raise ConfigError(f"--dataset {path} holds {len(jobs)} requests{asked}: give --num_requests up to that")
    return jobs[:num_requests]


def _parse(path: Path, lines: list[str]) -> Iterator[Job]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed = _Line.model_validate(json.loads(line))
        except ValidationError as e:
            raise ConfigError(f"--dataset {path}, line {number}: {first_error(e)}") from e
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"--dataset {path}, line {number} is not JSON ({e})") from e
        yield Job(parsed.input_ids or parsed.prompt or "", parsed.output_tokens)


def random_jobs(num_requests: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[Job]:
    """Prompts of random tokens, all different, so that none finds the blocks of another."""
    draw = random.Random(seed)
    return [Job(draw.choices(range(vocab_size), k=input_len), output_len) for _ in range(num_requests)]
