"""Reading Hugging Face and TensorRT-LLM checkpoints, and writing TensorRT-LLM's."""

from saw_trtllm.checkpoint.checkpoint import Checkpoint
from saw_trtllm.checkpoint.convert import TOKENIZER_FILES, cast, copy_tokenizer_files, save_checkpoint, tokenizer_files
from saw_trtllm.checkpoint.layout import expected_shapes, shard, shard_shape, unshard
from saw_trtllm.checkpoint.reader import NUMPY_DTYPES
from saw_trtllm.checkpoint.writer import SafetensorsWriter

__all__ = [
    "NUMPY_DTYPES",
    "TOKENIZER_FILES",
    "Checkpoint",
    "SafetensorsWriter",
    "cast",
    "copy_tokenizer_files",
    "expected_shapes",
    "save_checkpoint",
    "shard",
    "shard_shape",
    "tokenizer_files",
    "unshard",
]
