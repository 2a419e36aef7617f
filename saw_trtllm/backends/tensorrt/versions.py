"""The module ``tensorrt`` of 8.6, 10 and 11: what differs between them, all in this file.

- Types. From 10 on networks are strongly typed. 8.6 chooses types itself, so each layer is told its own, and
  the builder to obey.
- 8.6 has neither bfloat16 nor INT64: an address travels as two INT32s.
- Plugins are V3 from 10 on, V2 in 8.6.
- cuBLAS and cuDNN, which 10 leaves out unless asked, are switched off in 8.6 too: they need not be installed.
- 11 has no other than strongly typed networks, and no flag for them.
- An execution context on the caller's memory is made in other words from 10 on.
- A build tells of its progress from 10 on.

``tensorrt`` is imported when a :class:`TensorRT` is made, so that the package can be read without it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError
from saw_trtllm.plan.tensorrt_options import Phases
from saw_trtllm.plugins import library

log = logging.getLogger(__name__)

#: By TensorRT's severity: internal error, error, warning, info, verbose.
_LEVELS = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)

#: An error to 8.6, and a question to the plugin library: it registers what is not there yet.
_ASKED_IN_VAIN = "getPluginCreator could not find plugin: Saw"

_LOGGERS: WeakKeyDictionary[ModuleType, Any] = WeakKeyDictionary()


class TensorRT:
    """TensorRT as one version has it.

    Parameters
    ----------
    module : module
        ``tensorrt``.

    Attributes
    ----------
    trt : module
    version : str
    strongly_typed : bool

    Raises
    ------
    BackendUnavailableError
        If the plugins do not exist for this version.
    """

    def __init__(self, module: ModuleType) -> None:
        self.trt = module
        self.version: str = module.__version__
        major, minor = (int(part) for part in self.version.split(".")[:2])
        if (major, minor) != (8, 6) and major < 10:
            raise BackendUnavailableError(
                f"TensorRT {self.version} is not supported: install 8.6, or 10 or newer (pip install "
                "'saw-trtllm[tensorrt]')"
            )
        self.strongly_typed = major >= 10
        self._always_strongly_typed = major >= 11

    @classmethod
    def load(cls) -> TensorRT:
        """Import it.

        Raises
        ------
        BackendUnavailableError
            If it is not installed, or not of a supported version.
        """
        try:
            return cls(importlib.import_module("tensorrt"))
        except ImportError as e:
            raise BackendUnavailableError(
                f"TensorRT cannot be imported here ({e}): pip install 'saw-trtllm[tensorrt]' on a machine with a GPU, "
                "or use --backend reference, which runs on any CPU"
            ) from e

    # -- types

    def check_activations(self, dtype: str) -> None:
        """Reject a dtype that the plugins, or this TensorRT, cannot compute in."""
        if dtype == "float32":
            raise ConfigError("the model is in float32, and the plugins compute in 16 bits: give --dtype float16")
        if dtype == "bfloat16" and not self.strongly_typed:
            raise ConfigError(
                f"the model is in bfloat16, which TensorRT {self.version} does not have: give --dtype float16, or "
                "install TensorRT 10 or newer"
            )

    def dtype(self, name: str) -> Any:
        """``tensorrt.DataType`` of NumPy's name."""
        return getattr(self.trt, name)

    def weights(self, array: np.ndarray) -> Any:
        """Weights over a contiguous array's memory, which must live until the engine is built."""
        if array.dtype.name == "bfloat16":  # which TensorRT's NumPy does not know
            return self.trt.Weights(self.trt.bfloat16, array.ctypes.data, array.size)
        return self.trt.Weights(array)

    def pin(self, layer: Any, dtype: str) -> None:
        """Have a layer compute in, and give, a dtype, where the network's types do not say so."""
        if not self.strongly_typed:
            layer.precision = self.dtype(dtype)
            layer.set_output_type(0, self.dtype(dtype))

    def mark_output(self, network: Any, tensor: Any, dtype: str) -> None:
        """Make a tensor an output of the engine, of a dtype that it has."""
        network.mark_output(tensor)
        if not self.strongly_typed:
            tensor.dtype = self.dtype(dtype)

    def pool_pointers(self, num_pools: int) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of ``host_kv_cache_pool_pointers``: the same bytes, low word first where they are two."""
        return ("int64", (num_pools, 2)) if self.strongly_typed else ("int32", (num_pools, 2, 2))

    # -- engines without weights

    @property
    def can_strip(self) -> bool:
        """Whether an engine may be built without the weights that it is given when it is opened."""
        return hasattr(self.trt.BuilderFlag, "REFIT_INDIVIDUAL")

    def strip(self, config: Any) -> None:
        """Have a builder leave out of the engine what :meth:`make_refittable` names."""
        config.set_flag(self.trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(self.trt.BuilderFlag.REFIT_INDIVIDUAL)

    def make_refittable(self, network: Any, weights: Any, name: str) -> None:
        """Let weights of a network be given to its engine later, under a name."""
        if not (network.set_weights_name(weights, name) and network.mark_weights_refittable(name)):
            raise EngineError(f"TensorRT {self.version} does not make {name} refittable: build without --strip_plan")

    # -- building

    def logger(self) -> Any:
        """A logger that hands TensorRT's messages to Python's logging; ``reason`` is the latest that was worst.

        There is one for each module, with its reason forgotten: TensorRT goes on with the first that it was given,
        whatever others it is given later.
        """
        logger = _LOGGERS.get(self.trt)
        if logger is None:
            logger = _LOGGERS[self.trt] = _make_logger(self.trt)
        logger.forget()
        return logger

    def builder(self, logger: Any) -> Any:
        """A builder.

        Raises
        ------
        BackendUnavailableError
            If there is no GPU.
        """
        try:
            return self.trt.Builder(logger)
        except (TypeError, RuntimeError) as e:
            raise BackendUnavailableError(
                f"TensorRT {self.version} does not start ({logger.reason}): it needs an NVIDIA GPU and a driver as "
                "new as its CUDA; --backend reference runs on any CPU"
            ) from e

    def create_network(self, builder: Any) -> Any:
        """An empty network of packed tensors."""
        flags = self.trt.NetworkDefinitionCreationFlag
        if self._always_strongly_typed:
            return builder.create_network(0)
        flag = flags.STRONGLY_TYPED if self.strongly_typed else flags.EXPLICIT_BATCH
        return builder.create_network(1 << int(flag))

    def create_config(self, builder: Any, optimization_level: int | None = None) -> Any:
        """A builder's configuration under which the network's types are what :class:`Graph` says."""
        config = builder.create_builder_config()
        if optimization_level is not None:
            config.builder_optimization_level = optimization_level
        if not self.strongly_typed:
            config.set_flag(self.trt.BuilderFlag.FP16)
            config.set_flag(self.trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            own = (self.trt.TacticSource.JIT_CONVOLUTIONS, self.trt.TacticSource.EDGE_MASK_CONVOLUTIONS)
            config.set_tactic_sources(sum(1 << int(source) for source in own))
        return config

    def report_phases(self, config: Any, phases: Phases) -> None:
        """Have a build tell of its phases, where TensorRT does."""
        if not hasattr(self.trt, "IProgressMonitor"):
            return

        base: Any = self.trt.IProgressMonitor

        class Monitor(base):
            def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
                phases.start(name, parent, num_steps)

            def step_complete(self, name: str, step: int) -> bool:
                phases.step(name)
                return True  # go on

            def phase_finish(self, name: str) -> None:
                phases.finish(name)

        config.progress_monitor = Monitor()

    # -- plugins

    def load_plugins(self) -> None:
        """Register the library's plugins, once for the process.

        Raises
        ------
        BackendUnavailableError
            If the library is missing, or does not have them for this TensorRT.
        """
        library.load_plugins(self.trt)

    def add_plugin(
        self, network: Any, name: str, fields: Mapping[str, int | float | str], inputs: Sequence[Any]
    ) -> Any:
        """Add a layer that is one of our library.

        Parameters
        ----------
        network : tensorrt.INetworkDefinition
        name : str
        fields : dict
        inputs : sequence of tensorrt.ITensor

        Raises
        ------
        BackendUnavailableError, ConfigError
            As :func:`saw_trtllm.library.library.make_plugin`.
        """
        plugin = library.make_plugin(self.trt, name, fields)
        if library.has_v3(self.trt):
            return network.add_plugin_v3(inputs, [], plugin)
        return network.add_plugin_v2(inputs, plugin)

    # -- running

    def activation_bytes(self, engine: Any) -> int:
        """Bytes of memory that an execution context needs, whichever its profile."""
        return engine.device_memory_size_v2 if self.strongly_typed else engine.device_memory_size

    def create_context(self, engine: Any, address: int, nbytes: int) -> Any:
        """An execution context on memory that the caller has allocated; None if TensorRT gives none."""
        if not self.strongly_typed:
            context = engine.create_execution_context_without_device_memory()
            if context is not None:
                context.device_memory = address
            return context
        context = engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is not None:
            context.set_device_memory(address, nbytes)
        return context


def _make_logger(trt: ModuleType) -> Any:
    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self) -> None:
            super().__init__()
            self.forget()

        def forget(self) -> None:
            self.reason, self._worst = "it gave no reason", logging.WARNING

        def log(self, severity: Any, message: str) -> None:
            level = _LEVELS[int(severity)]
            if _ASKED_IN_VAIN in message:
                level = logging.DEBUG
            # What follows an internal error is an error, and says less or more; what follows a plugin's says less.
            if level >= self._worst and not self.reason.startswith("Saw"):
                self.reason, self._worst = " ".join(message.split()), min(level, logging.ERROR)
            log.log(level, "TensorRT: %s", message)

    return Logger()
