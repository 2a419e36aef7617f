"""What ``python -m benchmarks engine`` measures and what it must reach, as data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from benchmarks.common.target import Limit
from saw_trtllm.engine.limits import BuildConfig, PluginConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.plugins.library import ALL_GATHER, ALL_REDUCE, ATTENTION, GEMM, QUANTIZED_GEMM, WRITE

#: Formats of the cache, in the order in which they are measured.
KVS = ("fp16", "int4", "saw_int4")

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
QUICK_BATCHES, QUICK_CONTEXTS = (1, 16, 64, 256), (1024, 8192)
#: Steps whose layers are timed one by one: a batch and its contexts.
PROFILED = {1: (8192,), 64: (1024, 8192), 256: (2048,)}

#: Steps that peers are measured in.
PEER_STEPS = ((1, 1024), (1, 8192), (8, 4096), (64, 1024), (64, 8192))

#: The run through the whole runtime: so many requests at once, each with a prompt and a text of so many tokens.
LOOP_BATCH, LOOP_PROMPT, LOOP_TEXT = 64, 1024, 192

_LAYER = "transformer.layers."

#: Layers and words of Llama 3 8B.
LLAMA_LAYERS, LLAMA_VOCAB = 32, 128256

#: Parts of a step. ``ends`` are the nodes with the embedding and with the logits: TensorRT joins GEMMs of the first and
#: of the last layer to them.
Part = Literal["attention", "kv_write", "gemm", "ranks", "rest", "ends"]
PARTS: dict[Part, str] = {
    "attention": "attention",
    "kv_write": "KV write",
    "gemm": "GEMMs",
    "ranks": "sums and gathers between ranks",
    "rest": "rest of the layers",
    "ends": "embedding, logits and what is joined to them",
}


_LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=4096,
    num_hidden_layers=LLAMA_LAYERS,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_size=128,
    intermediate_size=14336,
    vocab_size=LLAMA_VOCAB,
    max_position_embeddings=131072,
    rotary_base=500000.0,
)
_LLAMA_70B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
_QWEN_32B = {
    "architecture": "Qwen3ForCausalLM",
    "qk_layernorm": True,
    "norm_epsilon": 1e-6,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "rotary_base": 1e6,
}
#: Models whose shapes the engines may have, by the words that tables have for them.
MODELS = {
    "Llama 3 8B": _LLAMA_8B,
    "Llama 3 70B": _LLAMA_8B.model_copy(update=_LLAMA_70B),
    "Qwen3 32B": _LLAMA_8B.model_copy(update=_QWEN_32B),
}


def flag_of(model: str) -> str:
    """What ``--model`` calls one of :data:`MODELS`."""
    return model.lower().replace(" ", "-")


def model_config(
    model: str, num_layers: int | None = None, vocab_size: int | None = None, dtype: str = "float16"
) -> ModelConfig:
    """The shape of one of :data:`MODELS`, with another number of layers and words if given."""
    shape = MODELS[model]
    given = {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "dtype": dtype}
    return shape.model_copy(update={name: value for name, value in given.items() if value is not None}, deep=True)


def llama_config(num_layers: int, vocab_size: int = LLAMA_VOCAB, dtype: str = "float16") -> ModelConfig:
    """The shape of Llama 3 8B with so many layers and words."""
    return model_config("Llama 3 8B", num_layers, vocab_size, dtype)


def build_limits() -> BuildConfig:
    """The engines' limits: all cases, and the run through the runtime."""
    longest = max(CONTEXTS)
    return BuildConfig(
        max_batch_size=max(BATCHES),
        max_input_len=longest,
        max_seq_len=longest + 64,
        max_num_tokens=8192,
        plugin_config=PluginConfig(tokens_per_block=64),
    )


#: What a run must reach: in words, where ``{}`` stands for the limit; the property of
#: :class:`~benchmarks.engine.record.EngineResults` that is compared; and the limit.
TARGETS = (
    ("saw_int4's step at most {}x int4's, at its worst batch and context", "int4_ratio", Limit(1.01, least=False)),
    ("saw_int4 at least {}x the tokens/s of fp16 at 64x8192", "speedup", Limit(1.9)),
    ("saw_int4 never below {}x the tokens/s of fp16", "least_speedup", Limit(0.99)),
    ("saw_int4 holds at least {}x the tokens of fp16 in the same pool", "capacity", Limit(3.7)),
    ("GPU busy at least {} of a step at batch 64", "busy", Limit(0.95)),
    ("start-up at most {} s longer than reading the engine's file", "startup", Limit(10.0, least=False)),
)


def parse_kvs(text: str) -> list[str]:
    """Formats of the cache, separated by commas.

    Raises
    ------
    ConfigError
        If one is none.
    """
    kvs = text.split(",")
    for kv in kvs:
        if kv not in KVS:
            raise ConfigError(f"--kv names {kv!r}: choose among {', '.join(KVS)}")
    return kvs


def parse_numbers(text: str, known: Sequence[int], flag: str) -> tuple[int, ...]:
    """Numbers separated by commas, from 1 to the largest of those that the engines are built for.

    Raises
    ------
    ConfigError
        If one is none.
    """
    words = [word.strip() for word in text.split(",")]
    numbers = [int(word) if word.isdecimal() else 0 for word in words]
    for word, number in zip(words, numbers, strict=True):
        if not 1 <= number <= max(known):
            raise ConfigError(f"{flag} names {word!r}: give numbers from 1 to {max(known)}, separated by commas")
    return tuple(numbers)


def classify(layer: str, gemm_plugin: bool = False) -> Part:
    """Which part of a step one of TensorRT's layers is, by its name, which is those of all that was fused into it.

    Of an engine with ``gemm_plugin`` no other layer has a GEMM.
    """
    if ATTENTION in layer:
        return "attention"
    if WRITE in layer:
        return "kv_write"
    if ALL_REDUCE in layer or ALL_GATHER in layer:
        return "ranks"
    # A node of many layers is named by its first and its last one.
    node = re.fullmatch(r"\{ForeignNode\[(.*)\.\.\.(.*)\]\}", layer)
    if not all(_LAYER in name for name in (node.groups() if node else (layer,))):
        return "ends"
    if gemm_plugin:
        gemm = GEMM in layer or QUANTIZED_GEMM in layer
        return "gemm" if layer.startswith(_LAYER) and gemm else "rest"
    return "gemm" if node or (layer.startswith(_LAYER) and "linear" in layer) else "rest"
