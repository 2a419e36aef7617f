"""Writing a safetensors file tensor by tensor.

``safetensors.numpy.save_file`` wants every tensor of the file in memory at once. The format does not: a header of known
length says where each tensor lies, and the data follow (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saw_trtllm.checkpoint.reader import SAFETENSORS_DTYPES
from saw_trtllm.model.quantization import TensorSpec


def safetensors_header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """What a safetensors file begins with, of tensors that follow in this order."""
    header, end = {}, 0
    for name, spec in tensors.items():
        begin, end = end, end + spec.nbytes
        code = SAFETENSORS_DTYPES[spec.dtype]
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begin at a multiple of 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def tensor_bytes(name: str, array: np.ndarray, spec: TensorSpec) -> memoryview:
    """The bytes of a tensor, which must be what its header says."""
    if (array.shape, array.dtype.name) != tuple(spec):
        raise ValueError(f"{name} {array.shape} {array.dtype} was written where {spec} was due")
    # Bytes, because ml_dtypes' bfloat16 does not speak the buffer protocol.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class SafetensorsWriter:
    """A safetensors file whose tensors come in a given order.

    Parameters
    ----------
    path : Path
    tensors : dict[str, TensorSpec]
        Their shapes and dtypes, in the order in which they will be written.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorSpec]):
        self._tensors = tensors
        self._left = list(reversed(tensors))
        self._file = path.open("wb")
        self._file.write(safetensors_header(tensors))

    def write(self, name: str, array: np.ndarray) -> None:
        """Append the next tensor."""
        expected = self._left.pop() if self._left else None
        if name != expected:
            raise ValueError(f"{name} was written where {expected} was due")
        self._file.write(tensor_bytes(name, array, self._tensors[name]))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
