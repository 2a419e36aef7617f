"""The runtime's executor over the reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from safetensors import SafetensorError, safe_open

from saw_trtllm.checkpoint.layout import shard_format, shard_shape
from saw_trtllm.engine.config import CONFIG_FILE, EngineConfig, engine_file
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.errors import BackendUnavailableError, EngineError
from saw_trtllm.model.quantization import QuantizedWeight, Weight
from saw_trtllm.paths import is_file
from saw_trtllm.runtime.collectives import ALONE, Collectives
from saw_trtllm.runtime.executor import FinishedStep, StepOutput
from saw_trtllm.runtime.host_cache import BlockCopy, CopiesMade
from saw_trtllm.runtime.sampling import SamplingState, sample, top_logprobs

try:
    import torch  # the lack of it is said here in one sentence rather than by whoever imports it first
except ImportError as e:
    raise BackendUnavailableError(
        "the reference backend needs PyTorch, which is not installed: pip install 'saw-trtllm[reference]'"
    ) from e

from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.model import ReferenceModel, calibrated_inputs
from saw_trtllm.backends.reference.threads import one_thread


class ReferenceExecutor:
    """Runs an engine of the reference backend on the CPU.

    Parameters
    ----------
    folder : Path
        The engine folder; a rank's file is a safetensors file of the weights and a calibration's constants.
    config : EngineConfig
    max_tokens : int, optional
        Tokens of the pool. By default what ``memory_fraction`` of the available memory holds, and at most what
        ``max_batch_size`` sequences of ``max_seq_len`` need.
    memory_fraction : float
        Share of the available host memory that the pool may take.
    host_cache_size : int
        Bytes for blocks that leave the pool.
    collectives : Collectives
        The engine's ranks, all of which open it at once.

    Raises
    ------
    EngineError
        If the engine file is damaged, or the pool could not hold one sequence.
    """

    asynchronous = False

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        max_tokens: int | None,
        memory_fraction: float,
        host_cache_size: int = 0,
        collectives: Collectives = ALONE,
    ) -> None:
        model, build = config.pretrained_config, config.build_config
        ours = config.of_rank()
        self._num_threads = torch.get_num_threads()
        path = folder / engine_file(collectives.rank)
        if not is_file(path, EngineError):
            raise EngineError(f"{path} does not exist: build it anew with saw-build")
        try:
            with safe_open(path, framework="np") as weights:
                load = weights.get_tensor
                read = partial(_weight, load, config)
                inputs = calibrated_inputs(ours, load)
                self._model = ReferenceModel(model, read, build.max_seq_len, **inputs, collectives=collectives)
        except ValueError as e:
            raise EngineError(f"{path} does not fit its {CONFIG_FILE} ({e}): build it anew with saw-build") from e
        except (OSError, SafetensorError) as e:
            raise EngineError(f"{path} cannot be read as an engine ({e}): build it anew with saw-build") from e
        if max_tokens is None:
            free = psutil.virtual_memory().available // collectives.size
            fitting = int(memory_fraction * free) // ours.block_bytes
            fitting = min(int(n) for n in collectives.all_gather(np.array(fitting)))
            self.num_blocks = min(fitting, ours.blocks_of_tokens(build.max_batch_size * build.max_seq_len))
            max_tokens = ours.tokens_of_blocks(self.num_blocks)
        else:
            self.num_blocks = ours.blocks_of_tokens(max_tokens)
        if self.num_blocks == 0:
            raise EngineError(
                f"the KV cache would hold {max_tokens} tokens and a block has {build.tokens_per_block}: give it more "
                f"memory or tokens"
            )
        try:
            shape = (self.num_blocks, ours.pretrained_config.num_key_value_heads, build.tokens_per_block)
            self.cache = PagedCache(config.pools, *shape)
            self.num_host_blocks = host_cache_size // ours.block_bytes
            self._host = torch.empty(self.num_host_blocks, ours.block_bytes, dtype=torch.uint8)
            # glibc gives a freed block back to the system, and faults it in anew at the next step, unless a larger one
            # was freed before: keeping blocks of up to 31 MiB makes steps of 16 sequences 2 to 3 times as fast.
            torch.empty(31 << 20, dtype=torch.uint8)
        except RuntimeError as e:
            raise EngineError(
                f"a KV cache of {max_tokens} tokens does not fit into this machine's memory: give it fewer tokens"
            ) from e

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> FinishedStep:
        """Compute a step; see :class:`saw_trtllm.runtime.executor.Executor`."""
        return FinishedStep(lambda draws: self.execute(step, draws, context_logits), sampling)

    def execute(
        self, step: StepInputs, sampling: Sequence[SamplingState | None], context_logits: Sequence[bool]
    ) -> StepOutput:
        """Compute a step whose draws are known."""
        self.cache.copy(step.copies)
        every = any(context_logits)
        with one_thread(self._num_threads):
            logits = self._model.forward(step, self.cache, all_logits=every).numpy()
        ends = step.last_token_ids if every else np.arange(1, len(sampling) + 1)
        starts = np.concatenate([[0], ends[:-1]])
        tokens, logprobs, kept, tops = [], [], [], []
        for state, wants_all, start, end in zip(sampling, context_logits, starts, ends, strict=True):
            token, logprob = (-1, 0.0) if state is None else sample(logits[end - 1], state)
            tokens.append(token)
            logprobs.append(logprob)
            top = 0 if state is None else state.params.top_logprobs
            tops.append(top_logprobs(logits[end - 1], top) if top else [])
            wants_last = state is not None and state.params.needs_logits
            # Copies, since a view would keep the logits of the whole step in memory.
            first = start if wants_all else end - 1
            kept.append(logits[first:end].copy() if wants_all or wants_last else None)
        return StepOutput(tokens, logprobs, kept, tops)

    @property
    def num_ready_host_blocks(self) -> int:
        """Blocks that the host can hold: all of them at once."""
        return self.num_host_blocks

    def host_block(self, slot: int) -> np.ndarray:
        """The bytes of a place of the host; see :class:`saw_trtllm.runtime.host_cache.HostBlocks`."""
        return self._host[slot].numpy()

    def transfer(self, stores: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> CopiesMade:
        """Copy blocks to the host and back; see :class:`saw_trtllm.runtime.host_cache.HostBlocks`."""
        start = 0
        for pool in self.cache.pools:
            rows = pool.data.flatten(1)
            host, start = self._host[:, start : start + rows.shape[1]], start + rows.shape[1]
            for block, slot in stores:
                host[slot] = rows[block]
            for block, slot in loads:
                rows[block] = host[slot]
        return CopiesMade()

    def shutdown(self) -> None:
        """Release the cache and the weights."""
        del self._model, self.cache, self._host


def _weight(load: Callable[[str], np.ndarray], config: EngineConfig, name: str) -> Weight:
    """A tensor of a rank's file, or the quantized weight that several of them are."""
    format = config.saw_int4.quantized.get(name)
    if format is None:
        return load(name)
    model = config.pretrained_config
    format, shape = shard_format(name, format, model, config.tp_size), shard_shape(name, model, config.tp_size)
    arrays = {tensor: load(tensor) for tensor in format.tensors(name, shape)}
    return QuantizedWeight.of_arrays(format, name, shape, arrays)
