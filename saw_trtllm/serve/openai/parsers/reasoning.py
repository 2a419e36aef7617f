"""Reasoning between ``<think>`` and ``</think>``, as Qwen3 and DeepSeek-R1 write it."""

from __future__ import annotations

from saw_trtllm.serve.openai.parsers.delta import Delta, Parser, split_off

BEGIN, END = "<think>", "</think>"


class ReasoningParser:
    """Parts the reasoning from what comes after it.

    Parameters
    ----------
    then : Parser
        Of the rest.
    inside : bool
        Whether the prompt has begun the reasoning already.
    """

    def __init__(self, then: Parser, inside: bool) -> None:
        self._then = then
        self._state = "inside" if inside else "before"
        self._held = ""
        self._begun = False  # whether anything but white space has come in this part

    def push(self, text: str) -> list[Delta]:
        """See :class:`Parser`."""
        if self._state == "after":
            return self._answer(text)
        self._held += text
        deltas: list[Delta] = []
        if self._state == "before":
            found = self._held.lstrip()
            if found.startswith(BEGIN):
                self._state, self._held = "inside", found[len(BEGIN) :]
            elif BEGIN.startswith(found):
                return deltas
            else:
                return self._leave("")
        before, end, rest = self._held.partition(END)
        if end:
            deltas += self._reason(before.rstrip())
            return deltas + self._leave(rest)
        settled, _ = split_off(self._held, END)
        settled = settled.rstrip()  # white space before the end is no part of it
        self._held = self._held[len(settled) :]
        return deltas + self._reason(settled)

    def finish(self) -> list[Delta]:
        """See :class:`Parser`."""
        if self._state == "inside":
            return self._reason(self._held.rstrip())
        return self._answer(self._held if self._state == "before" else "") + self._then.finish()

    def _reason(self, text: str) -> list[Delta]:
        if not self._begun:
            text = text.lstrip()
        self._begun = self._begun or bool(text)
        return [Delta(reasoning=text)] if text else []

    def _leave(self, rest: str) -> list[Delta]:
        """What is held, or what came after the end, is the answer's."""
        skipped = self._state == "before"
        text = self._held if skipped else rest
        self._state, self._held, self._begun = "after", "", skipped
        return self._answer(text)

    def _answer(self, text: str) -> list[Delta]:
        if not self._begun:  # the lines between reasoning and answer belong to neither
            text = text.lstrip()
            self._begun = bool(text)
        return self._then.push(text) if text else []
