"""The record of the weights' benchmark."""

from __future__ import annotations

from typing import Literal

from benchmarks.common.record import Record, RecordPart


class Divergence(RecordPart):
    """From the original, in nats a token, and the tokens whose likeliest next one is the same."""

    kl: float
    kl_error: float
    """Standard error, over pieces of 64 tokens."""
    top1: float
    top1_error: float


class QuantizedModel(RecordPart):
    """A quantized model."""

    name: str
    weights: str
    """Their format, in words."""
    ours: Divergence
    theirs: Divergence
    """Of transformers' own class, with the weights that the checkpoint's library dequantizes."""
    w8a8: Divergence | None = None
    """Ours, where FP8 layers round their inputs token by token as the checkpoint says."""
    kl_difference: float
    """Ours less theirs, mean."""
    kl_difference_error: float
    top1_difference: float


class WeightsResults(Record):
    """A run of the weights' benchmark."""

    kind: Literal["weights"] = "weights"
    num_tokens: int
    window: int
    model: str
    models: list[QuantizedModel]
