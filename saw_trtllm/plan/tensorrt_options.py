"""What a build of the project's own definitions may do one way or the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class NetworkOptions:
    """How TensorRT builds an engine.

    Attributes
    ----------
    decode_profile : bool or None
        Give decode steps kernels of their own; None: unless there is the GEMM plugin, which chooses its
        kernels itself. It makes the build about twice as long. TensorRT-LLM's
        executor does not know such a profile (with more than one it expects its own six), this project's runtime does.
    input_timing_cache, output_timing_cache : Path or None
        Files of kernels' times: one that is read, with which a build is shorter, and one that is written after it.
        They may be the same.
    optimization_level : int or None
        TensorRT's, from 0 to 5: how long it looks for fast kernels. None is its default.
    workers : int or None
        Threads that read the weights and fold into them; None is one for each core.
    gemm_plugin : str
        ``auto``, ``disable``, or the model's dtype. With it, nearly all layers are plugins, of which TensorRT compiles
        nothing. ``auto`` takes it if there is cuBLASLt.
    strip_plan : bool
        Whether the engine is written without its weights, which are read from the checkpoint when it is opened.
    """

    decode_profile: bool | None = None
    input_timing_cache: Path | None = None
    output_timing_cache: Path | None = None
    optimization_level: int | None = None
    workers: int | None = None
    gemm_plugin: str = "auto"
    strip_plan: bool = False

    def has_decode_profile(self, gemm_plugin: str | None) -> bool:
        """Whether an engine gets that profile: one with the GEMM plugin of a dtype, or without."""
        return gemm_plugin is None if self.decode_profile is None else self.decode_profile


class Phases(Protocol):
    """Who is told of a build's phases, from TensorRT 10 on; phases may lie in others."""

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase begins."""

    def step(self, name: str) -> None:
        """One of its steps is done."""

    def finish(self, name: str) -> None:
        """It has ended, with all its steps or without."""
