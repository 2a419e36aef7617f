"""What a parser gives, and the parser of a text that is an answer and nothing else."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Call(NamedTuple):
    """A function that the model calls, with its arguments as JSON."""

    name: str
    arguments: str


class Delta(NamedTuple):
    """A piece of a message: of its answer, of the reasoning before it, or a call."""

    content: str = ""
    reasoning: str = ""
    call: Call | None = None


class Parser(Protocol):
    """Takes a text in pieces. However it is cut, what it gives is the same when joined."""

    def push(self, text: str) -> list[Delta]:
        """Take a piece, and give what is settled by it."""

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the text."""


class PlainParser:
    """All is answer."""

    def push(self, text: str) -> list[Delta]:
        """Give the piece as it is."""
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        """Nothing is held back."""
        return []


def split_off(text: str, marker: str) -> tuple[str, str]:
    """Cut a text where a marker may begin at its end: what is before, and what has to wait."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-size:]):
            return text[:-size], text[-size:]
    return text, ""
