"""TensorRT-LLM's own networks of small models, built by a real TensorRT and driven as its executor does.

Networks and runs are recorded (``tests/support/record_frontend.py``): at test time, where TensorRT-LLM's source and
PyTorch are, or beforehand, in the folder that ``SAW_TENSORRT_LLM_RECORDING`` names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.engine.step import DECODE
from saw_trtllm.plugins.library import PRELOAD_LIBRARY, library_path
from tests.support import ROOT, network_recording, recorded_run
from tests.support.executor.blocks import PRIMARY, SECONDARY, Copy
from tests.support.executor.contract import GRAPH_ROUNDING

RECORDING, SOURCE = "SAW_TENSORRT_LLM_RECORDING", "SAW_TENSORRT_LLM_SOURCE"
#: As in ``record_frontend.py``, which cannot be imported beside a real TensorRT.
CASES = ["llama", "llama-swapped", "mistral", "qwen2", "qwen3-calibrated"]
#: Bytes of any buffer.
ENOUGH = 1 << 20


HAS_SOURCE = SOURCE in os.environ and importlib.util.find_spec("torch") is not None
pytestmark = pytest.mark.skipif(
    RECORDING not in os.environ and not HAS_SOURCE,
    reason=f"neither {RECORDING} names recordings, nor {SOURCE} the source of TensorRT-LLM beside PyTorch",
)


class Engine:
    """An engine in buffers that stay where they are, its pool, and its CUDA graphs: what an executor holds."""

    def __init__(self, tensorrt: TensorRT, serialized: bytes, pool_shapes: list[dict[str, tuple[int, ...]]]) -> None:
        from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, PinnedBuffer, Stream
        from saw_trtllm.backends.tensorrt.session import Session

        self.stream, logger = Stream(), tensorrt.logger()
        self._runtime = tensorrt.trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(serialized)
        assert engine is not None, logger.reason
        mode = tensorrt.trt.TensorIOMode.INPUT
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == mode]
        self._session = Session(tensorrt, engine, logger)
        self._session.open(self.stream)
        self._shapes = [shapes[PRIMARY] for shapes in pool_shapes]
        self._pools = [DeviceBuffer(int(np.prod(shape))) for shape in self._shapes]
        for pool in self._pools:
            pool.fill(0)
        self._host_pools = [PinnedBuffer(int(np.prod(shapes[SECONDARY]))) for shapes in pool_shapes]
        both = zip(self._pools, self._host_pools, strict=True)
        self._pointers = np.array([[primary.address, secondary.address] for primary, secondary in both], np.int64)
        dtype, shape = tensorrt.pool_pointers(len(self._pools))
        self._host = {"host_kv_cache_pool_pointers": self._pointers.view(dtype).reshape(shape)}
        self._gpu = {n: DeviceBuffer(ENOUGH) for n in names if not n.startswith("host_")}
        self.graphs: dict[tuple[int, int], object] = {}

    def move(self, copy: Copy) -> None:
        """A copy of blocks as the executor makes it: all heads' regions in one, each from its beginning."""
        from saw_trtllm.backends.tensorrt.cuda import call, runtime

        _, layers, two, heads, tokens, row_bytes = self._shapes[copy.pool]
        pitch, regions = tokens * row_bytes, layers * two * heads
        bases = dict(zip((PRIMARY, SECONDARY), self._pointers[copy.pool].tolist(), strict=True))
        source, target = (bases[where] + index * regions * pitch for where, index in (copy.source, copy.target))
        width = (copy.rows or tokens) * row_bytes
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        call(runtime.cudaMemcpy2DAsync, target, pitch, source, pitch, width, regions, kind, self.stream.handle)

    def step(self, step: recorded_run.RecordedStep) -> np.ndarray:
        """Logits of a step. From the second on, decodes alone run as the graph that was captured after the first."""
        from saw_trtllm.backends.tensorrt.cuda import call, runtime

        for copy in step.copies:
            self.move(copy)
        fed = step.inputs | self._host  # host tensors lie where NumPy has them
        for name in set(self.inputs) & self._gpu.keys():
            self._gpu[name].write(fed[name])
        call(runtime.cudaDeviceSynchronize)  # the stream does not wait for the copies of another
        key = self.graph_key(step)
        graph = self.graphs.get(key)
        if graph is not None:
            graph.launch(self.stream)
        else:
            self._enqueue(fed)
        self.stream.synchronize()
        logits = self._gpu["logits"].read(np.float32, step.logits.shape)
        if key is not None and graph is None:
            with self.stream.capture() as self.graphs[key]:
                self._enqueue(fed)
        return logits

    def _enqueue(self, fed: dict[str, np.ndarray]) -> None:
        tensors = {name: (buffer.address, None) for name, buffer in self._gpu.items()}
        for name in self.inputs:
            address = fed[name].ctypes.data if name.startswith("host_") else self._gpu[name].address
            tensors[name] = (address, fed[name].shape)
        self._session.enqueue(0, tensors, self.stream)

    @staticmethod
    def graph_key(step: recorded_run.RecordedStep) -> tuple[int, int] | None:
        types, past = step.inputs["host_request_types"], step.inputs["host_past_key_value_lengths"]
        return (len(types), -(-int(past.max()) // GRAPH_ROUNDING)) if (types == DECODE).all() else None

    def written(self, step: recorded_run.RecordedStep) -> np.ndarray:
        """The rows of a step's tokens."""
        pools = [pool.read(np.uint8, shape) for pool, shape in zip(self._pools, self._shapes, strict=True)]
        return np.stack([pools[p][at] for p, at in self._places(step)], axis=1)

    def write(self, step: recorded_run.RecordedStep) -> None:
        """Put the reference's rows in the place of the engine's."""
        pools = [pool.read(np.uint8, shape) for pool, shape in zip(self._pools, self._shapes, strict=True)]
        for layer, (p, at) in enumerate(self._places(step)):
            pools[p][at] = step.rows[:, layer]
        for pool, array in zip(self._pools, pools, strict=True):
            pool.write(array)

    @staticmethod
    def _places(step: recorded_run.RecordedStep) -> list[tuple[int, tuple]]:
        """Of each layer: its pool, and the index of its rows there."""
        every = slice(None)
        mapping = step.inputs["host_kv_cache_pool_mapping"].tolist()
        return [(p, (step.slots[p, :, 0], place, every, every, step.slots[p, :, 1])) for p, place in mapping]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    if RECORDING in os.environ:
        return Path(os.environ[RECORDING])
    folder = tmp_path_factory.mktemp("recordings")
    # In a process of its own, where a stand-in takes TensorRT's place.
    command = [sys.executable, "-m", "tests.support.record_frontend", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    found = TensorRT.load()
    found.load_plugins()
    return found


@pytest.fixture(scope="module", params=CASES)
def case(request, recordings, tensorrt):
    """A recording and its engine."""
    folder = recordings / request.param
    logger = tensorrt.logger()
    builder = tensorrt.builder(logger)
    replay = network_recording.Replay(folder, tensorrt, builder)
    # The choice of kernels is not what is tested, and takes minutes.
    config = tensorrt.create_config(builder, optimization_level=0)
    replay.add_profiles(builder, config)
    engine = builder.build_serialized_network(replay.network, config)
    assert engine is not None, logger.reason
    return folder, engine


def codes(rows: np.ndarray) -> np.ndarray:
    packed = rows[..., :-4]
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16)


@pytest.mark.parametrize("mode", recorded_run.MODES)
def test_the_engine_serves_the_executors_run(mode, case, tensorrt):
    """As near to the reference as the reference in 16 bits is. Step by step, each begins with the reference's rows; on
    its own, the engine reads what it wrote itself, where a code here and there is the next one."""
    folder, serialized = case
    steps, pool_shapes = recorded_run.load(folder)
    engine = Engine(tensorrt, serialized, pool_shapes)
    assert set(engine.inputs) <= steps[0].inputs.keys() | {"host_kv_cache_pool_pointers"}
    logits, other, furthest, replayed = [], [], 0, 0
    for step in steps:
        replayed += engine.graph_key(step) in engine.graphs
        logits.append(engine.step(step))
        difference = np.abs(codes(engine.written(step)) - codes(step.rows))
        other.append((difference > 0).mean())
        furthest = max(furthest, int(difference.max()))
        if mode == recorded_run.STEP_BY_STEP:
            engine.write(step)
    found, rounded = recorded_run.Accuracy.of(steps, logits), recorded_run.accuracy(folder, mode)
    print(
        f"{folder.name}, {mode}: {len(steps)} steps, {replayed} of them graphs; {sum(map(len, logits))} rows: {found}, "
        f"in 16 bits {rounded}; codes that differ at most {max(other):.4f}, by at most {furthest}"
    )
    assert found.largest <= 2 * rounded.largest
    assert found.median <= 2 * rounded.median
    assert found.other_tokens <= 2 * rounded.other_tokens + 2
    assert replayed > 20
    if mode == recorded_run.STEP_BY_STEP:
        assert max(other) < 0.02
        assert furthest <= 1


@pytest.mark.parametrize("preload", [True, False])
def test_a_program_that_preloads_reads_the_engine(preload, case, tmp_path):
    """As Triton's C++ backend has to: nobody in the process calls for the plugins."""
    (tmp_path / "rank0.engine").write_bytes(bytes(case[1]))
    script = (
        "import sys, tensorrt as trt\n"
        "runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))\n"
        "print(runtime.deserialize_cuda_engine(open(sys.argv[1], 'rb').read()) is not None)\n"
    )
    environment = os.environ | ({"LD_PRELOAD": str(library_path(PRELOAD_LIBRARY))} if preload else {})
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "rank0.engine")], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(preload)), done.stderr
