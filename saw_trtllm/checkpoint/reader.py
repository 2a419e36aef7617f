"""Lazy access to safetensors files: headers are read at once, a tensor's data when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from saw_trtllm.config import read_json
from saw_trtllm.errors import CheckpointError

#: NumPy's dtype for each of the names that a config may give.
NUMPY_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
#: The same dtypes as a safetensors header spells them.
SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_DTYPE_NAMES = {code: name for name, code in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a safetensors file, whose data stay on disk until they are asked for."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Any

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape)) * NUMPY_DTYPES[self.dtype].itemsize

    def load(self, rows: slice = slice(None)) -> np.ndarray:
        """Read the tensor, or some of its rows, into memory of its own."""
        try:
            return self.file.get_slice(self.name)[rows]
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.path}: tensor {self.name!r} cannot be read ({e}): copy the file again") from e

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape, or one that is quantized."""
        if self.dtype not in NUMPY_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} is stored as {self.dtype}, but F16, BF16 or F32 is needed: "
                "use a checkpoint that is not quantized"
            )
        if self.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} has shape {list(self.shape)}, but {list(shape)} is what "
                "config.json asks for: use the config.json that belongs to these weights"
            )


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file: its tensors by name."""
    try:
        file = safe_open(path, framework="np")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (a safe_open is not a mapping)
            header = file.get_slice(name)
            code = header.get_dtype()
            tensors[name] = StoredTensor(path, name, tuple(header.get_shape()), _DTYPE_NAMES.get(code, code), file)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: copy the checkpoint again") from None
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is not a whole safetensors file ({e}): copy or download it again") from e
    return tensors


def open_huggingface(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a Hugging Face folder: ``model.safetensors``, or the shards that its index names."""
    if (folder / "model.safetensors").exists():
        return open_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _open_index(index)
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]} but no safetensors file: load the model in transformers, save it with "
            "save_pretrained, and use that folder"
        )
    raise CheckpointError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json: download the weights too"
    )


def _open_index(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files: download it again")
    files = {}
    for filename in sorted(set(weight_map.values())):
        if not (index.parent / filename).is_file():
            raise CheckpointError(f"{index} names {filename}, which is not in the folder: download that file too")
        files[filename] = open_file(index.parent / filename)
    missing = next((name for name, filename in weight_map.items() if name not in files[filename]), None)
    if missing is not None:
        raise CheckpointError(
            f"{index} says that {missing!r} is in {weight_map[missing]}, which does not hold it: download both again"
        )
    return {name: files[filename][name] for name, filename in weight_map.items()}
