"""One view of a checkpoint, whichever format it is stored in."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from saw_trtllm.checkpoint import huggingface, tensorrt_llm
from saw_trtllm.checkpoint.families import family_of
from saw_trtllm.checkpoint.layout import (
    EMBEDDING,
    LM_HEAD,
    expected_shapes,
    is_norm,
    layer_prefix,
    unshard,
    unshard_weight,
)
from saw_trtllm.checkpoint.quantization import StoredWeight, find_dialect
from saw_trtllm.checkpoint.reader import NUMPY_DTYPES, StoredTensor, is_finite
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.end_ids import read_end_ids
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat, fuse, fused_format
from saw_trtllm.paths import is_file, is_folder, read_json

#: What the parts of a quantized layer may not differ in, by its field.
_PARTS = {"group_index": "an order of columns", "pre_scale": "factors of their input", "scales": "scales"}


class Checkpoint:
    """A model's configuration and weights under TensorRT-LLM's names, read from disk as they are asked for.

    Opening checks the configuration and, from the files' headers, that every tensor is there with the right shape.

    Attributes
    ----------
    folder : Path
    config : ModelConfig
        Of the whole model, with the ids of its end tokens; ``config.mapping`` is as stored.
    formats : dict[str, WeightFormat]
        Of the weights that are quantized, by name.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        parts: dict[str, list[StoredTensor]],
        quantized: dict[str, list[StoredWeight]],
        sharded: bool,
    ):
        self.folder = folder
        end_ids = read_end_ids(folder)
        # An engine must know them without its model's files, and without a tokenizer.
        self.config = config if end_ids is None else config.model_copy(update={"eos_token_id": list(end_ids)})
        self._shapes = expected_shapes(config)
        self._parts = parts
        self._quantized = quantized
        self._sharded = sharded
        self.formats = {name: self._format(name, weights) for name, weights in quantized.items()}
        self._norm_offset = np.float32(0 if sharded else family_of(config).norm_offset)

    @classmethod
    def open_given(cls, checkpoint_dir: Path | None, model_dir: Path | None) -> Checkpoint:
        """Open the one of two folders that a command was given; raises as :meth:`open`, and if it is not one."""
        if checkpoint_dir is not None and model_dir is not None:
            raise ConfigError("both of --checkpoint_dir and --model_dir was given: give one of them")
        folder = checkpoint_dir or model_dir
        if folder is None:
            raise ConfigError("neither of --checkpoint_dir and --model_dir was given: give one of them")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a Hugging Face or a TensorRT-LLM folder, told apart by its ``config.json``.

        Raises
        ------
        CheckpointError
            If something is missing, damaged or not supported.
        """
        folder = Path(folder)
        if not is_folder(folder, CheckpointError):
            what = "a GGUF file, which cannot be read" if folder.suffix == ".gguf" else "not a folder"
            raise CheckpointError(f"{folder} is {what}: give the folder that holds the model's config.json")
        path = folder / "config.json"
        if not is_file(path, CheckpointError):
            raise CheckpointError(f"{folder} holds no config.json{_instead(folder)}")
        raw = read_json(path, CheckpointError)
        if isinstance(raw.get("architecture"), str):
            return cls(folder, *tensorrt_llm.read(folder, raw), sharded=True)
        if "architectures" in raw:
            return cls(folder, *huggingface.read(folder, raw), sharded=False)
        if "pretrained_config" in raw:
            raise CheckpointError(f"{folder} holds an engine, not a checkpoint: give the folder that it was built from")
        raise CheckpointError(
            f"{path} names neither architectures (Hugging Face) nor architecture (TensorRT-LLM): use a model's own"
        )

    @classmethod
    def of_config(cls, path: Path) -> Checkpoint:
        """A model whose weights are not there, by its ``config.json``: its shapes alone are known.

        Raises
        ------
        CheckpointError
            If it cannot be read, is not supported, or is of quantized weights, whose layers only files tell.
        """
        if not is_file(path, CheckpointError):
            raise CheckpointError(f"{path} is neither a folder nor a file: give a model's folder, or its config.json")
        raw = read_json(path, CheckpointError)
        if isinstance(raw.get("architecture"), str):
            config = tensorrt_llm.read_config(raw, path)
            quantized = config.quantization.get("quant_algo") is not None
        else:
            config = huggingface.read_config(raw, path)
            quantized = find_dialect(path.parent, raw) is not None
        if quantized:
            raise CheckpointError(
                f"{path} is of quantized weights, and which layers are quantized only their files tell: give the folder"
            )
        return cls(path.parent, config, {}, {}, sharded="architecture" in raw)

    @property
    def is_tensorrt_llms(self) -> bool:
        """Whether it is in TensorRT-LLM's format, not in Hugging Face's."""
        return self._sharded

    @property
    def files(self) -> list[Path]:
        """Its config and the files of its weights."""
        weights = {part.path for parts in self._parts.values() for part in parts}
        weights |= {t.path for parts in self._quantized.values() for part in parts for t in part.tensors}
        return [self.folder / "config.json", *sorted(weights)]

    def names(self) -> list[str]:
        """All of the model's tensors: embedding, layers in order, final norm, ``lm_head`` (also where it is tied)."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor, without reading it."""
        return self._shapes[name]

    def nbytes(self, dtype: str | None = None) -> int:
        """Bytes of the weights in ``dtype``, or in 16 or 32 bits as stored, unread; a tied ``lm_head`` counts once."""
        sizes = {name: int(np.prod(self._shapes[name])) for name in self._unique_names()}
        stored = {name: self.config.dtype for name in self._quantized} | {n: p[0].dtype for n, p in self._parts.items()}
        return sum(n * NUMPY_DTYPES[dtype or stored[name]].itemsize for name, n in sizes.items())

    def num_parameters(self) -> int:
        """Weights of the model; a tied ``lm_head`` counts once."""
        return sum(int(np.prod(self._shapes[name])) for name in self._unique_names())

    def keeps_float32(self, name: str) -> bool:
        """Whether a tensor is float32 whatever it is stored in, and no engine should round it."""
        return bool(self._norm_offset) and is_norm(name)

    def load(self, name: str) -> np.ndarray:
        """Read a whole tensor, in the dtype that it is stored in.

        One that is quantized comes dequantized, in float32, and so does one that is :meth:`keeps_float32`.
        """
        if name not in self._shapes:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}: use one of names()")
        if name in self._quantized:
            return self.load_quantized(name).dequantize()
        parts = [part.load() for part in self._stored(name)]
        if self._sharded:
            return unshard(self._stored_name(name), parts, self.config)
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # Added in fp32, as transformers does: 1 + w in bfloat16 would lose most of w.
        return array.astype(np.float32) + self._norm_offset if self.keeps_float32(name) else array

    def load_quantized(self, name: str) -> QuantizedWeight:
        """Read a weight of :attr:`formats` as it is; raises CheckpointError if it is damaged."""
        weights = [stored.load() for stored in self._quantized[name]]
        try:
            return unshard_weight(name, weights, self.config) if self._sharded else fuse(weights, self.formats[name])
        except ValueError as e:
            raise CheckpointError(
                f"{self.where(name)}: its parts have {_PARTS[str(e)]} of their own, and are one layer of "
                "an engine: use a model in which queries, keys and values are quantized alike"
            ) from e

    def load_finite(self, name: str) -> np.ndarray:
        """Read a whole tensor, and reject one that holds NaN or infinity."""
        array = self.load(name)
        if not is_finite(array):
            culprits = [part for part in self._stored(name) if not is_finite(part.load())]
            raise CheckpointError(
                f"{self._where(name, culprits)} holds NaN or infinite weights: copy or download it again"
            )
        return array

    def where(self, name: str) -> str:
        """Name the file and the tensors in it that a tensor comes from, for messages."""
        if name in self._quantized:
            return self._where(name, [stored.tensors[0] for stored in self._quantized[name]])
        return self._where(name, self._stored(name))

    def layer(self, i: int) -> dict[str, np.ndarray]:
        """Read the tensors of layer ``i``, by full name."""
        return {name: self.load(name) for name in self._shapes if name.startswith(layer_prefix(i))}

    def _where(self, name: str, parts: list[StoredTensor]) -> str:
        names = dict.fromkeys(repr(part.name) for part in parts) or [repr(name)]
        return f"{parts[0].path if parts else self.folder}: tensor {' and '.join(names)}"

    def _stored(self, name: str) -> list[StoredTensor]:
        """The parts on disk; none of a tensor that a subclass computes."""
        return self._parts.get(self._stored_name(name), [])

    def _format(self, name: str, weights: list[StoredWeight]) -> WeightFormat:
        """Of a weight in parts: of ranks, or one above the other."""
        found = [weight.format for weight in weights]
        if not self._sharded:
            return cast(WeightFormat, fused_format(found, [weight.shape for weight in weights]))
        columns = found[0].block[1]
        inputs = self._shapes[name][1] if columns == weights[0].shape[1] else columns
        return found[0] if len(found) == 1 else found[0].model_copy(update={"block": (1, inputs)})

    def _stored_name(self, name: str) -> str:
        return EMBEDDING if name == LM_HEAD and self.config.share_embedding_table else name

    def _unique_names(self) -> list[str]:
        return [n for n in self._shapes if not (n == LM_HEAD and self.config.share_embedding_table)]


def _instead(folder: Path) -> str:
    """Say what a folder without a config is, as far as its files tell, and what to give."""
    if is_file(folder / "adapter_config.json", CheckpointError):
        return " but an adapter's: merge it into its base model with PEFT's merge_and_unload, and give that folder"
    if any(folder.glob("*.gguf")):
        return " but a GGUF file, which cannot be read: give the Hugging Face folder that it was made from"
    return ": give the folder of a Hugging Face model or a TensorRT-LLM checkpoint"
