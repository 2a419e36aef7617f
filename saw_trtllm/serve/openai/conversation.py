"""The messages of a request: each role and field reaches the model's template, or is rejected by its name.

A template leaves out in silence what it does not know, a whole message of an unknown role too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from saw_trtllm.runtime.keywords import shown
from saw_trtllm.serve.openai.errors import ApiError

_ROLES = ("system", "user", "assistant", "tool")
#: What a message may hold: what clients send back of an answer among it.
_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal"}
_FIELDS |= {"annotations", "cache_control"}  # whatever the latter marks is found again anyway, as all prefixes are
#: What a template compares a role with: a name, or a list of them.
_COMPARED = re.compile(r"""role['"]?[\])]?\s*(?:==|!=|(?:not\s+)?in)\s*('[^']*'|"[^"]*"|\[[^]]*]|\([^)]*\))""")


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
    if not isinstance(role, str) or role in _ROLES or _has_role(template, role):
        return message
    if role == "developer":
        return {**message, "role": "system"}
    what = f"message {number} has the role {shown(role)}: it must be one of developer, {', '.join(_ROLES)}"
    raise ApiError("invalid_value", what, f"messages.{number}.role")


def _has_role(template: str, role: str) -> bool:
    """Whether a template asks for a role: its name alone may be a field's, as ``function`` is of calls."""
    return any(form in names for names in _COMPARED.findall(template) for form in (f"'{role}'", f'"{role}"'))


def _knows(template: str, name: str) -> bool:
    """Whether a template names a field as it may be written."""
    return any(form in template for form in (f"'{name}'", f'"{name}"', f"message.{name}"))
