"""What a dialect of quantized checkpoints says of itself, and what all of them are read with."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saw_trtllm.checkpoint.families.family import KeyRule
from saw_trtllm.checkpoint.reader import StoredTensor
from saw_trtllm.errors import CheckpointError, first_error
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat

log = logging.getLogger(__name__)

#: Scales of a cache in 8 bits, which a 4-bit cache has its own of.
CACHE_SCALES = re.compile(
    r"self_attn\.(\w+\.)?(q|k|v|kv)_(scale|zero_point)$|[kv]_proj\.output_(scale|zero_point)$"
    r"|attention\.(k_|v_|kv_)cache_(rcp_)?scaling_factor$"
)


#: Rows and columns that share a scale, as JSON has them.
Block = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)]


class Settings(BaseModel):
    """The keys of a dialect that are honored; those that others may have too are not looked at."""

    model_config = ConfigDict(strict=True)


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A quantized weight on disk.

    Attributes
    ----------
    name : str
        Of the linear layer in its file.
    shape : tuple of int
        Of the weight, ``[out, in]``.
    format : WeightFormat
    tensors : tuple of StoredTensor
        What it is stored as; the values first.
    unpack : callable
        Reads it.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    tensors: tuple[StoredTensor, ...]
    unpack: Callable[[], QuantizedWeight]

    @property
    def path(self) -> Path:
        """The file of its values."""
        return self.tensors[0].path

    def load(self) -> QuantizedWeight:
        """Read it.

        Raises
        ------
        CheckpointError
            If a scale is no positive number, or a value is NaN.
        """
        weight = self.unpack()
        scales = weight.scales.astype(np.float32)
        bad = scales[~(np.isfinite(scales) & (scales > 0))]
        if weight.input_scale is not None and not (np.isfinite(weight.input_scale) & (weight.input_scale > 0)).all():
            bad = weight.input_scale
        if bad.size:
            raise CheckpointError(
                f"{self.path}: the weight of {self.name!r} has a scale of {bad.flat[0]:g}, but scales are above 0 and "
                "finite: copy or download it again"
            )
        nan = self.format.kind == "fp8" and bool((weight.values.view(np.uint8) & 0x7F == 0x7F).any())
        if nan or (weight.pre_scale is not None and not np.isfinite(weight.pre_scale).all()):
            raise CheckpointError(
                f"{self.path}: the weight of {self.name!r} holds NaN or infinity: copy or download it again"
            )
        return weight


@dataclass(frozen=True)
class Linear:
    """A linear layer that a checkpoint may have quantized.

    Attributes
    ----------
    name : str
        Of the layer in the file, without ``.weight``.
    shape : tuple of int
        Of its weight, ``[out, in]``.
    stored : mapping
        All tensors of the checkpoint, by name.
    folder : Path
    """

    name: str
    shape: tuple[int, ...]
    stored: Mapping[str, StoredTensor]
    folder: Path

    def find(self, suffix: str) -> StoredTensor | None:
        """One of its tensors, if it is there."""
        return self.stored.get(f"{self.name}.{suffix}")

    def take(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """One of its tensors, which must have one of some dtypes and, where any is given, of some shapes.

        Raises
        ------
        CheckpointError
        """
        found = self.find(suffix)
        if found is None:
            raise CheckpointError(
                f"{self.folder} lacks the tensor {self.name + '.' + suffix!r}, which that layer's quantized weight "
                "needs: download the weights again"
            )
        if shapes and found.shape not in shapes:
            raise CheckpointError(
                f"{found.path}: tensor {found.name!r} has shape {list(found.shape)}, but {list(shapes[0])} is what the "
                f"quantization of a weight {list(self.shape)} asks for: use the config that belongs to these weights"
            )
        if found.dtype not in dtypes:
            raise CheckpointError(
                f"{found.path}: tensor {found.name!r} is stored as {found.dtype}, but its quantization needs "
                f"{' or '.join(dtypes)}: use the config that belongs to these weights"
            )
        return found

    def check_groups(self, group_size: int) -> int:
        """The columns that share a scale, -1 being all; reject groups that do not divide the layer's inputs."""
        columns = self.shape[1] if group_size == -1 else group_size
        if columns < 1 or self.shape[1] % columns:
            raise CheckpointError(
                f"{self.folder} has weights in groups of {group_size}, which do not divide the {self.shape[1]} inputs "
                f"of {self.name!r}: use a model quantized with groups that do"
            )
        return columns


FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Dialect:
    """A dialect of quantized checkpoints.

    Attributes
    ----------
    name : str
        As its ``quant_method`` says it.
    library : str
        What writes it, for people.
    file : str or None
        Of the folder, where the dialect has its settings in a file of their own.
    keys : tuple of KeyRule
        What becomes of each key of its settings.
    reader : callable
        Of settings, and the path that messages name: what reads a linear layer, or says by None that it is not
        quantized.
    sections : mapping
        The same of keys within some of them, by what they are called.
    """

    name: str
    library: str
    file: str | None
    keys: tuple[KeyRule, ...]
    reader: Callable[[dict[str, Any], Path], Callable[[Linear], StoredWeight | None]]
    sections: Mapping[str, tuple[KeyRule, ...]] = field(default_factory=dict)

    def rule(self, key: str) -> KeyRule | None:
        """What becomes of a key; None for one that the dialect does not know."""
        return next((rule for rule in self.keys if key in rule.keys), None)

    def open(self, settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
        """Check settings against the table of keys, and give what reads a layer.

        Raises
        ------
        CheckpointError
            If a key has a value that is not supported.
        """
        check_keys(settings, self.keys, path, self.name)
        return self.reader(settings, path)


def check_keys(settings: Mapping[str, Any], keys: tuple[KeyRule, ...], path: Path, name: str) -> None:
    """Reject a rejected key, and warn of those that nobody knows."""
    rules = {key: rule for rule in keys for key in rule.keys}
    for key, value in settings.items():
        found = rules.get(key)
        if found is not None and found.treatment == "rejected" and value not in found.unless:
            raise CheckpointError(
                f"{path} sets {key} of its {name} weights to {reprlib.repr(value)} ({found.note}), which is not "
                "supported: use a model without it"
            )
    unknown = [key for key in settings if key not in rules]
    if unknown:
        log.warning("%s has keys of its %s weights that nobody knows here: %s", path, name, ", ".join(unknown))


def parse(model: type[S], settings: Mapping[str, Any], path: Path, name: str) -> S:
    """Settings as a model of them; reject what it does not take, in one sentence."""
    try:
        return model(**settings)
    except ValidationError as e:
        raise CheckpointError(f"{path}: {name} weights: {first_error(e)}") from None


def words(tensor: StoredTensor, bits: int, axis: int) -> np.ndarray:
    """The integers of a tensor of 32-bit words, which hold ``32 / bits`` each along an axis, the lowest bits first."""
    packed = np.ascontiguousarray(tensor.load()).view(np.uint32)
    return spread_words(packed, bits, axis)


def spread_words(packed: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """uint32 ``[n, m]`` to uint8 with ``32 / bits`` times as many along an axis."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    by_axis = packed if axis else packed.T
    values = (by_axis[:, :, None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)
    flat = values.reshape(len(by_axis), -1)
    return flat if axis else np.ascontiguousarray(flat.T)
