"""The record of the products' benchmark, and its cases."""

from __future__ import annotations

from typing import Literal

from benchmarks.common.record import Record, RecordPart
from benchmarks.common.target import TargetResult
from benchmarks.kernels.record import Bandwidth

#: Outputs and inputs of an 8B Llama's linear layers.
SHAPES = {"qkv": (6144, 4096), "dense": (4096, 4096), "fc": (14336, 4096), "proj": (4096, 14336)}
ROWS = (1, 8, 16, 32, 64, 2048)
#: What multiplies, by its name in the record.
LABELS = {
    "int4": "saw INT4",
    "fp8": "saw FP8",
    "fp8_inputs": "saw FP8 W8A8",
    "cublas": "cuBLAS fp16",
    "cublas_fp8": "cuBLAS FP8 W8A8",
    "tensorrt": "TensorRT fp16",
    "tensorrt_fp8": "TensorRT FP8",
}
PEERS = tuple(LABELS)[3:]
#: The most µs of a product with ``fc``, by contender and rows.
LIMITS = {("int4", 1): 10, ("int4", 16): 11, ("int4", 64): 18, ("fp8", 1): 17, ("fp8", 64): 18}
#: The most that a product of many rows takes, in cuBLAS's times.
MANY_ROWS, MANY_LIMIT = 2048, 1.1


class Product(RecordPart):
    """A contender's times in a case."""

    contender: str
    median_us: float
    p10_us: float
    p90_us: float
    repetitions: int
    chained: int = 1
    """Launches that followed each other in the graph, each with another copy of the weight."""
    cuda_graph: bool
    bytes: int
    """Of weight, scales, activations and result."""
    gbps: float
    error: float | None = None
    """The largest difference from fp32's product of the same weights, in the results' standard deviation."""


class ProductCase(RecordPart):
    """A shape with a number of rows."""

    name: str
    out_features: int
    in_features: int
    rows: int
    products: list[Product]
    missing: dict[str, str]
    """Contenders that were not measured, and why."""
    targets: list[TargetResult]

    def find(self, contender: str) -> Product | None:
        """A contender's product, if there is one."""
        return next((p for p in self.products if p.contender == contender), None)


class GemmResults(Record):
    """A run of the products' benchmark."""

    kind: Literal["gemm"] = "gemm"
    flush: str
    """What emptied the L2 before each run."""
    bandwidth: Bandwidth
    cases: list[ProductCase]
