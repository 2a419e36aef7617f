"""What saw_trtllm raises when the input is at fault.

Every message is one sentence that says what was given, what is needed and what to do. The commands print it and exit
with code 2, and the Triton models answer with it under the error code that each class names.
"""

import reprlib

from pydantic import ValidationError


class SawError(Exception):
    """Base of all errors that a user can put right."""

    #: Name of the code in Triton's ``TritonError`` that a server answers with.
    triton_code = "INTERNAL"


class ConfigError(SawError, ValueError):
    """A flag, a build option or a combination of them that cannot work."""

    triton_code = "INVALID_ARG"


class CheckpointError(SawError):
    """A checkpoint that is missing, damaged or of an unsupported model."""

    triton_code = "INVALID_ARG"


class EngineError(SawError):
    """An engine folder that this version, backend or machine cannot run."""

    triton_code = "UNAVAILABLE"


class RequestError(SawError, ValueError):
    """A request that the engine cannot serve: its prompt or its sampling parameters."""

    triton_code = "INVALID_ARG"


class ContextLengthError(RequestError):
    """A prompt, or a prompt and the text that it asks for, longer than the engine takes."""


class BackendUnavailableError(SawError):
    """A backend that this machine, or this version, does not have."""

    triton_code = "UNAVAILABLE"


class RankError(SawError):
    """A rank of a group that has gone, is out of step, or cannot be reached."""

    triton_code = "UNAVAILABLE"


class OpError(SawError, ValueError):
    """An array or a parameter that a kernel cannot take."""

    triton_code = "INVALID_ARG"


class KernelError(SawError, RuntimeError):
    """A kernel that the GPU did not launch."""

    triton_code = "INTERNAL"


class QueueFullError(SawError):
    """A request that came when as many as are allowed were waiting."""

    triton_code = "UNAVAILABLE"


class ShutdownError(SawError):
    """A request that came when the runtime was already shut down."""

    triton_code = "UNAVAILABLE"


def first_error(error: ValidationError) -> str:
    """Pydantic's first complaint as ``field: what is wrong``, for a one-sentence message."""
    e = error.errors()[0]
    where = ".".join(str(p) for p in e["loc"])
    what = e["msg"].removeprefix("Value error, ")
    given = e["input"]
    if e["type"] != "value_error" and (given is None or isinstance(given, str | int | float)):
        what += f", and {reprlib.repr(given)} was given"
    return f"{where}: {what}" if where else what
