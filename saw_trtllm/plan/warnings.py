"""What of a build will not work, or not well, though the engine is built: one sentence each."""

from __future__ import annotations

import numpy as np

from saw_trtllm.checkpoint import Checkpoint, tokenizer_files
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.runtime.tokenizer import Tokenizer

#: Length of a head's key bias over that of the rest of its keys from which on the bias takes most of a row's range.
_LARGE_BIAS = 3.0


def tokenizer_warning(checkpoint: Checkpoint) -> str | None:
    """Say what will not work for want of a tokenizer that fits; reject one that cannot be read or copied."""
    folder, vocab = checkpoint.folder, checkpoint.config.vocab_size
    if "tokenizer.json" not in tokenizer_files(folder):
        return (
            f"{folder} holds no tokenizer.json: the engine takes token ids, and text (saw-run, saw-triton) needs a "
            "folder that holds one, as transformers' save_pretrained writes it, with --tokenizer_dir"
        )
    size = Tokenizer.load(folder).vocab_size
    if size > vocab:
        return (
            f"{folder / 'tokenizer.json'} has {size} tokens and the model {vocab}: a prompt with a token beyond the "
            "model's will be rejected"
        )
    return None


def key_bias_warning(checkpoint: Checkpoint, config: EngineConfig) -> str | None:
    """Say so where a bias of the keys drowns what differs from key to key in 4 bits, and nothing centers the keys.

    Only the layer with the largest bias is read: its keys' rms without the bias follows from the weights, since what
    they are multiplied with has an rms of 1 before the norm's own weights.
    """
    model, saw = config.pretrained_config, config.saw_int4
    if not (model.attn_bias and config.kv_format.quantized) or saw.k_center:
        return None
    first, rows = model.num_attention_heads * model.head_size, model.num_key_value_heads * model.head_size

    def heads(name: str) -> np.ndarray:
        keys = checkpoint.load(name)[first : first + rows].astype(np.float32)
        return keys.reshape(model.num_key_value_heads, -1)

    prefixes = [f"transformer.layers.{i}." for i in range(model.num_hidden_layers)]
    lengths = [np.linalg.norm(heads(f"{p}attention.qkv.bias"), axis=-1).max() for p in prefixes]
    layer = int(np.argmax(lengths))
    norm = checkpoint.load(f"{prefixes[layer]}input_layernorm.weight").astype(np.float32)
    weight = heads(f"{prefixes[layer]}attention.qkv.weight").reshape(model.num_key_value_heads, -1, len(norm)) * norm
    bias = np.linalg.norm(heads(f"{prefixes[layer]}attention.qkv.bias"), axis=-1)
    largest = float((bias / np.linalg.norm(weight, axis=(1, 2))).max())
    if not largest > _LARGE_BIAS:
        return None
    return (
        f"the bias of the keys is up to {largest:.0f} times as large as what differs from key to key (layer {layer}), "
        "and 4-bit rows would hold little else: run saw-calibrate and give its file with --calibration"
    )
