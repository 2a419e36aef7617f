"""An engine of TensorRT in memory, with an execution context for each of its optimization profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, Stream
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.errors import KernelError


class Session:
    """Runs an engine.

    The contexts share one block of activations, so only one runs at a time: all steps go to one stream.

    Parameters
    ----------
    tensorrt : TensorRT
    engine : tensorrt.ICudaEngine
    logger : tensorrt.ILogger
        The engine's; it knows why something failed.

    Attributes
    ----------
    num_profiles : int
    activation_bytes : int
    """

    def __init__(self, tensorrt: TensorRT, engine: Any, logger: Any) -> None:
        self._tensorrt, self._engine, self._logger = tensorrt, engine, logger
        self.num_profiles: int = engine.num_optimization_profiles
        self.activation_bytes: int = tensorrt.activation_bytes(engine)
        self._memory: DeviceBuffer | None = None
        self._contexts: list[Any] = []

    def open(self, stream: Stream, weights: Mapping[str, int]) -> None:
        """Allocate the activations and make the contexts, whose steps read ``weights`` at their addresses."""
        self._memory = DeviceBuffer(self.activation_bytes)
        for profile in range(self.num_profiles):
            context = self._tensorrt.create_context(self._engine, self._memory.address, self._memory.nbytes)
            if context is None:
                raise self._error("gives no execution context")
            self._contexts.append(context)
            if not context.set_optimization_profile_async(profile, stream.handle):
                raise self._error(f"does not take its optimization profile {profile}")
            for name, address in weights.items():
                if not context.set_tensor_address(name, address):
                    raise self._error(f"does not take the address of {name}")
        stream.synchronize()

    def enqueue(
        self,
        profile: int,
        tensors: Mapping[str, tuple[int, Sequence[int] | None]],
        stream: Stream,
        profiler: Any = None,
    ) -> None:
        """Put a step on the stream.

        Parameters
        ----------
        profile : int
        tensors : dict
            Address of each input and output by name, and shape of an input.
        stream : Stream
        profiler : tensorrt.IProfiler, optional
            Is told the time of each layer; the call then waits for the step.

        Raises
        ------
        KernelError
            If TensorRT, or a plugin, rejects the step.
        """
        context = self._contexts[profile]
        for name, (address, shape) in tensors.items():
            if shape is not None and not context.set_input_shape(name, tuple(shape)):
                raise self._error(f"does not take the shape {tuple(shape)} of {name}")
            if not context.set_tensor_address(name, address):
                raise self._error(f"does not take the address of {name}")
        if profiler is not None:
            context.profiler = profiler
        if not context.execute_async_v3(stream.handle):
            raise self._error("does not run the step")

    def close(self) -> None:
        """Free the contexts, the engine and the activations."""
        self._contexts.clear()
        self._engine = None
        if self._memory is not None:
            self._memory.close()

    def _error(self, what: str) -> KernelError:
        return KernelError(f"TensorRT {self._tensorrt.version} {what}: {self._logger.reason}")
