"""The messages of a request: each role and field reaches the model's template, or is rejected by its name.

A template leaves out in silence what it does not know, a whole message of an unknown role too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saw_trtllm.runtime.keywords import shown
from saw_trtllm.serve.openai.errors import ApiError

_ROLES = ("system", "developer", "user", "assistant", "tool")
#: What a message may hold: what clients send back of an answer among it.
_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal"}
_FIELDS |= {"annotations"}


def read_conversation(messages: Sequence[Mapping[str, Any]], template: str) -> list[Mapping[str, Any]]:
    """The messages for a template, of which the text is given: instructions of a developer are the system's to most.

    Raises
    ------
    ApiError
        If neither OpenAI's API nor the template knows a role or a field.
    """
    return [_read_message(i, message, template) for i, message in enumerate(messages)]


def _read_message(number: int, message: Mapping[str, Any], template: str) -> Mapping[str, Any]:
    for field, value in message.items():
        if value is not None and field not in _FIELDS and not _knows(template, field):
            place = f"messages.{number}.{field}"
            raise ApiError("unknown_parameter", f"message {number} has a field {shown(field)}: leave it out", place)
    role = message.get("role")
    if not isinstance(role, str) or _knows(template, role):
        return message
    if role not in _ROLES:
        roles = ", ".join(_ROLES)
        raise ApiError(
            "invalid_value",
            f"message {number} has the role {shown(role)}: it must be one of {roles}",
            f"messages.{number}.role",
        )
    return {**message, "role": "system"} if role == "developer" else message


def _knows(template: str, name: str) -> bool:
    """Whether a template names a role, or a field as it may be written."""
    return any(form in template for form in (f"'{name}'", f'"{name}"', f"message.{name}"))
