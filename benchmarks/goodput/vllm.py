"""vLLM under the same load: an engine of the same shape with dummy weights, in this process.

It runs where vLLM is installed, and needs of this project neither a backend nor a GPU library.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.vllm import engine_arguments, import_vllm
from benchmarks.goodput.measure import measure, point
from benchmarks.goodput.record import Load, Point
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.stats import Stats


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
    vllm = import_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def one(arguments: dict[str, Any], pool_bytes: int) -> Point:
        longest = load.system_len + load.first_len + load.turns * (load.turn_len + load.answer_len)
        args = AsyncEngineArgs(
            **arguments,
            max_model_len=longest,
            max_num_seqs=load.conversations,
            kv_cache_memory_bytes=pool_bytes,
        )
        engine = AsyncLLM.from_engine_args(args)
        try:
            report = await measure(VllmServer(engine, vllm.SamplingParams), load, shape.vocab_size)
        finally:
            engine.shutdown()
        return point(f"vLLM {vllm.__version__}", kv, pool_bytes, 0, report)

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        arguments = engine_arguments(Path(folder), shape, kv)
        for pool_bytes in pools:
            yield asyncio.run(one(arguments, pool_bytes))
