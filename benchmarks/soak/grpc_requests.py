"""Malformed gRPC requests to a tritonserver: messages whose fields do not fit together, and damaged bytes."""

from __future__ import annotations

from random import Random

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from benchmarks.soak.mutations import HOSTILE, mutate_bytes

_SERVICE = "/inference.GRPCInferenceService/"
#: A good request of each model, as tensors: what is left out is optional.
_GOOD = {
    "ensemble": {"text_input": b"def main():", "max_tokens": np.int32(4)},
    "preprocessing": {"QUERY": b"def main():", "REQUEST_OUTPUT_LEN": np.int32(4)},
    "postprocessing": {"TOKENS_BATCH": np.array([[70, 71]], np.int32), "SEQUENCE_LENGTH": np.int32(2)},
    "tensorrt_llm": {
        "input_ids": np.array([70, 71], np.int32),
        "input_lengths": np.int32(2),
        "request_output_len": np.int32(4),
    },
}
#: Further inputs, so that more of the models' code is reached.
_OPTIONS = {
    "ensemble": {"stop_words": b"x", "temperature": np.float32(0.5), "top_k": np.int32(3), "stream": np.bool_(True)},
    "tensorrt_llm": {
        "stop_words_list": np.array([[5, 6], [1, 2]], np.int32),
        "bad_words_list": np.array([[5, 6], [1, 2]], np.int32),
        "embedding_bias": np.zeros(3, np.float32),
        "runtime_top_p": np.float32(0.5),
        "prompt": b"x",
        "stop": np.bool_(True),
    },
}
_TYPES = {"S": "BYTES", "i": "INT32", "f": "FP32", "b": "BOOL"}
_ALL_TYPES = ("BYTES", "INT32", "INT64", "UINT64", "FP16", "BF16", "FP32", "FP64", "BOOL", "STRING", "")
_SIZES = (-1, 0, 1, 2, 7, 2**31, 2**40, 2**62)


def make_request(rng: Random) -> tuple[str, bytes]:
    """A method and its message, of which something is wrong more often than not."""
    model = rng.choice(list(_GOOD))
    options = _OPTIONS.get(model, {})
    given = {k: options[k] for k in options if rng.random() < 0.3}
    request = service_pb2.ModelInferRequest(model_name=model, id="1")
    for name, value in {**_GOOD[model], **given}.items():
        _add(request, name, value)
    for _ in range(rng.randrange(1, 4)):
        _damage(request, rng)
    body = request.SerializeToString()
    streams = model in ("ensemble", "tensorrt_llm") and rng.random() < 0.8  # decoupled: Triton rejects single calls
    return "ModelStreamInfer" if streams else "ModelInfer", mutate_bytes(body, rng) if rng.random() < 0.2 else body


def send(channel: grpc.Channel, method: str, body: bytes, limit: float) -> str:
    """Send a message as it is, on a stream of its own; what came of it, in capitals if it must not."""
    path = _SERVICE + method
    try:
        if method == "ModelInfer":
            channel.unary_unary(path)(body, timeout=limit)
            return "answered"
        answers = list(channel.stream_stream(path)(iter([body]), timeout=limit))
    except grpc.RpcError as e:
        return _outcome(e.code(), e.details() or "")
    errors = [service_pb2.ModelStreamInferResponse.FromString(answer).error_message for answer in answers]
    if any("Traceback" in error for error in errors):
        return "TRACEBACKS SENT"
    return "rejected on a stream" if any(errors) else "answered"


def _outcome(code: grpc.StatusCode, details: str) -> str:
    if "Traceback" in details:
        return "TRACEBACKS SENT"
    lost = {grpc.StatusCode.DEADLINE_EXCEEDED: "UNANSWERED", grpc.StatusCode.UNAVAILABLE: "CUT OFF"}
    return lost.get(code, f"rejected with {code.name}")


def _add(request: service_pb2.ModelInferRequest, name: str, value: object) -> None:
    """Add a tensor of one row."""
    array = np.asarray(value)
    array = array.reshape(1, *(array.shape or (1,)))
    request.inputs.add(name=name, datatype=_TYPES[array.dtype.kind], shape=array.shape)
    if array.dtype.kind == "S":
        text = array.item()
        request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    else:
        request.raw_input_contents.append(array.tobytes())


def _damage(request: service_pb2.ModelInferRequest, rng: Random) -> None:
    """Change one thing."""
    if not request.inputs:
        return
    index = rng.randrange(len(request.inputs))
    tensor, raw = request.inputs[index], request.raw_input_contents
    kind = rng.randrange(9)
    if kind == 0:
        tensor.datatype = rng.choice(_ALL_TYPES)
    elif kind == 1:
        tensor.shape[rng.randrange(len(tensor.shape))] = rng.choice(_SIZES) if tensor.shape else 1
    elif kind == 2:
        tensor.shape.append(rng.choice(_SIZES))
    elif kind == 3:
        tensor.name = rng.choice((tensor.name + "_", "", "x", "é" * 300, "QUERY"))
    elif kind == 4:
        del request.inputs[index]
    elif kind == 5:
        request.parameters[rng.choice(("temprature", "x", "priority"))].string_param = str(rng.choice(HOSTILE))
    elif kind == 6:
        tensor.contents.int_contents.extend([1, 2])  # beside the raw ones
    elif index < len(raw):
        raw[index] = mutate_bytes(raw[index], rng) if kind == 7 else rng.randbytes(len(raw[index]))
