"""Lazy access to safetensors files: headers are read at once, a tensor's data when it is looked at."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from saw_trtllm.errors import CheckpointError
from saw_trtllm.paths import is_file, read_json, reject_lfs_pointer

#: NumPy's dtype for each of the names that a config may give.
NUMPY_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
#: The same dtypes as a safetensors header spells them, and those of quantized weights.
SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
SAFETENSORS_DTYPES |= {"uint8": "U8", "int8": "I8", "int32": "I32"}
#: What quantized weights are stored in, as a file spells it.
_STORED_DTYPES = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}
_STORED_DTYPES |= {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
#: Ends of the names that quantizers give to what they store beside, or instead of, a weight.
_QUANTIZED = re.compile(
    r"(_scale|_scale_inv|_zero_point|_packed|_shape|qweight|qzeros|[._]scales|g_idx|absmax|quant_map|quant_state\.\w+|"
    r"SCB|scaling_factor|per_channel_scale)$"
)
_DTYPE_NAMES = {SAFETENSORS_DTYPES[name]: name for name in NUMPY_DTYPES}
#: Linux's number, which Python's mmap has from 3.11 on: pages that nobody writes to are not counted as memory.
_MAP_NORESERVE = 0x4000
#: Bits of the exponent, all of which are set only in NaN and infinity.
_EXPONENTS: dict[str, np.unsignedinteger] = {
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float32": np.uint32(0x7F800000),
}
#: Numbers that are looked at together: what is computed of them stays in a core's cache.
_PIECE = 1 << 19


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a safetensors file, whose data stay on disk until they are looked at.

    Attributes
    ----------
    path : Path
    name : str
    shape : tuple of int
    dtype : str
        As a config names it, or the file where no config can.
    data : numpy.ndarray
        uint8: its bytes in a private mapping of the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.data.nbytes

    def load(self) -> np.ndarray:
        """The tensor, over the mapped file unless that has it at an odd place; who writes to it changes no file."""
        dtype = NUMPY_DTYPES.get(self.dtype) or _STORED_DTYPES[self.dtype]
        return np.require(self.data.view(dtype).reshape(self.shape), requirements="A")

    def check(self, shape: tuple[int, ...]) -> None:
        """Reject a tensor of another shape, or one that is quantized."""
        if self.dtype not in NUMPY_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} is stored as {self.dtype}, but F16, BF16 or F32 is needed, unless "
                "config.json says how it is quantized: use the config.json that belongs to these weights"
            )
        if self.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} has shape {list(self.shape)}, but {list(shape)} is what "
                "config.json asks for: use the config.json that belongs to these weights"
            )


def is_finite(array: np.ndarray) -> bool:
    """Whether no number of a contiguous array is NaN or infinite; several times as fast as NumPy's in 16 bits."""
    exponent = _EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(exponent.dtype)
    pieces = (bits[i : i + _PIECE] for i in range(0, len(bits), _PIECE))
    return all((piece & exponent).max() < exponent for piece in pieces)


def check_dtypes(parts: list[StoredTensor]) -> None:
    """Reject parts of one tensor that are stored in several dtypes."""
    odd = next((part for part in parts if part.dtype != parts[0].dtype), None)
    if odd is not None:
        raise CheckpointError(
            f"{odd.path}: tensor {odd.name!r} is stored as {odd.dtype} and {parts[0].name!r} as {parts[0].dtype}, but "
            "they need one dtype: save the model in one"
        )


def reject_quantized(stored: Iterable[StoredTensor], used: Container[str] = ()) -> None:
    """Reject what a quantizer stores beside weights and nothing reads."""
    scale = next((t for t in stored if t.name not in used and _QUANTIZED.search(t.name)), None)
    if scale is not None:
        raise CheckpointError(
            f"{scale.path}: tensor {scale.name!r} belongs to quantized weights, and the config names others or none: "
            "use the config.json that belongs to these weights"
        )


def reject_unknown(stored: Iterable[StoredTensor], used: Container[str], harmless: re.Pattern[str], model: str) -> None:
    """Reject a tensor that the model has no place for, since what it would change is lost."""
    unknown = next((t for t in stored if t.name not in used and not harmless.search(t.name)), None)
    if unknown is not None:
        raise CheckpointError(
            f"{unknown.path}: tensor {unknown.name!r} is none that a {model} has: use the config.json that belongs to "
            "these weights, or a model without it"
        )


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file: its tensors by name."""
    if not is_file(path, CheckpointError):
        raise CheckpointError(f"{path} does not exist: copy the checkpoint again")
    try:
        safe_open(path, framework="np")  # checks that the header and the file fit each other
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (SafetensorError, OSError) as e:
        reject_lfs_pointer(path, CheckpointError)
        raise CheckpointError(f"{path} is not a whole safetensors file ({e}): copy or download it again") from e
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    content = np.frombuffer(data, np.uint8, offset=start)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = _DTYPE_NAMES.get(entry["dtype"], entry["dtype"])
        tensors[name] = StoredTensor(path, name, tuple(entry["shape"]), dtype, content[begin:end])
    return tensors


def open_huggingface(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the headers of a Hugging Face folder: ``model.safetensors``, or the shards that its index names.

    Returns
    -------
    stored : dict[str, StoredTensor]
    absent : dict[str, str]
        Files of the tensors that the index names and that are not in them, as old exports do for buffers and tied
        weights.
    """
    if is_file(folder / "model.safetensors", CheckpointError):
        return open_file(folder / "model.safetensors"), {}
    index = folder / "model.safetensors.index.json"
    if is_file(index, CheckpointError):
        return _open_index(index)
    for pattern, advice in _OTHER_WEIGHTS.items():
        found = sorted(p.name for p in folder.glob(pattern))
        if found:
            raise CheckpointError(f"{folder} holds {found[0]}, no model.safetensors and no index of shards: {advice}")
    raise CheckpointError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json: download the weights too"
    )


_SAVE = "load the model in transformers, save it with save_pretrained, and use that folder"
#: What else a folder may hold, and what to do about it.
_OTHER_WEIGHTS = {
    "model-*.safetensors": "download model.safetensors.index.json too, which says what is where",
    "pytorch_model*.bin": _SAVE,
    "adapter_model.*": "an adapter is not a model: merge it into its base model with PEFT's merge_and_unload",
    "*.gguf": "a GGUF file cannot be read: use the Hugging Face folder that it was made from",
    "consolidated*": "download the model in Hugging Face's layout",
    "*.safetensors": _SAVE,
}


def _open_index(index: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files: download it again")
    files = {}
    for filename in sorted(set(weight_map.values())):
        if PurePath(filename).is_absolute() or ".." in PurePath(filename).parts:
            raise CheckpointError(f"{index} names {filename!r}, which is outside its folder: download both again")
        if not is_file(index.parent / filename, CheckpointError):
            raise CheckpointError(f"{index} names {filename}, which is not in the folder: download that file too")
        files[filename] = open_file(index.parent / filename)
    stored = {name: files[filename][name] for name, filename in weight_map.items() if name in files[filename]}
    return stored, {name: filename for name, filename in weight_map.items() if name not in stored}
