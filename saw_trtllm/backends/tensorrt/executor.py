"""The runtime's executor over a TensorRT engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.backends.tensorrt.cuda import ALIGNMENT, DeviceBuffer, Event, Stream, call, memory_info, runtime
from saw_trtllm.backends.tensorrt.engine_checks import check_versions, read_engine
from saw_trtllm.backends.tensorrt.graphs import DecodeGraphs, buckets
from saw_trtllm.backends.tensorrt.host_pool import CopiesUnderWay, HostPool
from saw_trtllm.backends.tensorrt.memory import MemoryPlan, plan_blocks
from saw_trtllm.backends.tensorrt.ranks import RankGroup, use_gpu_of_rank
from saw_trtllm.backends.tensorrt.results import PendingResult, ResultSlot
from saw_trtllm.backends.tensorrt.sampler import GpuSampler
from saw_trtllm.backends.tensorrt.session import Session
from saw_trtllm.backends.tensorrt.staging import HostTensors, Staging, StepShape
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE, RowCopy, StepInputs, StepPacker, StepSequence
from saw_trtllm.engine.tensors import LAST_TOKEN_IDS, LOGITS, POOL_MAPPING, POOL_POINTERS, WINDOW_SIZES
from saw_trtllm.errors import EngineError, KernelError
from saw_trtllm.runtime.collectives import ALONE, Collectives
from saw_trtllm.runtime.host_cache import BlockCopy
from saw_trtllm.runtime.sampling import SamplingState

log = logging.getLogger(__name__)


class TensorRTExecutor:
    """Runs an engine of the TensorRT backend on the GPU in use.

    All of a step is put on one stream, and nothing waits for it before its result is asked for.

    Parameters
    ----------
    folder : Path
        The engine folder.
    config : EngineConfig
    max_tokens : int, optional
        Tokens of the pool. By default as many as fit; see :func:`saw_trtllm.backends.tensorrt.memory.plan_blocks`.
    memory_fraction : float
        Share of the GPU's memory that is free beside the engine which the pool may take.
    host_cache_size : int
        Bytes of pinned host memory for blocks that leave the pool.
    graphs : bool
        Whether steps of decodes run as CUDA graphs.
    pool_memory : DeviceBuffer, optional
        Where the KV cache lies, for executors of which one runs at a time. By default in memory of its own.
    collectives : Collectives
        The engine's ranks, a process each, all of which open it at once.

    Attributes
    ----------
    num_blocks, num_host_blocks, num_ready_host_blocks : int
    asynchronous : bool
    stream : int
        The CUDA stream.
    memory : MemoryPlan
    buckets : list of int
        Batch sizes of decodes that have a CUDA graph.
    pools, logits : list of DeviceBuffer, DeviceBuffer
        The KV cache, a buffer for each region of its pools, and the logits of the last step: fp32 ``[B, vocab_size]``,
        or of all its tokens.

    Raises
    ------
    BackendUnavailableError
        If TensorRT, CUDA for Python, the plugins or a GPU is missing.
    EngineError
        If the engine does not fit one of them, is damaged, or leaves too little memory.
    """

    asynchronous = True

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        max_tokens: int | None,
        memory_fraction: float,
        host_cache_size: int = 0,
        graphs: bool = True,
        pool_memory: DeviceBuffer | None = None,
        collectives: Collectives = ALONE,
    ) -> None:
        self._config, self._collectives = config.of_rank(), collectives
        self._tensorrt = TensorRT.load()
        if collectives.size > 1:
            use_gpu_of_rank(collectives)
        check_versions(folder, config, self._tensorrt)
        self._tensorrt.load_plugins()
        self._device = call(runtime.cudaGetDevice)
        self._resources = ExitStack()
        try:
            if collectives.size > 1:
                self._hold(RankGroup(collectives))
            self._open(folder, config, max_tokens, memory_fraction, pool_memory)
            self._open_host_pool(host_cache_size)
            self._record(graphs)
        except BaseException:
            self.shutdown()
            raise

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> PendingResult:
        """Begin a step; see :class:`saw_trtllm.runtime.executor.Executor`.

        Raises
        ------
        KernelError
            If TensorRT, a plugin or CUDA rejects it.
        """
        call(runtime.cudaSetDevice, self._device)
        num_sequences = len(context_logits)
        size = self._graphs.size_for(num_sequences) if _decodes_alone(step) else None
        if step.copies:
            self._copy_rows(step.copies)
            self._rows_copied.record(self._stream)
        shape = self._staging.upload(step, self._stream, None if size is None else self._padded(size))
        addresses = self._staging.addresses(shape)
        if step.input_ids.min() < 0:
            self._sampler.resolve(addresses["input_ids"], len(step.input_ids), self._stream.handle)
        if size is None:
            self._session.enqueue(self._profile(step), self._tensors(step, shape), self._stream)
        else:
            self._graphs.launch(size, self._stream)
        rows = addresses[LAST_TOKEN_IDS.name] if self._every_token else 0
        pending = self._free_slot().begin(partial(self._draw, step, context_logits, rows))
        if sampling is not None:
            pending.draw(sampling)
        return pending

    @property
    def num_ready_host_blocks(self) -> int:
        """Blocks that the host can hold yet."""
        return self._host_pool.num_ready

    def host_block(self, slot: int) -> np.ndarray:
        """The bytes of a place of the host; see :class:`saw_trtllm.runtime.host_cache.HostBlocks`."""
        return self._host_pool.block(slot)

    def transfer(self, stores: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> CopiesUnderWay:
        """Begin to copy blocks to the host and from it; see :class:`saw_trtllm.runtime.host_cache.HostBlocks`."""
        call(runtime.cudaSetDevice, self._device)
        return self._host_pool.transfer(stores, loads, self._rows_copied)

    def profile(self, step: StepInputs) -> list[tuple[str, float]]:
        """Run a step of known tokens under TensorRT's profiler, without a graph and without sampling.

        From then on TensorRT takes the time of all steps that run without a graph, which slows them down.

        Returns
        -------
        list of (str, float)
            Name and milliseconds of each layer, in their order.
        """
        times: list[tuple[str, float]] = []

        base: Any = self._tensorrt.trt.IProfiler

        class Profiler(base):
            def __init__(self) -> None:
                super().__init__()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.append((layer_name, ms))

        shape = self._staging.upload(step, self._stream)
        self._session.enqueue(self._profile(step), self._tensors(step, shape), self._stream, Profiler())
        self._stream.synchronize()
        return times

    def shutdown(self) -> None:
        """Free all that the executor holds."""
        try:
            self._resources.close()
        except KernelError as e:  # after a failure of the GPU every call fails
            log.warning("the GPU's memory was not freed: %s", e)

    # -- start

    def _open(
        self,
        folder: Path,
        whole: EngineConfig,
        max_tokens: int | None,
        memory_fraction: float,
        pool_memory: DeviceBuffer | None,
    ) -> None:
        """Read the engine, and give out the GPU's memory."""
        config, model, build = self._config, self._config.pretrained_config, self._config.build_config
        before, total = memory_info()
        logger = self._tensorrt.logger()
        trt_runtime = self._tensorrt.trt.Runtime(logger)
        engine, inputs = read_engine(folder, whole, self._tensorrt, trt_runtime, logger, self._collectives.rank)
        self._hold(inputs)
        weights = before - memory_info()[0]
        self._stream = self._hold(Stream())
        self.stream = self._stream.handle
        self._rows_copied = self._hold(Event())
        self._session = self._hold(Session(self._tensorrt, engine, logger))
        try:
            self._session.open(self._stream, inputs.addresses)
        except KernelError as e:
            raise EngineError(f"the engine in {folder} does not start ({e}): build it anew with saw-build") from e

        pools = config.pools
        self._every_token = build.gather_context_logits
        self._max_blocks = -(-build.max_seq_len // build.tokens_per_block)
        largest = StepShape(build.max_num_tokens, build.max_batch_size, len(pools), self._max_blocks)
        self._staging = self._hold(Staging(largest))
        rows = build.max_num_tokens if self._every_token else build.max_batch_size
        self.logits = self._hold(DeviceBuffer(rows * model.vocab_size * np.dtype(np.float32).itemsize))
        self._sampler = self._hold(GpuSampler(build.max_batch_size, model.vocab_size))
        self._slots = [self._hold(ResultSlot(build.max_batch_size, model.vocab_size)) for _ in range(2)]

        free = memory_info()[0] if pool_memory is None else pool_memory.nbytes
        fitting = plan_blocks(config, free, max_tokens, memory_fraction)
        self.num_blocks = min(int(n) for n in self._collectives.all_gather(np.array(fitting)))
        sizes = [self.num_blocks * size for size in config.region_bytes]
        if pool_memory is None:
            self.pools = [self._hold(DeviceBuffer(size)) for size in sizes]
        else:
            starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
            self.pools = [pool_memory.part(start, size) for start, size in zip(starts, sizes, strict=False)]
        self._host = HostTensors(self._host_arrays(), build.max_batch_size)
        self.memory = MemoryPlan(
            total=total,
            weights=weights,
            activations=self._session.activation_bytes,
            io=self._staging.nbytes + self.logits.nbytes + self._sampler.nbytes,
            pool=sum(sizes),
            free=free - sum(sizes),
            num_blocks=self.num_blocks,
        )

    def _open_host_pool(self, host_cache_size: int) -> None:
        self.num_host_blocks = host_cache_size // self._config.block_bytes
        if self.num_host_blocks:
            self._host_pool = self._hold(HostPool(self.pools, self._config.region_bytes, self.num_host_blocks))

    def _host_arrays(self) -> dict[str, np.ndarray]:
        """The inputs that stay on the host and are the same in every step."""
        config, pools = self._config, self._config.pools
        layers = config.pretrained_config.num_hidden_layers
        dtype, shape = self._tensorrt.pool_pointers(len(pools))
        addresses = np.array([[self.pools[pool.region].address, 0] for pool in pools], np.int64)
        places = {layer: (p, i) for p, pool in enumerate(pools) for i, layer in enumerate(pool.layers)}
        return {
            POOL_POINTERS.name: addresses.view(dtype).reshape(shape),
            POOL_MAPPING.name: np.array([places[layer] for layer in range(layers)], np.int32),
            # The model's own window is a field of the plugin; the smaller one holds.
            WINDOW_SIZES.name: np.full(layers, config.build_config.max_seq_len, np.int32),
        }

    def _record(self, graphs: bool) -> None:
        """Record the graphs, on a pool that is empty, and empty it."""
        self._graphs = self._hold(DecodeGraphs())
        self.buckets = self._graphs.sizes
        if graphs:
            layout = self._config.pool_layout
            step = StepPacker(layout).pack([StepSequence([0], 0, 1, DECODE, layout.entries([0]))])

            def enqueue(size: int) -> None:
                self._session.enqueue(self._decode_profile, self._tensors(None, self._padded(size)), self._stream)

            def prepare(size: int) -> None:
                self._staging.upload(step, self._stream, self._padded(size))

            def agree(recorded: bool) -> bool:
                return all(int(x) for x in self._collectives.all_gather(np.array(int(recorded))))

            sizes = buckets(self._config.build_config.max_batch_size)
            self._graphs.record(sizes, self._stream, prepare, enqueue, agree)
        # Nobody reads a row that was not written; zeros are for who measures steps over a cache that nobody filled.
        for pool in self.pools:
            pool.fill(0)
        self._stream.synchronize()

    # -- steps

    def _draw(
        self,
        step: StepInputs,
        context_logits: Sequence[bool],
        rows: int,
        slot: ResultSlot,
        sampling: Sequence[SamplingState | None],
    ) -> list[slice | None]:
        """Put a step's draws after its layers, and after them what the host wants of it; the rows of its logits."""
        try:
            self._sampler.prepare(sampling)
            self._sampler.enqueue(self.logits.address, rows, len(sampling), self._stream.handle)
            spans = self._wanted(step, sampling, context_logits)
            slot.download(self._stream, self._sampler, self.logits.address, spans)
        except Exception:
            self._stream.synchronize()  # the layers still write to blocks that are others' once the step has failed
            raise
        return spans

    def _copy_rows(self, copies: Sequence[RowCopy]) -> None:
        """Copy rows from block to block, in this order, after the step in flight and before the next."""
        tokens, heads = self._config.build_config.tokens_per_block, self._config.pretrained_config.num_key_value_heads
        for (kv_format, layers), memory in zip(self._config.regions, self.pools, strict=True):
            k, v = kv_format.k_row_bytes, kv_format.row_bytes
            layer = tokens * heads * kv_format.pair_bytes
            for source, target, rows in copies:
                start, end = (memory.address + block * layers * layer for block in (source, target))
                if k == v:
                    self._stream.copy_rows(end, start, tokens * v, rows * v, layers * 2 * heads)
                    continue
                # All layers' rows of a head at once; in a layer K's heads come first.
                sizes = heads * [k] + heads * [v]
                for row, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
                    at = tokens * row
                    self._stream.copy_rows(end + at, start + at, layer, rows * size, layers)

    @property
    def _decode_profile(self) -> int:
        """The optimization profile of steps of decodes: one of their own, if the engine has it."""
        return self._session.num_profiles - 1

    def _profile(self, step: StepInputs) -> int:
        return self._decode_profile if _decodes_alone(step) else 0

    def _padded(self, size: int) -> StepShape:
        return StepShape(size, size, len(self._config.pools), self._max_blocks)

    def _tensors(self, step: StepInputs | None, shape: StepShape) -> dict[str, tuple[int, Sequence[int] | None]]:
        addresses, shapes = self._staging.addresses(shape), shape.tensors
        on_gpu = {name: (addresses[name], shapes[name]) for name in shapes}
        return on_gpu | self._host.tensors(step, shape.num_sequences) | {LOGITS.name: (self.logits.address, None)}

    def _wanted(
        self, step: StepInputs, sampling: Sequence[SamplingState | None], context_logits: Sequence[bool]
    ) -> list[slice | None]:
        """Rows of the logits that each sequence asks for."""
        spans: list[slice | None] = []
        start = 0
        for i, (state, wants_all) in enumerate(zip(sampling, context_logits, strict=True)):
            end = int(step.last_token_ids[i])
            last = end - 1 if self._every_token else i
            if wants_all and self._every_token:
                spans.append(slice(start, end))
            elif wants_all or (state is not None and state.params.needs_logits):
                spans.append(slice(last, last + 1))
            else:
                spans.append(None)
            start = end
        return spans

    def _free_slot(self) -> ResultSlot:
        """The slot whose step ended longer ago."""
        self._slots.reverse()
        return self._slots[0]

    def _hold(self, resource: Any) -> Any:
        self._resources.callback(resource.close)
        return resource


def _decodes_alone(step: StepInputs) -> bool:
    """Whether a step has no prefill: they come first."""
    return int(step.host_request_types[0]) == DECODE
