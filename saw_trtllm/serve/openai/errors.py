"""What went wrong, in the shape of OpenAI's errors: the one table of statuses, types and codes."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from saw_trtllm.errors import (
    ContextLengthError,
    EngineError,
    QueueFullError,
    RankError,
    RequestError,
    SawError,
    ShutdownError,
)
from saw_trtllm.runtime.keywords import shown


class ApiError(SawError):
    """A request that is answered by an error before a model sees it.

    Parameters
    ----------
    code : str
        A key of :data:`BY_CODE`.
    message : str
    param : str, optional
        The field at fault.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Answer(NamedTuple):
    """How an error is answered."""

    status: int
    type: str
    code: str


_INVALID, _SERVER = "invalid_request_error", "server_error"

#: Errors of this server's own, by their code.
BY_CODE = {
    answer.code: answer
    for answer in (
        Answer(400, _INVALID, "invalid_value"),
        Answer(400, _INVALID, "unknown_parameter"),
        Answer(400, _INVALID, "missing_required_parameter"),
        Answer(400, _INVALID, "unsupported_parameter"),
        Answer(400, _INVALID, "invalid_json"),
        Answer(401, _INVALID, "invalid_api_key"),
        Answer(404, _INVALID, "model_not_found"),
        Answer(404, _INVALID, "unknown_url"),
        Answer(405, _INVALID, "method_not_allowed"),
        Answer(413, _INVALID, "request_too_large"),
    )
}

#: What the package raises: the first class that fits counts.
BY_CLASS: tuple[tuple[type[Exception], Answer], ...] = (
    (ContextLengthError, Answer(400, _INVALID, "context_length_exceeded")),
    (RequestError, Answer(400, _INVALID, "invalid_value")),
    (QueueFullError, Answer(429, "rate_limit_error", "rate_limit_exceeded")),
    (ShutdownError, Answer(503, _SERVER, "shutting_down")),
    (RankError, Answer(503, _SERVER, "rank_lost")),
    (EngineError, Answer(500, _SERVER, "engine_error")),
    (SawError, Answer(500, _SERVER, "server_error")),
    (Exception, Answer(500, _SERVER, "internal_error")),
)


#: Messages about a field's value begin with its name.
_NAMED = re.compile(r"([a-z_]+) (?:is|holds|names|says|cannot be) ")
_MESSAGE = re.compile(r"message (\d+) ")
#: The API's names of what the runtime calls otherwise.
_RENAMED = {"guided_decoding": "response_format", "bad": "bad_words"}
#: What a field may be that has several types: of each pydantic complains alone.
_SEVERAL_TYPES = {
    "prompt": "text, a list of texts, token ids, or a list of lists of them",
    "stop": "text or a list of texts",
    "tool_choice": "none, auto, required or a function",
    "system": "text or a list of text blocks",
}


def answer_to(error: Exception) -> Answer:
    """How an error is answered."""
    if isinstance(error, ApiError):
        return BY_CODE[error.code]
    return next(answer for kind, answer in BY_CLASS if isinstance(error, kind))


def error_body(error: Exception, prompt: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API writes it. What is not a :class:`SawError` stays in the log.

    Parameters
    ----------
    error : Exception
    prompt : str, optional
        The field that the request has its prompt in.
    """
    answer = answer_to(error)
    message = str(error) if isinstance(error, SawError) else "the server failed; its log says why"
    named = _NAMED.match(message) if answer.code == "invalid_value" else None
    name = named and named[1]
    if name in _RENAMED:
        message = message.replace(name, _RENAMED[name], 1)
    param = getattr(error, "param", _RENAMED.get(name, name) if name else None)
    if param is None and (number := _MESSAGE.match(message)):
        param = f"messages.{number[1]}"
    elif param is None and message.startswith("the prompt"):
        param = prompt
    body = {"message": message, "type": answer.type, "param": param, "code": answer.code}
    # A field's name may hold half a character, which JSON has and UTF-8 has not.
    return {"error": {name: text and text.encode(errors="backslashreplace").decode() for name, text in body.items()}}


_NO_FIELDS = ("body", "str", "list")


def from_validation(details: ErrorDetails) -> ApiError:
    """Pydantic's complaint about a request."""
    # Of a union pydantic names the branch too, which no client knows.
    places = [str(place) for place in details["loc"] if place not in _NO_FIELDS and "[" not in str(place)]
    field, kind = ".".join(places), details["type"]
    if kind == "json_invalid":
        return ApiError("invalid_json", f"the body is not JSON ({details['ctx']['error']}): send a JSON object")
    if not field:
        return ApiError("invalid_json", "the body is no JSON object: send one, as application/json")
    if kind == "extra_forbidden":
        return ApiError("unknown_parameter", f"the request has no {field}: leave it out", field)
    if kind == "missing":
        return ApiError("missing_required_parameter", f"{field} is missing: give it", field)
    if types := _SEVERAL_TYPES.get(places[0]):
        return ApiError("invalid_value", f"{places[0]} is {shown(details['input'])}: it must be {types}", places[0])
    what = details["msg"].removeprefix("Value error, ")
    return ApiError("invalid_value", f"{field}: {what[:1].lower()}{what[1:]}", field)


def table() -> str:
    """The table in Markdown."""
    rows = ["| raised | status | type | code |", "|---|---|---|---|"]
    for kind, answer in BY_CLASS:
        rows.append(f"| `{kind.__name__}` | {answer.status} | `{answer.type}` | `{answer.code}` |")
    for answer in BY_CODE.values():
        rows.append(f"| | {answer.status} | `{answer.type}` | `{answer.code}` |")
    return "\n".join(rows)
