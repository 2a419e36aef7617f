"""The requests of a benchmark: read from a dataset, or made of random tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, model_validator

from saw_trtllm.errors import ConfigError, first_error

#: Tokens that one of a Mooncake trace's ``hash_ids`` stands for.
MOONCAKE_BLOCK = 512


class Turn(NamedTuple):
    """What is said in a turn, and how many tokens answer it.

    Attributes
    ----------
    prompt : str or list of int
        What is new: it comes after all that was said before.
    output_len : int
    delay : float
        Seconds from the last answer to this turn; of the first turn, from the start of the load.
    """

    prompt: str | list[int]
    output_len: int
    delay: float = 0.0


#: Its turns, each of which waits for the answer to the one before. A single request is a conversation of one turn.
Conversation = list[Turn]


class _Request(BaseModel):
    """A line in ``trtllm-bench``'s form; other keys, such as ``task_id``, are passed over."""

    prompt: str | None = None
    input_ids: list[int] | None = Field(None, min_length=1)
    output_tokens: PositiveInt

    @model_validator(mode="after")
    def _one_prompt(self) -> _Request:
        if (self.prompt is None) == (self.input_ids is None):
            raise ValueError("give one of prompt and input_ids")
        return self

    def conversation(self, *_: object) -> Conversation:
        return [Turn(self.input_ids or self.prompt or "", self.output_tokens)]


class _Mooncake(BaseModel):
    """A line of a trace in Mooncake's form: equal ids at the beginning are equal blocks of 512 tokens."""

    timestamp: FiniteFloat = Field(ge=0)
    input_length: PositiveInt
    output_length: PositiveInt
    hash_ids: list[int]

    @model_validator(mode="after")
    def _all_tokens(self) -> _Mooncake:
        if len(self.hash_ids) * MOONCAKE_BLOCK < self.input_length:
            raise ValueError(f"{len(self.hash_ids)} hash_ids of 512 tokens do not cover {self.input_length} tokens")
        return self

    def conversation(self, vocab_size: int, _: object) -> Conversation:
        blocks = (random.Random(i).choices(range(vocab_size), k=MOONCAKE_BLOCK) for i in self.hash_ids)
        tokens = [token for block in blocks for token in block]
        return [Turn(tokens[: self.input_length], self.output_length, self.timestamp / 1000)]


class _Said(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    by: str = Field(alias="from")
    value: str


class _ShareGPT(BaseModel):
    """A conversation in ShareGPT's form: an answer is as long as the one that was given."""

    conversations: list[_Said]

    def conversation(self, _: object, encode: Callable[[str], list[int]]) -> Conversation:
        turns, said = [], ""
        for part in self.conversations:
            if part.by in ("gpt", "assistant", "chatgpt"):
                length = len(encode(part.value))
                if said and length:
                    turns.append(Turn(said, length))
                said = ""
            else:
                said += part.value
        return turns


def read_dataset(
    path: Path, num_requests: int | None, vocab_size: int, encode: Callable[[str], list[int]]
) -> list[Conversation]:
    """The first ``num_requests`` conversations of a file, or all of them.

    A line of JSONL is ``{"prompt": TEXT, "output_tokens": N}``, ``{"input_ids": [...], "output_tokens": N}``, or
    Mooncake's ``{"timestamp": MS, "input_length": N, "output_length": N, "hash_ids": [...]}``, or one of ShareGPT's
    ``{"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}``, of which a JSON file
    is a list.

    Parameters
    ----------
    path : Path
    num_requests : int, optional
    vocab_size : int
        Tokens are drawn from these where the file has none.
    encode : callable
        Text to token ids.

    Raises
    ------
    ConfigError
        If the file cannot be read, a line is of another form, or there are too few.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--dataset {path} cannot be read ({e}): give a JSONL file, or ShareGPT's JSON") from e
    found = [parsed.conversation(vocab_size, encode) for parsed in _parse(path, text)]
    found = [conversation for conversation in found if conversation]
    if not found or (num_requests or 0) > len(found):
        asked = "" if num_requests is None else f" and {num_requests} were asked for"
        raise ConfigError(f"--dataset {path} holds {len(found)} requests{asked}: give --num_requests up to that")
    return found[:num_requests]


def _parse(path: Path, text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_loads(path, "", text), 1):
            yield _validate(path, f"entry {number}", _ShareGPT, entry)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            entry = _loads(path, f", line {number}", line)
            yield _validate(path, f"line {number}", _kind(entry), entry)


def _kind(entry: object) -> type[BaseModel]:
    keys = entry if isinstance(entry, dict) else {}
    return _Mooncake if "hash_ids" in keys else _ShareGPT if "conversations" in keys else _Request


def _loads(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"--dataset {path}{place} is not JSON ({e})") from e


def _validate(path: Path, place: str, kind: type[BaseModel], entry: object) -> Any:
    try:
        return kind.model_validate(entry)
    except ValidationError as e:
        raise ConfigError(f"--dataset {path}, {place}: {first_error(e)}") from e


def random_conversations(
    count: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    seed: int,
    turns: int = 1,
    turn_len: int = 0,
    system_len: int = 0,
    think_time: float = 0.0,
) -> list[Conversation]:
    """Conversations of random tokens, all different but for a beginning that they share.

    Parameters
    ----------
    count : int
    input_len, output_len : int
        Tokens of the first turn without the shared ones, and of each answer.
    vocab_size, seed : int
    turns : int
    turn_len : int
        Tokens of each further turn.
    system_len : int
        Tokens with which all conversations begin.
    think_time : float
        Seconds from an answer to the next turn.
    """
    draw = random.Random(seed)

    def words(length: int) -> list[int]:
        return draw.choices(range(vocab_size), k=length)

    system = words(system_len)
    return [
        [
            Turn(words(turn_len) if i else system + words(input_len), output_len, think_time if i else 0.0)
            for i in range(turns)
        ]
        for _ in range(count)
    ]
