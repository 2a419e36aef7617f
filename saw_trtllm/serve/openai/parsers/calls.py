"""Calls of tools in a text: what the formats share."""

from __future__ import annotations

import json
from typing import Any

from saw_trtllm.serve.openai.parsers.delta import Call, Delta, split_off

_DECODER = json.JSONDecoder()


def read_call(value: Any) -> Call | None:
    """A call from its JSON; None if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def read_json(text: str) -> tuple[Any, int] | None:
    """The JSON that a text begins with, after white space, and where it ends; None while it is not whole."""
    start = len(text) - len(text.lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


class MarkedCalls:
    """Calls between markers, as Qwen and Hermes write them; all else is the answer.

    Parameters
    ----------
    begin, end : str
        The markers.
    """

    def __init__(self, begin: str, end: str) -> None:
        self._begin, self._end = begin, end
        self._held = ""
        self._inside = False
        self._called = False

    def push(self, text: str) -> list[Delta]:
        """See :class:`Parser`."""
        self._held += text
        deltas: list[Delta] = []
        while True:
            marker = self._end if self._inside else self._begin
            before, found, rest = self._held.partition(marker)
            if not found:
                break
            deltas += self._calls(before) if self._inside else self._content(before.rstrip())
            self._held, self._inside = rest, not self._inside
        if not self._inside:
            settled, _ = split_off(self._held, self._begin)
            settled = settled.rstrip()  # white space before a call is not the answer's
            self._held = self._held[len(settled) :]
            deltas += self._content(settled)
        return deltas

    def finish(self) -> list[Delta]:
        """See :class:`Parser`; a call that is cut off is given as the text it is."""
        held, self._held = self._held, ""
        if not self._inside:
            return self._content("" if self._called and not held.strip() else held)
        found = read_json(held)
        return self._calls(held) if found else self._content(self._begin + held)

    def _calls(self, text: str) -> list[Delta]:
        found = read_json(text)
        call = read_call(found[0]) if found else None
        self._called = self._called or call is not None
        return [Delta(call=call)] if call else self._content(self._begin + text + self._end)

    def _content(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []


class LeadingCalls:
    """Calls as a text's first JSON: an object, or a list of them; a text of anything else is the answer.

    Parameters
    ----------
    marker : str
        What may stand before them; where it is a special token, the text does not show it.
    separator : str
        What stands between several of them.
    """

    def __init__(self, marker: str = "", separator: str = ";") -> None:
        self._marker, self._separator = marker, separator
        self._held = ""
        self._is_answer = False

    def push(self, text: str) -> list[Delta]:
        """See :class:`Parser`."""
        if self._is_answer:
            return [Delta(content=text)] if text else []
        self._held += text
        start = self._held.lstrip()
        if self._marker and (self._marker.startswith(start) or start.startswith(self._marker)):
            start = start[len(self._marker) :].lstrip()
        if not start or start[0] in "{[":
            # It is looked at as a whole at the end, or when it cannot be a call any more.
            return []
        return self._answer()

    def finish(self) -> list[Delta]:
        """See :class:`Parser`."""
        if self._is_answer:
            return []
        text, calls = self._held.strip().removeprefix(self._marker).lstrip(), []
        while text and (found := read_json(text)):
            values = found[0] if isinstance(found[0], list) else [found[0]]
            calls += [read_call(value) for value in values]
            text = text[found[1] :].lstrip().removeprefix(self._separator).lstrip()
        if text or not calls or None in calls:
            return self._answer()
        return [Delta(call=call) for call in calls]

    def _answer(self) -> list[Delta]:
        self._is_answer = True
        held, self._held = self._held, ""
        return [Delta(content=held)] if held else []


class ForcedCall:
    """A text that is nothing but a call, since the grammar allowed nothing else."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        """See :class:`Parser`."""
        self._held += text
        return []

    def finish(self) -> list[Delta]:
        """See :class:`Parser`."""
        found = read_json(self._held)
        call = read_call(found[0]) if found else None
        return [Delta(call=call)] if call else [Delta(content=self._held)] if self._held else []
