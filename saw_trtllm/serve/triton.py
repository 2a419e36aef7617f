"""What the models share in talking to Triton."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from saw_trtllm.errors import RequestError, SawError
from saw_trtllm.serve.parameters import Parameters

#: Tensors by name, each with the batch dimension in front.
Tensors = Mapping[str, np.ndarray]

#: Request parameters that Triton's front ends and schedulers understand themselves.
_TRITON_PARAMETERS = {"priority", "timeout", "sequence_id", "sequence_start", "sequence_end"}


def read_tensors(request: Any) -> dict[str, np.ndarray]:
    """All inputs of a request.

    Raises
    ------
    RequestError
        If the request has parameters: Triton's HTTP front end turns unknown JSON keys into these, and an option that
        was misspelt or is not supported must not be lost in silence.
    """
    unknown = [p for p in json.loads(request.parameters() or "{}") if not _known(p)]
    if unknown:
        raise RequestError(
            f"the request has {', '.join(sorted(unknown))}, which this model does not know: leave it out"
        )
    return {t.name(): t.as_numpy() for t in request.inputs()}


def _known(parameter: str) -> bool:
    return parameter in _TRITON_PARAMETERS or parameter.startswith("triton_")


def text(raw: bytes | str, name: str) -> str:
    """A string element, which Triton gives as bytes.

    Raises
    ------
    RequestError
        If it is not UTF-8.
    """
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(f"{name} is not valid UTF-8 at byte {e.start}: send UTF-8") from None


def texts(array: np.ndarray | None, name: str) -> list[str]:
    """The strings of an array that are not empty: clients send "" for none."""
    return [] if array is None else [text(raw, name) for raw in array.reshape(-1) if raw]


def error_response(pb_utils: Any, error: Exception) -> Any:
    """An answer that holds an error, with the code that its class names."""
    code = error.triton_code if isinstance(error, SawError) else "INTERNAL"
    message = str(error) if isinstance(error, SawError) else f"{type(error).__name__}: {error}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))


def to_triton(pb_utils: Any, tensors: Tensors) -> list[Any]:
    """Tensors as Triton takes them, in a request or a response."""
    return [pb_utils.Tensor(name, array) for name, array in tensors.items()]


class AnsweringModel:
    """A model that gives each request one answer at once.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    """

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils

    def answer(self, request: Any) -> Tensors:
        """The outputs for a request."""
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; a bad one does not spoil the others."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Nothing to release."""

    def _respond(self, request: Any) -> Any:
        try:
            tensors = self.answer(request)
        except Exception as e:
            return error_response(self._pb_utils, e)
        return self._pb_utils.InferenceResponse(to_triton(self._pb_utils, tensors))


class TritonLogHandler(logging.Handler):
    """Sends log records to Triton's log."""

    def __init__(self, pb_utils: Any) -> None:
        super().__init__()
        logger = pb_utils.Logger
        self._write = [(logging.ERROR, logger.log_error), (logging.WARNING, logger.log_warn), (0, logger.log_info)]

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        next(write for level, write in self._write if record.levelno >= level)(self.format(record))


def load_model(pb_utils: Any, model: Callable[[Any, Parameters], Any], args: Mapping[str, str]) -> Any:
    """Make a model with the parameters of its ``config.pbtxt``.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    model : class
    args : dict
        What Triton passes to ``initialize``.

    Raises
    ------
    pb_utils.TritonModelException
        With the one sentence of the error that a user can put right.
    """
    _use_triton_log(pb_utils)
    try:
        return model(pb_utils, Parameters.read(args["model_config"]))
    except SawError as e:
        raise pb_utils.TritonModelException(str(e)) from None


def _use_triton_log(pb_utils: Any) -> None:
    """Let the package's messages from INFO on appear in Triton's log."""
    logger = logging.getLogger("saw_trtllm")
    logger.handlers[:] = [TritonLogHandler(pb_utils)]
    logger.setLevel(logging.INFO)
    logger.propagate = False
