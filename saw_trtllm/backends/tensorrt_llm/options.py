"""How a swapped model caches: as ``saw-build``'s flags say, or for ``trtllm-build`` the checkpoint's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from saw_trtllm.checkpoint.layout import kv_heads_of_rank
from saw_trtllm.errors import ConfigError, first_error
from saw_trtllm.format import KVFormat, KvName
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plugins.layer import OPTIONAL_CONSTANTS

if TYPE_CHECKING:
    from saw_trtllm.plan.options import BuildOptions
    from saw_trtllm.plan.plan import BuildPlan


class CheckpointSection(BaseModel):
    """The section ``saw_int4`` of a checkpoint's ``config.json``: ``saw-build``'s flags of the same names."""

    model_config = ConfigDict(extra="forbid")

    kv: KvName = "saw_int4"
    hadamard_order: int | None = None
    rotate_v: bool | None = None
    range_factor: float | None = None
    #: File of ``saw-calibrate``; a relative path starts at the checkpoint's folder.
    calibration: Path | None = None

    @classmethod
    def of(cls, config: Any) -> CheckpointSection:
        """Of a TensorRT-LLM or a project's model config; without the section, the defaults."""
        given = getattr(config, "saw_int4", None)
        try:
            return cls.model_validate({} if given is None else given)
        except ValidationError as e:
            raise ConfigError(f"the section saw_int4 of the checkpoint's config.json is wrong: {first_error(e)}") from e

    def build_options(self, checkpoint_dir: Path) -> BuildOptions:
        """As ``saw-build`` would have them."""
        from saw_trtllm.plan.options import BuildOptions

        return BuildOptions(
            checkpoint_dir=checkpoint_dir,
            backend="tensorrt_llm",
            kv=self.kv,
            hadamard_order=self.hadamard_order,
            rotate_v=None if self.rotate_v is None else ("disable", "enable")[self.rotate_v],
            range_factor=self.range_factor,
            calibration=None if self.calibration is None else checkpoint_dir / self.calibration,
        )


@dataclass(frozen=True, eq=False)
class SwapOptions:
    """What the attention of a swapped model does.

    Attributes
    ----------
    kv_format : KVFormat
    v_folded : bool
        Whether V's rotation is in the weights already. If it is not, it is done and undone at run time.
    k_center : numpy.ndarray or None
        float32 ``[num_layers, num_kv_heads, head_dim]`` of the whole model.
    k_frame, q_frame : numpy.ndarray or None
        float32 ``[num_layers, num_kv_heads, head_dim, head_dim]`` of the whole model: both or neither.
    windows : sequence of (int or None), or None
        Tokens that each layer of the whole model sees.
    quantized : dict
        Formats of the weights that came quantized, by name, for the engine's ``config.json``.
    """

    kv_format: KVFormat
    v_folded: bool = False
    k_center: np.ndarray | None = None
    k_frame: np.ndarray | None = None
    q_frame: np.ndarray | None = None
    windows: Sequence[int | None] | None = None
    quantized: Mapping[str, WeightFormat] = field(default_factory=dict)

    @classmethod
    def of_config(cls, config: Any) -> SwapOptions:
        """From a TensorRT-LLM ``PretrainedConfig``: a model whose weights are as its checkpoint has them."""
        section = CheckpointSection.of(config)
        if section.calibration is not None:
            raise ConfigError(
                "a calibration is folded into weights, and this model has none: build it from a checkpoint"
            )
        if section.kv == "saw_k8v4":
            raise ConfigError(
                "the checkpoint's section saw_int4 names saw_k8v4, and TensorRT-LLM's executor has rows of one size: "
                "name saw_int4, int4 or fp16"
            )
        kv_format = KVFormat(
            section.kv, config.head_size, config.dtype, section.hadamard_order, section.rotate_v, section.range_factor
        )
        return cls(kv_format, windows=getattr(config, "sliding_window", None))

    @classmethod
    def of_plan(cls, plan: BuildPlan) -> SwapOptions:
        """Of a model that gets its weights from ``plan.weights``."""
        calibration = plan.calibration
        frames = calibration if plan.config.saw_int4.k_frame else None
        return cls(
            plan.config.kv_format,
            v_folded=True,
            k_center=calibration.k_center if calibration else None,
            k_frame=frames.k_frame if frames else None,
            q_frame=frames.q_frame if frames else None,
            windows=plan.config.pretrained_config.sliding_window,
            quantized=plan.config.saw_int4.quantized,
        )

    def window(self, layer: int) -> int:
        """Tokens that a layer of the whole model sees; 0 is all."""
        return (self.windows[layer] or 0) if self.windows is not None else 0

    def local_constants(self, layer: int, tp_size: int, tp_rank: int) -> dict[str, np.ndarray]:
        """What there is of a layer's center and frames, by name, for a rank's KV heads: the first axis."""
        found = {}
        for name in OPTIONAL_CONSTANTS:
            whole = getattr(self, name)
            if whole is not None:
                kept = kv_heads_of_rank(whole.shape[1], tp_size, tp_rank)
                found[name] = np.ascontiguousarray(whole[layer, kept], np.float32)
        return found
