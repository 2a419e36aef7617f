"""TensorRT's own products of a constant weight, in fp16 and in FP8."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from benchmarks.kernels.run import MissingError

if TYPE_CHECKING:
    import torch


def version() -> str | None:
    """Of what is installed."""
    try:
        return importlib.import_module("tensorrt").__version__
    except ImportError:
        return None


class Product:
    """``x · weightᵀ`` as an engine.

    Parameters
    ----------
    kind : str
        ``fp16``, or ``fp8`` by its layers that quantize: one scale for the weight, and one for its input.
    weight : torch.Tensor
        ``[out, in]``.
    x : torch.Tensor
        fp16 ``[rows, in]``.

    Raises
    ------
    MissingError
        If TensorRT is not installed, or builds no engine.
    """

    def __init__(self, kind: str, weight: torch.Tensor, x: torch.Tensor) -> None:
        import torch

        try:
            self._trt = trt = importlib.import_module("tensorrt")
        except ImportError as e:
            raise MissingError("TensorRT is not installed") from e
        rows, out = len(x), len(weight)
        self.result = torch.empty(rows, out, dtype=torch.float16, device=x.device)
        scale = float(weight.abs().max()) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        self.weight = weight.half() if kind == "fp16" else codes.float() * scale
        self.weight_bytes = weight.numel() * (2 if kind == "fp16" else 1)
        self._held: list[Any] = []
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        a = network.add_input("x", trt.float16, tuple(x.shape))
        if kind == "fp16":
            b = self._constant(network, self.weight, trt.float16)
        else:
            input_scale = self._constant(network, x.abs().max().float().reshape(1) / 448, trt.float32)
            a = network.add_quantize(a, input_scale, trt.fp8).get_output(0)
            a = network.add_dequantize(a, input_scale, trt.float16).get_output(0)
            weight_scale = self._constant(network, torch.full((1,), scale), trt.float32)
            b = self._constant(network, codes, trt.fp8)
            b = network.add_dequantize(b, weight_scale, trt.float16).get_output(0)
        product = network.add_matrix_multiply(a, trt.MatrixOperation.NONE, b, trt.MatrixOperation.TRANSPOSE)
        product.get_output(0).name = "y"
        network.mark_output(product.get_output(0))
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        if plan is None:
            raise MissingError(f"TensorRT {trt.__version__} builds no engine of it")
        self._engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        self._x = x

    def launch(self) -> None:
        """Run on PyTorch's current stream."""
        import torch

        self._context.set_tensor_address("x", self._x.data_ptr())
        self._context.set_tensor_address("y", self.result.data_ptr())
        self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream)

    def _constant(self, network: Any, x: torch.Tensor, dtype: Any) -> Any:
        host = x.cpu().contiguous()
        self._held.append(host)  # until the engine is built
        weights = self._trt.Weights(dtype, host.data_ptr(), host.numel())
        return network.add_constant(tuple(host.shape), weights).get_output(0)
