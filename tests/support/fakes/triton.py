"""A stand-in for Triton's Python backend: what the models use of it, and requests that record their answers."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

    def __init__(self, message, code=INTERNAL):
        self.message, self.code = message, code


class TritonModelException(Exception):  # noqa: N818
    pass


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.error = error
        self.tensors = {t.name(): t.as_numpy() for t in output_tensors}


class MetricFamily:
    GAUGE, COUNTER = "gauge", "counter"

    def __init__(self, name, description, kind):
        self.name, self.description, self.kind = name, description, kind

    def Metric(self, labels):  # noqa: N802
        return SeriesRecorder(self, labels)


class SeriesRecorder:
    """A metric. Like Triton's, a counter only goes up."""

    all: list[SeriesRecorder] = []  # noqa: RUF012

    def __init__(self, family, labels):
        self.family, self.labels, self.value, self.calls = family, labels, 0.0, 0
        SeriesRecorder.all.append(self)

    def set(self, value):
        if self.family.kind != MetricFamily.GAUGE:
            raise TypeError(f"{self.family.name} is no gauge")
        self.value, self.calls = value, self.calls + 1

    def increment(self, value):
        if value < 0:
            raise ValueError(f"{self.family.name} would go down")
        self.value, self.calls = self.value + value, self.calls + 1


class Logger:
    lines: list[str] = []  # noqa: RUF012
    log_info = log_warn = log_error = lines.append


class Sender:
    """A response sender that holds on to what was sent, and rejects what Triton rejects."""

    def __init__(self):
        self.responses = []
        self.cancelled = False
        self.taken = threading.Event()  # whether the next responses are
        self.taken.set()
        self._final = threading.Event()
        self._arrived = threading.Condition()

    def send(self, response=None, flags=0):
        if self._final.is_set():
            raise RuntimeError("sent after the final flag")
        self.taken.wait()
        with self._arrived:
            if response is not None:
                self.responses.append(response)
            if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
                self._final.set()
            self._arrived.notify_all()

    def is_cancelled(self):
        return self.cancelled

    def wait_final(self):
        """All responses, once the last one is there."""
        if not self._final.wait(60):
            raise TimeoutError("no final response")
        return self.responses

    def wait_responses(self, count):
        """The first responses, while more are to come."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.responses) >= count, 60):
                raise TimeoutError(f"only {len(self.responses)} responses")
        return self.responses[:count]


class Request:
    """What a client sent."""

    def __init__(self, tensors, request_id="", **parameters):
        self.sender = Sender()
        self._tensors, self._id = tensors, request_id
        self._parameters = json.dumps(parameters)

    def inputs(self):
        return [Tensor(k, v) for k, v in self._tensors.items()]

    def request_id(self):
        return self._id

    def parameters(self):
        return self._parameters

    def get_response_sender(self):
        return self.sender


pb_utils = SimpleNamespace(
    **{c.__name__: c for c in (Tensor, TritonError, TritonModelException, InferenceResponse, MetricFamily, Logger)},
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=TRITONSERVER_RESPONSE_COMPLETE_FINAL,
)


def i32(*rows):
    """An int32 array."""
    return np.array(rows, np.int32)


def strings(*rows):
    """An array of strings, as Triton gives it."""
    return np.array([[s.encode() if isinstance(s, str) else s for s in row] for row in rows], object)


def model_config(**parameters):
    """What Triton gives a model's ``initialize``."""
    return json.dumps({"name": "m", "parameters": {k: {"string_value": v} for k, v in parameters.items()}})
