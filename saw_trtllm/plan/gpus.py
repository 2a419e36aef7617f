"""GPUs that an engine can be planned for without one: their memory, its bandwidth, and the weights that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from saw_trtllm.checkpoint.layout import shard_format, shard_shape
from saw_trtllm.engine.config import BackendName
from saw_trtllm.errors import ConfigError, OpError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.ops.quantized_gemm import PackedShape
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plugins.gpus import Gpu

#: Compute capability from which on a GPU has layers of a kind of weights.
_LEAST = {"int4": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class GpuModel(Gpu):
    """A GPU, by its maker's data sheet.

    Attributes
    ----------
    bandwidth : float
        Of its memory, in bytes a second.
    """

    bandwidth: float


def _gpu(name: str, capability: tuple[int, int], mebibytes: int, gigabytes_per_second: int) -> GpuModel:
    return GpuModel(name, capability, mebibytes << 20, gigabytes_per_second * 1e9)


#: By the name that ``saw-plan --gpu`` takes.
GPUS = {
    "3090": _gpu("GeForce RTX 3090", (8, 6), 24576, 936),
    "4090": _gpu("GeForce RTX 4090", (8, 9), 24564, 1008),
    "5090": _gpu("GeForce RTX 5090", (12, 0), 32607, 1792),
    "A10": _gpu("A10", (8, 6), 23028, 600),
    "A100": _gpu("A100 SXM 80 GB", (8, 0), 81920, 2039),
    "L4": _gpu("L4", (8, 9), 23034, 300),
    "L40S": _gpu("L40S", (8, 9), 46068, 864),
    "H100": _gpu("H100 SXM", (9, 0), 81559, 3350),
    "H200": _gpu("H200 SXM", (9, 0), 143771, 4800),
    "B200": _gpu("B200", (10, 0), 183359, 8000),
}


def check_capability(formats: Mapping[str, WeightFormat], capability: tuple[int, int], gpu: str) -> None:
    """Reject quantized weights that a GPU has no layers for.

    Raises
    ------
    ConfigError
    """
    for kind, least in _LEAST.items():
        if capability < least and any(format.kind == kind for format in formats.values()):
            raise ConfigError(
                f"the {gpu} has compute capability {capability[0]}.{capability[1]}, and {kind.upper()} weights need "
                f"{least[0]}.{least[1]}: give --qformat full_prec, or take a newer GPU"
            )


def check_formats(model: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
    """Reject quantized weights whose part on a rank our plugin does not multiply by.

    Raises
    ------
    ConfigError
    """
    tp_size = model.mapping.tp_size
    for name, whole in formats.items():
        try:
            if whole.act_order:
                raise OpError("columns belong to groups in an order of their own (desc_act)")
            format, shape = shard_format(name, whole, model, tp_size), shard_shape(name, model, tp_size)
            PackedShape.of(format.kind, shape, format.block[1])
        except OpError as e:
            raise ConfigError(
                f"{name} is quantized in a way that the backend tensorrt has no layer for: {e}; give --qformat "
                "full_prec to have the weights in 16 bits, or --backend reference"
            ) from e


class PlannedGpu:
    """A GPU that is not there; see :class:`saw_trtllm.plan.backend.BackendLimits`."""

    name: BackendName = "tensorrt"
    has_float32 = False
    keeps_ranks = False

    def __init__(self, gpu: GpuModel) -> None:
        self.gpu = gpu

    def available(self) -> str:
        """Its name."""
        return self.gpu.name

    def check(self, options: BuildOptions, model: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
        """What its compute capability lacks, and our plugin."""
        check_capability(formats, self.gpu.capability, self.gpu.name)
        check_formats(model, formats)

    def max_positions(self, model: ModelConfig) -> int:
        """All that the scaled RoPE reaches."""
        return model.max_positions

    def weight_dtype(self) -> None:
        """Each as the engine has it."""

    def free_memory(self, ranks: int = 1) -> int:
        """All of it, whatever the ranks: each has a GPU."""
        return self.gpu.memory
