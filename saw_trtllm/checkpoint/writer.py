"""Writing a safetensors file tensor by tensor.

``safetensors.numpy.save_file`` wants every tensor of the file in memory at once. The format does not: a header of known
length says where each tensor lies, and the data follow (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import numpy as np

from saw_trtllm.checkpoint.reader import NUMPY_DTYPES, SAFETENSORS_DTYPES


class SafetensorsWriter:
    """A safetensors file whose tensors come in a given order.

    Parameters
    ----------
    path : Path
    shapes : dict[str, tuple of int]
        The tensors in the order in which they will be written.
    dtype : str
        "float16", "bfloat16" or "float32": that of all tensors but those in ``float32``.
    float32 : container of str
        Names of tensors that are float32 whatever the others are.
    """

    def __init__(
        self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, float32: Container[str] = frozenset()
    ):
        self._dtypes = {name: "float32" if name in float32 else dtype for name in shapes}
        self._shapes = shapes
        self._left = list(reversed(shapes))
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + int(np.prod(shape)) * NUMPY_DTYPES[self._dtypes[name]].itemsize
            code = SAFETENSORS_DTYPES[self._dtypes[name]]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the data begin at a multiple of 8 bytes
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, array: np.ndarray) -> None:
        """Append the next tensor."""
        expected = self._left.pop() if self._left else None
        if name != expected or array.shape != self._shapes[name] or array.dtype != self._dtypes[name]:
            raise ValueError(f"{name} {array.shape} {array.dtype} was written where {expected} was due")
        # Bytes, because ml_dtypes' bfloat16 does not speak the buffer protocol.
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
