"""TensorRT 10's runtime over :mod:`tests.support.fakes.cuda`: what the stand-in's builder wrote is opened, takes its
weights from a ``Refitter`` and from where its inputs lie, and computes with them what the reference does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from saw_trtllm.checkpoint import NUMPY_DTYPES, expected_shapes
from saw_trtllm.engine.config import EngineConfig
from tests.support.fakes import tensorrt as fake
from tests.support.fakes.cuda import Cuda
from tests.support.fakes.engine import ACTIVATIONS, _Engine


class Module:
    """``tensorrt`` 10, as far as running such an engine goes; ``refusing`` is what its refitter does not take."""

    __version__ = fake.__version__

    def __init__(self, cuda: Cuda, config: EngineConfig) -> None:
        self.cuda, self.config, self.engine_config = cuda, config, config
        self.refusing: set[int] = set()
        self.unwanted: set[str] = set()
        self.out_of_memory = False
        self.Runtime = lambda logger: _Runtime(self, logger)
        self.Refitter = Refitter

    def __getattr__(self, name: str) -> Any:
        return getattr(fake, name)


class _Runtime:
    def __init__(self, module: Module, logger: Any) -> None:
        self._module = module

    def deserialize_cuda_engine(self, data: Any) -> StrippedEngine:
        described = json.loads(bytes(data))
        self._module.num_profiles = described["profiles"]
        engine = StrippedEngine(self._module, described.get("refittable", {}))
        if "refittable" not in described:  # a whole engine: the stand-in's builder wrote no numbers
            layers = fake.Builder.networks[-1]._layers
            engine.give({x.name: x.weights.numpy() for x in layers if x.type.name == "CONSTANT"})
        return engine


class StrippedEngine(_Engine):
    def __init__(self, module: Module, refittable: dict[str, list]) -> None:
        size = sum(count * NUMPY_DTYPES[dtype].itemsize for dtype, count in refittable.values())
        super().__init__(module, module.cuda.cudaMalloc(size)[1])
        self.refittable, self.constants = refittable, {}
        self.device_memory_size_v2 = ACTIVATIONS

    def give(self, constants: dict[str, np.ndarray]) -> None:
        model = self.module.engine_config.pretrained_config
        shapes = expected_shapes(model)
        # The network has norms in float32 and as rows.
        self.constants = {
            name: array.reshape(shapes[name]).astype(NUMPY_DTYPES[model.dtype]) if name in shapes else array
            for name, array in constants.items()
        }

    def read_weights(self, addresses: dict[str, int]) -> None:
        given = {
            name: self.module.cuda.array(addresses[name], spec.numpy_dtype, spec.shape).copy()
            for name, spec in self.weight_inputs.items()
        }
        self.take(self.constants | given)

    def create_execution_context(self, strategy: Any) -> Any:
        context = self.create_execution_context_without_device_memory()
        context.set_device_memory = lambda address, nbytes: setattr(context, "device_memory", address)
        return context


class Refitter:
    """As strict as TensorRT's: known names alone, the dtype and size of each, and all of them."""

    def __init__(self, engine: StrippedEngine, logger: Any) -> None:
        self._engine, self._logger = engine, logger
        self._given: dict[str, np.ndarray] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.refittable)

    def set_named_weights(self, name: str, weights: fake.Weights) -> bool:
        array = weights.numpy()
        if [array.dtype.name, array.size] != self._engine.refittable[name] or name in self._engine.module.unwanted:
            self._logger.log(1, f"the weights {name} do not fit")
            return False
        self._given[name] = array
        return True

    def refit_cuda_engine(self) -> bool:
        if self._engine.module.out_of_memory or self._given.keys() != self._engine.refittable.keys():
            self._logger.log(1, "out of memory")
            return False
        self._engine.give(self._given)
        return True
