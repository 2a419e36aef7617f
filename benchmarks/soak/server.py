"""Malformed requests to a tritonserver of its own on this machine."""

from __future__ import annotations

import http.client
import json
import signal
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import grpc

from benchmarks.serving.launch_trials import Launch
from benchmarks.soak import grpc_requests
from benchmarks.soak.mutations import HOSTILE, mutate_text

#: Seconds for an answer.
LIMIT = 60.0
#: Each field with a value of its type.
_FIELDS = {
    **dict.fromkeys(("max_tokens", "end_id", "pad_id", "top_k", "random_seed", "min_tokens", "beam_width"), 1),
    **dict.fromkeys(("top_p", "temperature", "repetition_penalty", "presence_penalty"), 0.5),
    **dict.fromkeys(("text_input", "stop_words", "bad_words"), ""),
    **dict.fromkeys(("stream", "return_log_probs", "return_context_logits"), True),
}
_GOOD = {"text_input": "def main():", "max_tokens": 4}


def soak_server(count: int, seed: int, engine_dir: Path) -> Counter[str]:
    """Send ``count`` requests to ``saw-triton --launch``, over HTTP and gRPC in turn.

    Keys of the result in capitals are losses. What lets tritonserver itself crash is left out: its ``classification``
    extension, chunked bodies, and requests for several models on one gRPC stream.
    """
    rng, counts = Random(seed), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        launch = Launch(engine_dir, Path(temporary))
        try:
            launch.wait_ready()
            address = launch.url.removeprefix("http://")
            with grpc.insecure_channel(launch.grpc) as channel:
                for i in range(count):
                    if i % 2:
                        method, body = grpc_requests.make_request(rng)
                        outcome = grpc_requests.send(channel, method, body, LIMIT)
                        if outcome.isupper():
                            print(f"{outcome} on {method} {body!r}")
                    else:
                        outcome = _send(address, *_request(rng))
                    counts[f"{outcome} over gRPC" if i % 2 and not outcome.isupper() else outcome] += 1
            counts["requests"] = count
            counts["DEAD SERVER"] = int(_send(address, *_infer(dict(_GOOD))) != "answered")
            launch.end(signal.SIGTERM, 0)
            log = launch.log.read_text()
        finally:
            launch.clean()
    counts["TRACEBACKS"] = log.count("Traceback (most recent call last)")
    if counts["TRACEBACKS"]:
        print(log[log.index("Traceback (most recent call last)") :][:3000])
    return counts


def _infer(fields: dict) -> tuple[str, bytes]:
    return "/v2/models/ensemble/generate", json.dumps(fields).encode()


def _request(rng: Random) -> tuple[str, bytes]:
    """Path and body: a field of a generate request, or anything of an inference request, is wrong."""
    if rng.random() < 0.5:
        body = json.dumps(_GOOD | dict(_wrong_field(rng) for _ in range(rng.randrange(1, 4))))
        path = f"/v2/models/ensemble/{rng.choice(('generate', 'generate_stream'))}"
        return path, body.encode() if rng.random() < 0.7 else mutate_text(json.dumps(_GOOD).encode(), rng)
    tensors = [
        {"name": "QUERY", "shape": [1, 1], "datatype": "BYTES", "data": ["def main():"]},
        {"name": "REQUEST_OUTPUT_LEN", "shape": [1, 1], "datatype": "INT32", "data": [4]},
    ]
    body = json.dumps({"id": "1", "inputs": tensors, "outputs": [{"name": "INPUT_ID"}]}).encode()
    return "/v2/models/preprocessing/infer", mutate_text(body, rng)


def _wrong_field(rng: Random) -> tuple[str, Any]:
    """A field of a generate request; more often than not of its type, so that Triton lets it through to the models."""
    name, example = rng.choice(list(_FIELDS.items()))
    fitting = [value for value in HOSTILE if type(value) is type(example)]
    return name, rng.choice(fitting if rng.random() < 0.7 else HOSTILE)


def _send(address: str, path: str, body: bytes) -> str:
    connection = http.client.HTTPConnection(address, timeout=LIMIT)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    except TimeoutError:
        print(f"no answer in {LIMIT:.0f} s to {path} {body[:200]!r}")
        return "UNANSWERED"
    except (OSError, http.client.HTTPException) as e:
        print(f"{type(e).__name__} on {path} {body[:200]!r}")
        return "CUT OFF"
    finally:
        connection.close()
    if response.status == 200:
        return "answered"
    if b"Traceback" in text:
        print(f"a traceback for {path} {body[:200]!r}: {text[:500]!r}")
        return "TRACEBACKS SENT"
    return f"rejected with {response.status}"
