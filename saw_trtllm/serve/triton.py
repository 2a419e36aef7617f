"""What the models share in talking to Triton."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from saw_trtllm.errors import RequestError, SawError
from saw_trtllm.serve import names
from saw_trtllm.serve.garbage import set_start_aside
from saw_trtllm.serve.names import Model
from saw_trtllm.serve.parameters import Parameters

logger = logging.getLogger(__name__)

#: Tensors by name, each with the batch dimension in front.
Tensors = Mapping[str, np.ndarray]

#: Request parameters that change nothing. TensorRT-LLM's own client sends the last with every request, beside the
#: tensor that counts.
_IGNORED = {"priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "Streaming"}

_OPTIONS = sorted({t.name for model in names.MODELS for t in model.inputs} | set(names.UNSUPPORTED))


def read_tensors(request: Any, model: Model) -> dict[str, np.ndarray]:
    """All inputs of a request.

    Raises
    ------
    RequestError
        If they do not have the shapes that the model names, or the request has parameters that were meant to be
        inputs.
    """
    check_parameters(json.loads(request.parameters() or "{}"))
    tensors = {t.name(): t.as_numpy() for t in request.inputs()}
    check_shapes(tensors, model)
    return tensors


def check_parameters(parameters: Iterable[str]) -> None:
    """Reject a request with parameters in the place of inputs.

    Triton's HTTP front end turns JSON keys that name no input into parameters. An option that was misspelt or is not
    supported must not be lost in silence; what cannot have been meant as one is ignored, as TensorRT-LLM's models do.

    Raises
    ------
    RequestError
    """
    for name in sorted(set(parameters) - _IGNORED):
        if name in names.UNSUPPORTED:
            raise RequestError(f"{name} is not supported: leave it out")
        near = get_close_matches(name, _OPTIONS, n=1, cutoff=0.8)
        if near:
            raise RequestError(
                f"the request has a parameter {name}, which this model does not know: if the input {near[0]} is meant, "
                "send that, else leave it out"
            )
        logger.debug("ignored the request parameter %s", name)


def check_shapes(tensors: Tensors, model: Model) -> None:
    """Reject a request whose inputs do not have the shapes that the model names, or do not fit together.

    Raises
    ------
    RequestError
    """
    count = None
    for t in model.inputs:
        array = tensors.get(t.name)
        if array is None:
            if not t.optional:
                raise RequestError(f"the request has no {t.name}: the model {model.name} needs it")
            continue
        count = len(array) if count is None else count
        if not count:
            raise RequestError(f"{t.name} has no rows: send at least one prompt")
        if len(array) != count:
            raise RequestError(f"{t.name} has {len(array)} rows for {count} prompts: give one for each")
        wanted = (count, *t.dims)
        if array.ndim != len(wanted) or any(w not in (-1, n) for w, n in zip(wanted, array.shape, strict=True)):
            raise RequestError(f"{t.name} has the shape {list(array.shape)}: it must be {list(wanted)}, -1 being any")


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
    said = " ".join(str(error).split())
    message = said if isinstance(error, SawError) else f"the model failed ({type(error).__name__}: {said})"
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
    model : Model
        What its requests must look like.
    """

    def __init__(self, pb_utils: Any, model: Model) -> None:
        self._pb_utils = pb_utils
        self._model = model

    def answer(self, request: Any, tensors: Tensors) -> Tensors:
        """The outputs for a request with these inputs."""
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; a bad one does not spoil the others."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Nothing to release."""

    def _respond(self, request: Any) -> Any:
        try:
            tensors = self.answer(request, read_tensors(request, self._model))
        except Exception as e:
            if not isinstance(e, SawError):
                logger.exception("a request failed")
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
        loaded = model(pb_utils, Parameters.read(args["model_config"]))
    except SawError as e:
        raise pb_utils.TritonModelException(str(e)) from None
    set_start_aside()
    return loaded


def _use_triton_log(pb_utils: Any) -> None:
    """Let the package's messages from INFO on appear in Triton's log."""
    logger = logging.getLogger("saw_trtllm")
    logger.handlers[:] = [TritonLogHandler(pb_utils)]
    logger.setLevel(logging.INFO)
    logger.propagate = False
