"""Which weights of an engine are quantized, and how: as the checkpoint has them, or as ``--qformat`` asks."""

from __future__ import annotations

import re

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.layout import expected_shapes
from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat

#: Of the linear layers; the embedding and lm_head stay in 16 bits, as the public quantizers leave them.
_LINEAR = re.compile(r"\.(attention\.(qkv|dense)|mlp\.(fc|gate|proj))\.weight$")
#: Those that V's rotation is folded into.
_FOLDED = re.compile(r"\.attention\.(qkv|dense)\.weight$")
#: Columns that share a scale in ``int4_wo``, where they divide a layer's inputs.
_GROUPS = (128, 64, 32)


def engine_formats(checkpoint: Checkpoint, qformat: str) -> dict[str, WeightFormat]:
    """Formats of the engine's quantized weights by name, before anything is folded into them.

    Raises
    ------
    ConfigError
        If a quantized checkpoint is to be quantized once more.
    """
    if qformat == "full_prec":
        return {}
    if qformat == "auto":
        return checkpoint.formats
    if checkpoint.formats:
        raise ConfigError(
            f"--qformat {qformat} was given and the weights in {checkpoint.folder} are quantized already: leave it "
            "out, or give --qformat full_prec to have them in 16 bits"
        )
    return own_formats(checkpoint.config, qformat)


def own_formats(model: ModelConfig, qformat: str) -> dict[str, WeightFormat]:
    """Formats of the linear layers of a 16-bit model that ``--qformat`` quantizes."""
    shapes = {name: shape for name, shape in expected_shapes(model).items() if _LINEAR.search(name)}
    return {name: _FORMATS[qformat](shape[1]) for name, shape in shapes.items()}


def _fp8(inputs: int) -> WeightFormat:
    return WeightFormat(kind="fp8", block=(1, inputs), activation="token")


def _int4(inputs: int) -> WeightFormat:
    return WeightFormat(kind="int4", block=(1, next((g for g in _GROUPS if inputs % g == 0), inputs)), zeros=True)


_FORMATS = {"fp8": _fp8, "int4_wo": _int4}


def default_rotate_v(checkpoint: Checkpoint, formats: dict[str, WeightFormat]) -> bool | None:
    """``rotate_v`` where no flag says it: off where weights that would take it in come quantized, else the cache's."""
    return False if any(_FOLDED.search(name) for name in formats.keys() & checkpoint.formats.keys()) else None


def without_folded(checkpoint: Checkpoint, formats: dict[str, WeightFormat]) -> dict[str, WeightFormat]:
    """The formats of an engine that V's rotation is folded into: what comes quantized and takes it in has 16 bits."""
    return {n: f for n, f in formats.items() if not (n in checkpoint.formats and _FOLDED.search(n))}
