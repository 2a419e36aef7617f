"""Ask a running server: the same ``ensemble`` over gRPC or HTTP.

Start one with ``saw-triton --engine_dir engine --launch``, then, for instance:
``python examples/client.py --protocol grpc --prompt "def main():" --stream``.
"""

from __future__ import annotations

import argparse
import json
import queue
import urllib.request
from collections.abc import Iterator

import numpy as np


def ask_grpc(url: str, prompt: str, max_tokens: int, stream: bool) -> Iterator[str]:
    """Yield the text as the server sends it."""
    import tritonclient.grpc as triton

    def tensor(name: str, value: object, dtype: str) -> triton.InferInput:
        array = np.array([[value]], dtype=triton_to_numpy[dtype])
        tensor = triton.InferInput(name, array.shape, dtype)
        tensor.set_data_from_numpy(array)
        return tensor

    triton_to_numpy = {"BYTES": np.object_, "INT32": np.int32, "BOOL": np.bool_}
    inputs = [
        tensor("text_input", prompt.encode(), "BYTES"),
        tensor("max_tokens", max_tokens, "INT32"),
        tensor("stream", stream, "BOOL"),
        tensor("exclude_input_in_output", True, "BOOL"),
    ]
    answers: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        client.start_stream(callback=lambda result, error: answers.put(error or result))
        client.async_stream_infer("ensemble", inputs, enable_empty_final_response=True)
        while True:
            answer = answers.get(timeout=120)
            if isinstance(answer, Exception):
                raise SystemExit(f"the server answered: {answer}")
            text = answer.as_numpy("text_output")
            if text is not None and text.size:
                yield text.flatten()[0].decode()
            if answer.get_response().parameters["triton_final_response"].bool_param:
                return


def ask_http(url: str, prompt: str, max_tokens: int, stream: bool) -> Iterator[str]:
    """Yield the text as the server sends it, through Triton's generate extension."""
    body = {"text_input": prompt, "max_tokens": max_tokens, "stream": stream, "exclude_input_in_output": True}
    endpoint = "generate_stream" if stream else "generate"
    request = urllib.request.Request(
        f"http://{url}/v2/models/ensemble/{endpoint}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            line = line.decode().removeprefix("data: ").strip()
            if line:
                yield json.loads(line)["text_output"]


def main() -> None:
    """Print the prompt and what the server makes of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--url", help="by default localhost, port 8001 for gRPC and 8000 for HTTP")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    ask, port = (ask_grpc, 8001) if args.protocol == "grpc" else (ask_http, 8000)
    url = args.url or f"localhost:{port}"
    print(args.prompt, end="", flush=True)
    for text in ask(url, args.prompt, args.max_tokens, args.stream):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
