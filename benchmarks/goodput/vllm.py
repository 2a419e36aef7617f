"""vLLM under the same load: an engine of the same shape with dummy weights, in this process.

It runs where vLLM is installed, and needs of this project neither a backend nor a GPU library.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.goodput.record import Load, Point
from benchmarks.goodput.run import measure, point
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.stats import Stats

#: vLLM's words for a cache, and the dtype of the activations: its fp8 kernels want bfloat16.
CACHES = {"fp16": ("auto", "float16"), "fp8": ("fp8", "bfloat16")}


class _Text(NamedTuple):
    token_ids_diff: list[int]
    token_ids: list[int]


class _Output(NamedTuple):
    outputs: list[_Text]
    prompt_token_ids: list[int]
    num_reused_tokens: int


class VllmServer:
    """vLLM's engine with what a load asks of an :class:`saw_trtllm.LLM`.

    Parameters
    ----------
    engine : AsyncLLM
        Or what has its ``generate``.
    sampling : callable
        vLLM's ``SamplingParams``.
    """

    tokenizer = None

    def __init__(self, engine: Any, sampling: Any) -> None:
        self._engine, self._sampling, self._stats = engine, sampling, Stats()

    def stats(self) -> Stats:
        """The tokens of all prompts, and those of them that it found."""
        return Stats(**vars(self._stats))

    async def generate_async(
        self, prompt: list[int], params: SamplingParams, streaming: bool = True
    ) -> AsyncIterator[_Output]:
        """A text, piece by piece."""
        asked = self._sampling(max_tokens=params.max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        known: list[int] = []
        found = 0
        async for output in self._engine.generate({"prompt_token_ids": prompt}, asked, uuid.uuid4().hex):
            tokens = list(output.outputs[0].token_ids)
            found = output.num_cached_tokens or found
            yield _Output([_Text(tokens[len(known) :], tokens)], prompt, found)
            known = tokens
        self._stats.prompt_tokens_total += len(prompt)
        self._stats.reused_tokens_total += found


def run_vllm(shape: ModelConfig, kv: str, pools: Sequence[int], load: Load) -> Iterator[Point]:
    """A cache of vLLM's with each pool in turn.

    Raises
    ------
    BackendUnavailableError
        If vLLM is not installed.
    ConfigError
        If it is asked for a shape that this does not write for it.
    """
    if shape.architecture != "LlamaForCausalLM":
        raise ConfigError(f"vLLM is measured on Llama's shape, and the engine is of {shape.architecture}")
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0")
    try:
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(f"vLLM cannot be imported ({e}): install it beside this project") from e

    async def one(folder: str, pool_bytes: int) -> Point:
        cache, dtype = CACHES[kv]
        longest = load.system_len + load.first_len + load.turns * (load.turn_len + load.answer_len)
        args = AsyncEngineArgs(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype,
            kv_cache_dtype=cache,
            max_model_len=longest,
            max_num_seqs=load.conversations,
            max_num_batched_tokens=8192,
            kv_cache_memory_bytes=pool_bytes,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        engine = AsyncLLM.from_engine_args(args)
        try:
            report = await measure(VllmServer(engine, vllm.SamplingParams), load, shape.vocab_size)
        finally:
            engine.shutdown()
        return point(f"vLLM {vllm.__version__}", kv, pool_bytes, 0, report)

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        Path(folder, "config.json").write_text(json.dumps(hugging_face_config(shape)))
        for pool_bytes in pools:
            yield asyncio.run(one(folder, pool_bytes))


def hugging_face_config(shape: ModelConfig) -> dict[str, Any]:
    """A Llama's shape as vLLM reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary_base,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": shape.hidden_act,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
