"""fbgemm_fp8, as Meta quantized Llama 3.1: FP8 with a scale for each output channel and for each token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saw_trtllm.checkpoint.families.family import KeyRule
from saw_trtllm.checkpoint.quantization.dialect import Dialect, Linear, StoredWeight
from saw_trtllm.checkpoint.quantization.scaled import stored_fp8


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`."""

    def read(linear: Linear) -> StoredWeight | None:
        weight = linear.find("weight")
        if weight is None or weight.dtype != "F8_E4M3":
            return None
        return stored_fp8(linear, "weight_scale", None, "token")

    return read


FBGEMM_FP8 = Dialect(
    name="fbgemm_fp8",
    library="FBGEMM, Meta's Llama 3.1",
    file=None,
    keys=(
        KeyRule("honored", "the dialect", ("quant_method",)),
        KeyRule("honored", "a layer is quantized if its tensors are", ("modules_to_not_convert",)),
        KeyRule(
            "harmless", "a bound on the scales of activations, which are not quantized here", ("activation_scale_ub",)
        ),
    ),
    reader=reader,
)
