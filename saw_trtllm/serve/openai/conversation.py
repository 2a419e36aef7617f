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
#: What a message may hold, a call of a tool in it, and the call's function.
_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal"}
_CALL, _FUNCTION = {"id", "type", "function"}, {"name", "arguments"}
#: What clients send back of an answer beside these, on which no further answer depends. It is left out, since some
#: templates write all that a call holds.
_WITHOUT_MEANING = {
    "annotations",  # OpenAI's marks on the content, which stands there as it is
    "parsed",  # OpenAI's client: the content once more, as an object
    "parsed_arguments",  # OpenAI's client: the arguments once more, as an object
    "index",  # the place of a call in a stream, and so in the list
    "cache_control",  # Anthropic's; whatever it marks is found again anyway, as all prefixes are
    "provider_specific_fields",  # LiteLLM: what another server said beside its answer
    "thinking_blocks",  # LiteLLM: reasoning_content once more, with another server's signature
    "reasoning_items",  # LiteLLM: the same, encrypted for another server
    "reasoning_details",  # OpenRouter, Cline: the same in pieces
    "extra_content",  # Vercel's AI SDK: a call's signature, for another server
}
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
    what, place = f"message {number}", f"messages.{number}"
    message = _known(what, place, message, _MESSAGE, template)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        places = [f"{place}.tool_calls.{i}" for i in range(len(calls))]
        calls = [_read_call(what, *call, template) for call in zip(places, calls, strict=True)]
        message = {**message, "tool_calls": calls}
    role = message.get("role")
    if not isinstance(role, str) or role in _ROLES or _has_role(template, role):
        return message
    if role == "developer":
        return {**message, "role": "system"}
    roles = ", ".join(_ROLES)
    raise ApiError(
        "invalid_value", f"{what} has the role {shown(role)}: it must be one of developer, {roles}", f"{place}.role"
    )


def _read_call(what: str, place: str, call: Any, template: str) -> Any:
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call  # the template's reader says what a call must be
    call = _known(what, place, call, _CALL, template)
    return {**call, "function": _known(what, f"{place}.function", function, _FUNCTION, template)}


def _known(what: str, place: str, fields: Mapping[str, Any], known: set[str], template: str) -> dict[str, Any]:
    """What is known of an object's fields, without what has no meaning."""
    kept = {}
    for field, value in fields.items():
        if value is None or field in known or _knows(template, field):
            kept[field] = value
        elif field not in _WITHOUT_MEANING:
            raise ApiError("unknown_parameter", f"{what} has a field {shown(field)}: leave it out", f"{place}.{field}")
    return kept


def _has_role(template: str, role: str) -> bool:
    """Whether a template asks for a role: its name alone may be a field's, as ``function`` is of calls."""
    return any(form in names for names in _COMPARED.findall(template) for form in (f"'{role}'", f'"{role}"'))


def _knows(template: str, name: str) -> bool:
    """Whether a template names a field as it may be written."""
    return any(form in template for form in (f"'{name}'", f'"{name}"', f"message.{name}"))
