"""The caches that an evaluation compares: a grid over formats and levers, each with a name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saw_trtllm.backends.reference.quantizers import Exact, Fp8, KVQuantizer, QuantizedRows, SkipLayers
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import ROTATED, KVFormat
from saw_trtllm.model.config import ModelConfig

if TYPE_CHECKING:
    from saw_trtllm.checkpoint.calibration import Calibration


@dataclass(frozen=True)
class Variant:
    """One cache of the grid.

    Attributes
    ----------
    k_format, v_format : KVFormat
        They differ in ``range_factor`` at most.
    calibration : Path or None
        Where centers and frames come from.
    skip_layers : tuple of int
        Layers kept in the model's dtype.
    k8_layers : tuple of int
        Layers with keys in 8 bits.
    """

    k_format: KVFormat
    v_format: KVFormat
    calibration: Path | None = None
    skip_layers: tuple[int, ...] = ()
    k8_layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What tells it from the others: ``saw_int4 h128 KV γ0.93 calib.safetensors skip 0,1``."""
        k, v = self.k_format, self.v_format
        parts = [k.kv]
        if k.rotated:
            # A calibration's frames are rotations without an order.
            parts += [f"h{k.hadamard_order}"] if self.calibration is None else []
            parts.append("KV" if k.rotate_v else "K")
        if k.quantized:
            same = k.range_factor == v.range_factor
            parts.append(f"γ{k.range_factor:g}" + ("" if same else f"/{v.range_factor:g}"))
        if self.calibration is not None:
            parts.append(str(self.calibration))
        if self.k8_layers:
            parts.append(f"8/4 {','.join(map(str, self.k8_layers))}")
        if self.skip_layers:
            parts.append(f"skip {','.join(map(str, self.skip_layers))}")
        return " ".join(parts)

    def settings(self) -> dict[str, object]:
        """The grid's coordinates, for a JSON file."""
        k = self.k_format
        return {
            "kv": k.kv,
            "hadamard_order": k.hadamard_order,
            "rotate_v": k.rotate_v,
            "range_factor": [k.range_factor, self.v_format.range_factor],
            "calibration": None if self.calibration is None else str(self.calibration),
            "kv_skip_layers": list(self.skip_layers),
            "k8_layers": list(self.k8_layers),
        }

    def quantizer(self, exact: Exact, calibration: Calibration | None = None) -> KVQuantizer:
        """Make it; ``exact`` is the model's own cache, ``calibration`` what :attr:`calibration` holds."""
        if not self.k_format.quantized:
            return exact
        quantizer: KVQuantizer = self._rows(self.k_format, calibration)
        if self.k8_layers:
            quantizer = SkipLayers(quantizer, self.k8_layers, self._rows(self.k_format.with_8bit_keys(), calibration))
        return SkipLayers(quantizer, self.skip_layers, exact) if self.skip_layers else quantizer

    @property
    def may_widen(self) -> bool:
        """Whether its layers may have keys of 8 bits."""
        return self.k_format.kv == "saw_int4"

    def widened(self, calibration: Calibration | None = None) -> KVQuantizer | None:
        """The cache with keys of 8 bits in all layers, or None where it has none."""
        return self._rows(self.k_format.with_8bit_keys(), calibration) if self.may_widen else None

    def _rows(self, k_format: KVFormat, calibration: Calibration | None) -> QuantizedRows:
        formats = (k_format, self.v_format)
        return QuantizedRows(*formats) if calibration is None else QuantizedRows.calibrated(*formats, calibration)


@dataclass(frozen=True)
class Fp8Variant(Variant):
    """Rows of fp8 e4m3, which no engine of ours has: to be compared."""

    @property
    def name(self) -> str:
        """Without settings, of which it has none."""
        return "fp8"

    def settings(self) -> dict[str, object]:
        """The grid's coordinates, for a JSON file."""
        return super().settings() | {"kv": "fp8"}

    def quantizer(self, exact: Exact, calibration: Calibration | None = None) -> KVQuantizer:
        """Make it."""
        return Fp8()


def grid(
    config: ModelConfig,
    kv: Sequence[str],
    hadamard_orders: Sequence[int | None] = (None,),
    rotate_v: Sequence[bool | None] = (None,),
    range_factors: Sequence[tuple[float | None, float | None]] = ((None, None),),
    calibrations: Sequence[Path | None] = (None,),
    layers: Sequence[tuple[Sequence[int], Sequence[int]]] = (((), ()),),
) -> list[Variant]:
    """Every combination that means something, in order and once; None is the format's default.

    ``layers`` are those skipped and those with 8-bit keys, together.

    Raises
    ------
    ConfigError
        If a format does not take a value.
    """
    variants: dict[Variant, None] = {}
    for name, order, rotated, factors, calibration, (skipped, wide) in itertools.product(
        kv, hadamard_orders, rotate_v, range_factors, calibrations, layers
    ):
        # A calibration's frames stand in the rotation's place, whatever its order, and only there.
        calibration = calibration if name in ROTATED else None
        rotation = (order if calibration is None else None, rotated) if name in ROTATED else (None, None)
        if name == "fp8":
            rows = KVFormat("fp16", config.head_size, config.dtype)
            variants[Fp8Variant(rows, rows)] = None
            continue
        quantized = name != "fp16"
        k, v = (
            KVFormat(name, config.head_size, config.dtype, *rotation, factor if quantized else None)
            for factor in factors
        )
        wide = wide if name == "saw_int4" else ()
        variant = Variant(k, v, calibration, tuple(skipped), tuple(wide)) if quantized else Variant(k, v)
        variants[variant] = None
    return list(variants)


def parse_list(text: str) -> list[str]:
    """The words between commas."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{text!r} has nothing between two commas: give values like 16,32")
    return words


def parse_orders(text: str | None) -> list[int | None]:
    """``16,32`` as Hadamard orders."""
    try:
        return [None] if text is None else [int(word) for word in parse_list(text)]
    except ValueError:
        raise ConfigError(f"hadamard_order {text!r} is not a list of numbers: give orders like 16,128") from None


def parse_switches(text: str | None) -> list[bool | None]:
    """``enable,disable`` as booleans."""
    words = [None] if text is None else parse_list(text)
    known = {None: None, "enable": True, "disable": False}
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ConfigError(f"rotate_v {unknown[0]!r} is unknown: give enable, disable or both with a comma")
    return [known[word] for word in words]


def parse_factors(text: str | None) -> list[tuple[float | None, float | None]]:
    """``0.9,0.9/0.95``: range factors, of K and V apart where there is a slash."""
    if text is None:
        return [(None, None)]
    pairs: list[tuple[float | None, float | None]] = []
    for word in parse_list(text):
        try:
            factors = [float(part) for part in word.split("/")]
        except ValueError:
            factors = []
        if len(factors) not in (1, 2):
            raise ConfigError(
                f"range_factor {word!r} is unknown: give a number, or one of K and one of V like 0.95/0.9"
            )
        pairs.append((factors[0], factors[-1]))
    return pairs


def parse_calibrations(text: str | None) -> list[Path | None]:
    """``none,calib.safetensors``: files, and none for going without."""
    return [None] if text is None else [None if word == "none" else Path(word) for word in parse_list(text)]
