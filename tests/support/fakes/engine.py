"""TensorRT's runtime over :mod:`.cuda`: an engine that computes what the reference does, in the GPU's stand-in.

Its engine file is that of the reference backend. It is as strict as TensorRT and the plugins are: shapes within their
profile, addresses where they belong, host tensors read when a step is enqueued and the others when it runs.
"""

from __future__ import annotations

import ctypes
import math
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.model import ReferenceModel, calibrated_inputs
from saw_trtllm.backends.tensorrt.constants import weight_inputs
from saw_trtllm.backends.tensorrt.profiles import profiles, shapes, step_inputs
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.engine.tensors import LOGITS
from saw_trtllm.plugins.library import VERSION
from saw_trtllm.runtime.sampling import SamplingState, sample, top_logprobs
from saw_trtllm.runtime.sampling_params import MAX_TOP_LOGPROBS
from tests.support.fakes import cuda as fake_cuda
from tests.support.fakes import tensorrt as fake
from tests.support.fakes import tensorrt_86 as fake_tensorrt_86
from tests.support.fakes.cuda import TOTAL, Cuda
from tests.support.frames import unpack_frame

ACTIVATIONS = 1 << 20


class Module(fake_tensorrt_86.Module):
    """``tensorrt`` 8.6, as far as running an engine goes.

    Parameters
    ----------
    cuda : Cuda
    config : EngineConfig
        The engine's.
    """

    def __init__(self, cuda: Cuda, config: EngineConfig) -> None:
        super().__init__()
        self.cuda, self.config = cuda, config
        self.engine_config = config  # of the network that the engine file was built from
        self.num_profiles = 2
        self.refusing: set[int] = set()  # profiles whose steps fail
        self.IProfiler = type("IProfiler", (), {"__init__": lambda self: None})
        self.Runtime = lambda logger: _Runtime(self, logger)


def install(monkeypatch: Any, folder: Path, total: int = TOTAL, module: type[Module] = Module) -> Module:
    """Put CUDA's, TensorRT's and the sampler's stand-ins in their places until the test ends, for a folder's engine."""
    cuda = fake_cuda.install(monkeypatch, total)
    tensorrt = module(cuda, EngineConfig.load(folder))
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    sampler = types.ModuleType("saw_trtllm.backends.tensorrt.sampler")
    sampler.GpuSampler = lambda *sizes: Sampler(cuda, *sizes)
    monkeypatch.setitem(sys.modules, "saw_trtllm.backends.tensorrt.sampler", sampler)
    return tensorrt


def as_tensorrt(folder) -> EngineConfig:
    """Have a folder of the reference backend pass for one that TensorRT 8.6 built for this GPU."""
    config = EngineConfig.load(folder)
    versions = {"plugin_version": VERSION, "tensorrt_version": "8.6.0", "compute_capability": "9.0"}
    section = config.saw_int4.model_copy(update={"backend": "tensorrt", **versions})
    config = config.model_copy(update={"saw_int4": section})
    config.save(folder)
    return config


class _Runtime:
    def __init__(self, module: Module, logger: Any) -> None:
        self._module, self._logger = module, logger

    def deserialize_cuda_engine(self, data: Any) -> _Engine | None:
        try:
            weights = safetensors.numpy.load(bytes(data))
        except Exception as e:
            self._logger.log(1, f"magicTag does not match: {e}")
            return None
        size = sum(array.nbytes for array in weights.values())
        error, address = self._module.cuda.cudaMalloc(size)
        if error:
            self._logger.log(1, "out of memory")
            return None
        engine = _Engine(self._module, address)
        engine.take(weights)
        return engine


class _Engine:
    def __init__(self, module: Module, address: int) -> None:
        self.module, self._address = module, address
        config = module.engine_config
        self.inputs = {x.name: x for x in step_inputs(config, TensorRT(module))}
        self.weight_inputs = weight_inputs(config)
        self.ranges = profiles(config.build_config, decode_profile=module.num_profiles == 2)
        self.num_optimization_profiles = module.num_profiles
        self.device_memory_size = ACTIVATIONS
        self.num_io_tensors = len(self.inputs) + len(self.weight_inputs) + 1

    def take(self, weights: dict[str, np.ndarray]) -> None:
        config = self.module.engine_config

        def constant(name: str) -> np.ndarray:
            array = weights[name]
            return unpack_frame(array).astype(np.float32) if array.ndim == 4 else array  # a refit gives frames packed

        levers = calibrated_inputs(config, constant)
        positions = config.build_config.max_seq_len
        self.model = ReferenceModel(config.pretrained_config, weights.__getitem__, positions, **levers)

    def read_weights(self, addresses: dict[str, int]) -> None:
        """Of an engine whose file has them all there is nothing to read."""
        assert not self.weight_inputs

    def __del__(self) -> None:
        self.module.cuda.device.pop(self._address, None)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.weight_inputs, LOGITS.name][index]

    def get_tensor_dtype(self, name: str) -> Any:
        if name in self.weight_inputs:
            return getattr(fake, self.weight_inputs[name].dtype)
        return fake.float32 if name == LOGITS.name else getattr(fake, self.inputs[name].dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == LOGITS.name:
            return (-1, self.module.engine_config.pretrained_config.vocab_size)
        if name in self.weight_inputs:
            return self.weight_inputs[name].shape
        return tuple(-1 if isinstance(d, str) else d for d in self.inputs[name].shape)

    def create_execution_context_without_device_memory(self) -> _Context:
        return _Context(self)


@dataclass
class _Context:
    engine: _Engine
    device_memory: int = 0
    profile: int = -1
    profiler: Any = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = shapes(self.engine.inputs[name], self.engine.ranges[self.profile])
        self.shapes[name] = shape
        return len(shape) == len(most) and all(a <= x <= b for a, x, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        assert address % (4 if name.startswith("host_") else 256) == 0
        return True

    def execute_async_v3(self, stream: int) -> bool:
        module = self.engine.module
        cuda, config = module.cuda, module.engine_config
        if self.profile in module.refusing:
            return False
        cuda.on_device(self.device_memory, ACTIVATIONS)
        self.engine.read_weights(self.addresses)
        addresses, extents = dict(self.addresses), dict(self.shapes)
        host = {name: self._host(name) for name in self.engine.inputs if name.startswith("host_")}
        pointers = host["host_kv_cache_pool_pointers"].view(np.int64).reshape(len(config.pools), 2)
        assert not host["host_kv_cache_pool_pointers"].flags.writeable or (pointers[:, 1] == 0).all()
        places = {layer: (p, i) for p, pool in enumerate(config.pools) for i, layer in enumerate(pool.layers)}
        assert [tuple(row) for row in host["host_kv_cache_pool_mapping"]] == [places[i] for i in sorted(places)]
        assert (host["host_max_attention_window_sizes"] >= config.build_config.max_seq_len).all()
        num_sequences = extents["last_token_ids"][0]
        types = host["host_request_types"]
        assert (np.diff(types) >= 0).all()

        def run() -> None:
            on_gpu = {
                name: cuda.array(addresses[name], np.int32, extents[name]) for name in extents if name not in host
            }
            step, rows = _step(on_gpu, types)
            logits = self.engine.model.forward(
                step, _cache(config, cuda, pointers[:, 0].tolist()), all_logits=rows is None
            )
            count = extents["input_ids"][0] if rows is None else num_sequences
            target = cuda.array(addresses[LOGITS.name], np.float32, (count, logits.shape[1]))
            target[...] = np.nan
            target[: len(logits)] = logits.numpy()

        def _step(on_gpu, types):
            lengths = on_gpu["sequence_length"]
            used = int((lengths > 0).sum())
            assert (lengths[used:] == 0).all()
            ends = on_gpu["last_token_ids"]
            assert (ends[used:] == ends[used - 1]).all()
            tokens = int(ends[used - 1])
            assert (on_gpu["input_ids"] >= 0).all()
            assert used == num_sequences or types.all(), "only decodes are padded"
            cut = {name: on_gpu[name][:tokens] for name in ("input_ids", "position_ids")}
            cut |= {name: on_gpu[name][:used] for name in ("last_token_ids", "sequence_length")}
            table = on_gpu["kv_cache_block_offsets"][:, :used]
            step = StepInputs(
                **cut, context_lengths=lengths, host_request_types=types[:used], kv_cache_block_offsets=table
            )
            return step, None if config.build_config.gather_context_logits else used

        if self.profiler is not None:
            self.profiler.report_layer_time("all of it", 1.0)
        cuda.streams[stream].put(run)
        return True

    def _host(self, name: str) -> np.ndarray:
        dtype, shape = np.dtype(self.engine.inputs[name].dtype), self.shapes[name]
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(shape)


def _cache(config: EngineConfig, cuda: Cuda, addresses: list[int]) -> PagedCache:
    """The reference's cache over pools that lie in the GPU's memory."""
    model, build = config.pretrained_config, config.build_config
    cache = PagedCache(config.pools, 0, model.num_key_value_heads, build.tokens_per_block)
    regions = [pool.region for pool in config.pools]
    assert all(address == addresses[regions.index(r)] for r, address in zip(regions, addresses, strict=True))
    for region, pool in enumerate(cache.pools):
        address = addresses[regions.index(region)]
        shape = pool.data.shape[1:]
        memory = np.frombuffer(cuda.rest(address), np.uint8)
        pool.data = torch.from_numpy(memory[: len(memory) // math.prod(shape) * math.prod(shape)].reshape(-1, *shape))
    return cache


class Sampler:
    """:class:`saw_trtllm.backends.tensorrt.sampler.GpuSampler` over the stand-in, with the CPU's sampler."""

    def __init__(self, cuda: Cuda, max_sequences: int, vocab_size: int) -> None:
        self._cuda, self._vocab_size = cuda, vocab_size
        self.nbytes = max_sequences * 12
        self.tokens_ptr, self.logprobs_ptr = (cuda.cudaMalloc(max_sequences * n)[1] for n in (4, 8))
        top = max_sequences * MAX_TOP_LOGPROBS
        self.top_tokens_ptr, self.top_logprobs_ptr = (cuda.cudaMalloc(top * n)[1] for n in (4, 8))
        self._states: list[SamplingState | None] = []

    def prepare(self, sampling) -> None:
        self._states = [s and s._replace(generated=list(s.generated), number=s.draw) for s in sampling]
        wanted = [s.params.top_logprobs if s else 0 for s in sampling]
        self.num_top = wanted if any(wanted) else []

    def enqueue(self, logits_ptr: int, rows_ptr: int, num_rows: int, stream: int) -> None:
        states, num_top = self._states, self.num_top
        assert len(states) == num_rows

        def run() -> None:
            rows = self._cuda.array(rows_ptr, np.int32, (num_rows,)) - 1 if rows_ptr else np.arange(num_rows)
            logits = self._cuda.array(logits_ptr, np.float32, (int(rows.max()) + 1, self._vocab_size))
            drawn = [(-1, 0.0) if s is None else sample(logits[row], s) for s, row in zip(states, rows, strict=True)]
            self._cuda.array(self.tokens_ptr, np.int32, (num_rows,))[:] = [token for token, _ in drawn]
            self._cuda.array(self.logprobs_ptr, np.float64, (num_rows,))[:] = [logprob for _, logprob in drawn]
            for i, count in enumerate(num_top):
                start, likeliest = i * MAX_TOP_LOGPROBS, top_logprobs(logits[rows[i]], count) if count else []
                tokens, logprobs = zip(*likeliest, strict=True) if likeliest else ((), ())
                self._cuda.array(self.top_tokens_ptr + 4 * start, np.int32, (count,))[:] = tokens
                self._cuda.array(self.top_logprobs_ptr + 8 * start, np.float64, (count,))[:] = logprobs

        self._cuda.streams[stream].put(run)

    def resolve(self, input_ids_ptr: int, num_tokens: int, stream: int) -> None:
        def run() -> None:
            ids = self._cuda.array(input_ids_ptr, np.int32, (num_tokens,))
            last = self._cuda.array(self.tokens_ptr, np.int32, (int(-ids.min()),))
            ids[...] = np.where(ids < 0, last[np.maximum(-1 - ids, 0)], ids)

        self._cuda.streams[stream].put(run)

    def close(self) -> None:
        for address in (self.tokens_ptr, self.logprobs_ptr, self.top_tokens_ptr, self.top_logprobs_ptr):
            self._cuda.cudaFree(address)
