"""The tensors of an engine: a checkpoint's, with rotation and calibration folded in, in the engine's dtype."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from saw_trtllm.checkpoint import NUMPY_DTYPES, Checkpoint, cast
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.checkpoint.layout import (
    LM_HEAD,
    kv_heads_of_rank,
    shard,
    shard_format,
    shard_shape,
    shard_weight,
)
from saw_trtllm.engine.config import CALIBRATION_FILE, EngineConfig, WeightsSource
from saw_trtllm.errors import CheckpointError, EngineError, SawError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.fold import fold_v_frame, fold_v_rotation, layer_of
from saw_trtllm.model.quantization import QuantizedWeight, TensorSpec, Weight, WeightFormat, quantize
from saw_trtllm.paths import reading
from saw_trtllm.plan.checksums import file_checksum, weights_folder

#: What of a model's config is no part of an engine's network.
_FREE = ("dtype", "mapping", "quantization")


@dataclass(frozen=True)
class EngineWeights:
    """What an engine's tensors are made of.

    Attributes
    ----------
    checkpoint : Checkpoint
    config : EngineConfig
    calibration : Calibration or None
        What is folded into the weights and centers the keys.
    rank : int or None
        Whose part of the tensors; None: the whole ones.
    """

    checkpoint: Checkpoint
    config: EngineConfig
    calibration: Calibration | None = None
    rank: int | None = None

    def of_rank(self, rank: int) -> EngineWeights:
        """The part of a rank."""
        return replace(self, rank=rank)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the engine; a tied ``lm_head`` is the embedding."""
        model = self.config.pretrained_config
        tp_size = 1 if self.rank is None else self.config.tp_size
        names = [n for n in self.checkpoint.names() if not (model.share_embedding_table and n == LM_HEAD)]
        return {n: shard_shape(n, model, tp_size) for n in names} | {n: x.shape for n, x in self.constants.items()}

    @cached_property
    def formats(self) -> dict[str, WeightFormat]:
        """Of the weights that are quantized in the engine."""
        whole, model = self.config.saw_int4.quantized, self.config.pretrained_config
        if self.rank is None:
            return whole
        return {name: shard_format(name, format, model, self.config.tp_size) for name, format in whole.items()}

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """What the reference's engine file holds: of a quantized weight its values, scales and what else it has."""
        dtype = self.config.pretrained_config.dtype
        found: dict[str, TensorSpec] = {}
        for name, shape in self.shapes.items():
            if name in self.formats:
                found |= self.formats[name].tensors(name, shape)
            else:
                found[name] = TensorSpec(shape, "float32" if name in self.float32_tensors else dtype)
        return found

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        """What of the calibration is in the engine as it is, by the tensors' names."""
        if self.calibration is None:
            return {}
        whole = self.calibration.tensors(self.config.framed_layers)
        return {name: self._dense_part(name, x) for name, x in whole.items()}

    @property
    def float32_tensors(self) -> set[str]:
        """Tensors of the engine that are float32 whatever its dtype."""
        return self.constants.keys() | {name for name in self.checkpoint.names() if self.checkpoint.keeps_float32(name)}

    def bytes_by_kind(self, dtype: str | None = None) -> dict[str, int]:
        """Bytes of the model's weights by what they are: a quantized format's words, or the dtype of the others.

        ``dtype`` stands in for the engine's, and for all formats, where a backend dequantizes the weights.
        """
        found: dict[str, int] = {}
        for name, shape in self.shapes.items():
            if name in self.constants:
                continue
            format = None if dtype is not None else self.formats.get(name)
            kind = dtype or self.config.pretrained_config.dtype
            size = math.prod(shape) * NUMPY_DTYPES[kind].itemsize
            words, size = (kind, size) if format is None else (format.describe(shape), format.nbytes(shape))
            found[words] = found.get(words, 0) + size
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the model's weights as the engine has them."""
        return sum(self.bytes_by_kind().values())

    def load(self, name: str) -> Weight:
        """Read a tensor, with all that is folded in.

        One of :attr:`formats` comes as the checkpoint has it, or is rounded to its format if that has it in 16 bits.

        Raises
        ------
        CheckpointError
            If it cannot be read, is not finite, or is too large for the engine's dtype.
        """
        if name not in self.formats:
            return self.load_dense(name)
        if name in self.checkpoint.formats:
            return self.part(name, self.checkpoint.load_quantized(name))
        return self.part(name, quantize(self._folded(name), self.config.saw_int4.quantized[name]))

    def load_dense(self, name: str) -> np.ndarray:
        """Like :meth:`load`, of a tensor that is not quantized in the engine."""
        if name in self.constants:
            return self.constants[name]
        dtype = "float32" if self.checkpoint.keeps_float32(name) else self.config.pretrained_config.dtype
        return self._dense_part(name, cast(self._folded(name), dtype, self.checkpoint.where(name)))

    def _folded(self, name: str) -> np.ndarray:
        model, layer = self.config.pretrained_config, layer_of(name)
        tensor = self.checkpoint.load_finite(name)
        # Folded before it is cast, so that a 16-bit weight is rounded once.
        framed = layer in self.config.framed_layers and self.config.kv_format.rotate_v
        if framed and self.calibration is not None:
            tensor = fold_v_frame(name, tensor, model, self.calibration.v_frame[layer])
        elif layer is not None:
            tensor = fold_v_rotation(name, tensor, model, self.config.layer_format(layer))
        return tensor

    def part(self, name: str, whole: Weight) -> Weight:
        """The rank's part of a whole tensor."""
        if isinstance(whole, QuantizedWeight) and self.rank is not None:
            return shard_weight(name, whole, self.config.pretrained_config, self.config.tp_size, self.rank)
        return whole if isinstance(whole, QuantizedWeight) else self._dense_part(name, whole)

    def _dense_part(self, name: str, whole: np.ndarray) -> np.ndarray:
        tp_size, model = self.config.tp_size, self.config.pretrained_config
        if self.rank is None or tp_size == 1:
            return whole
        if name not in self.checkpoint.names():  # of the calibration: KV heads first
            return whole[kv_heads_of_rank(model.num_key_value_heads, tp_size, self.rank)]
        return np.ascontiguousarray(shard(name, whole, model, tp_size, self.rank))

    @contextmanager
    def reading_ahead(
        self, workers: int | None = None, progress: Callable[[str], None] | None = None
    ) -> Iterator[Callable[[str], Weight]]:
        """Give what :meth:`load` does, from threads that are ahead of who asks, for each tensor.

        As many as are read and not taken yet are in memory, up to all of them.

        Parameters
        ----------
        workers : int, optional
            Threads; by default one for each core that this process may use.
        progress : callable, optional
            Called with the name of each tensor that has been read.
        """
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            reading = {name: pool.submit(self.load, name) for name in self.shapes}

            def load(name: str) -> Weight:
                array = reading.pop(name).result()
                if progress is not None:
                    progress(name)
                return array

            try:
                yield load
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def source(self) -> WeightsSource:
        """What an engine without weights records of them."""
        checksums = {}
        for path in self.checkpoint.files:
            with reading(path, CheckpointError):
                checksums[path.name] = file_checksum(path)
        return WeightsSource(checkpoint_dir=os.path.abspath(self.checkpoint.folder), checksums=checksums)


def stripped_weights(folder: Path, config: EngineConfig) -> EngineWeights:
    """The weights of the engine in ``folder``, which was built without them.

    Raises
    ------
    EngineError
        If they are not there any more, or of another model.
    """
    source = config.saw_int4.weights
    if source is None:
        raise EngineError(f"the engine in {folder} has its own weights: saw-refit is for engines of --strip_plan")
    place = weights_folder(folder, source)
    try:
        checkpoint = Checkpoint.open(place)
        calibration = Calibration.load(folder / CALIBRATION_FILE) if config.saw_int4.k_center else None
    except SawError as e:
        raise EngineError(f"the engine in {folder} cannot be given its weights: {e}") from e
    check_same_model(checkpoint, config, folder)
    return EngineWeights(checkpoint, config, calibration)


def check_same_model(checkpoint: Checkpoint, config: EngineConfig, folder: Path) -> None:
    """Raise :class:`EngineError` if the engine in ``folder`` is of another model than a checkpoint.

    Weights in 16 bits are rounded to the engine's formats, and quantized ones dequantized where the engine has 16 bits.
    """
    ours, theirs = (model.model_dump() for model in (config.pretrained_config, checkpoint.config))
    for name in (*ModelConfig.model_fields, "logits_dtype"):
        if name not in _FREE and ours.get(name) != theirs.get(name):
            raise EngineError(
                f"the engine in {folder} is of a model with {name} {ours.get(name)} and {checkpoint.folder} has "
                f"{theirs.get(name)}: give weights of the same shape, or build an engine with saw-build"
            )
    for name, format in config.saw_int4.quantized.items():
        found, shape = checkpoint.formats.get(name), checkpoint.shape(name)
        if found != format and (found is not None or not format.writable):
            has = "16 bits" if found is None else found.describe(shape)
            raise EngineError(
                f"the engine in {folder} has {name!r} as {format.describe(shape)}, and {checkpoint.folder} has "
                f"{has}: give weights that are quantized in the same way, or build an engine with saw-build"
            )
