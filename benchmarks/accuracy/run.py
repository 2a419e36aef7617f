"""The accuracy ablation: every cache on the example model and its planted variants, as docs/accuracy.md shows it.

Caches are judged on text that the example model has not read and calibrated on text that it has: files of the standard
library of the Python that runs (``prepare`` in examples/tiny_llama/train.py chose the held-out ones by their names).
"""

from __future__ import annotations

import argparse
import dataclasses
import html.parser
import os
import sys
import time
import typing
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax import expatreader

import torch
from tqdm import tqdm

from benchmarks.accuracy.record import AccuracyResults
from benchmarks.common.environment import cpu_name, describe
from saw_trtllm.backends.reference.quantizers import KVQuantizer, QuantizedRows, SkipLayers
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.errors import ConfigError
from saw_trtllm.eval.analysis import analyse
from saw_trtllm.eval.baselines import Codebook, HessianRounding, PerChannelKeys, gather
from saw_trtllm.eval.metrics import Quality, evaluate, greedy_agreement
from saw_trtllm.eval.outliers import plant_key_bias, plant_outliers
from saw_trtllm.eval.suggest import suggest
from saw_trtllm.format import RANGE_FACTORS, KVFormat, hadamard_orders
from saw_trtllm.runtime.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_llama"
HELD_OUT = [Path(m.__file__) for m in (urllib.request, typing, html.parser, expatreader)]
CALIBRATION = [Path(argparse.__file__)]
WINDOW = 2048
CALIBRATION_TOKENS = 8192
GAMMAS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8)
MODELS = {"example": lambda c: c, "outliers": plant_outliers, "key bias": plant_key_bias}


@dataclass(frozen=True)
class Cache:
    """A 4-bit cache of our format. Its defaults are the paper's recipe."""

    order: int = 128
    rotate_v: bool = True
    k_factor: float = 1.0
    v_factor: float = 1.0
    centred: bool = False
    framed: bool = False
    skip: tuple[int, ...] = ()

    def quantizer(self, model: WindowModel, calibration: Calibration) -> KVQuantizer:
        """Make it, with those of the calibration's levers that it has. Frames are made for centred keys."""
        dim, dtype = model.config.head_size, model.config.dtype
        rotation = () if self.order == 1 else (self.order, self.rotate_v)
        kv = "int4" if self.order == 1 else "saw_int4"
        k, v = (KVFormat(kv, dim, dtype, *rotation, range_factor=factor) for factor in (self.k_factor, self.v_factor))
        center, *frames = map(torch.from_numpy, (calibration.k_center, calibration.k_frame, calibration.v_frame))
        quantizer = QuantizedRows(k, v, center if self.centred else None, *(frames if self.framed else ()))
        return SkipLayers(quantizer, self.skip, model.exact) if self.skip else quantizer


def default_factors() -> dict[str, float]:
    gamma = RANGE_FACTORS[128]
    return {"k_factor": gamma, "v_factor": gamma}


def levers(best_layer: int) -> dict[str, Cache]:
    gamma = default_factors()
    both = gamma | {"centred": True, "framed": True}
    return {
        "int4": Cache(order=1),
        "int4, γ": Cache(order=1, **gamma),
        "recipe": Cache(),
        "recipe, K only": Cache(rotate_v=False),
        "recipe, centred": Cache(centred=True),
        "γ": Cache(**gamma),
        "γ, centred": Cache(**gamma, centred=True),
        "centred, framed": Cache(centred=True, framed=True),
        "all levers": Cache(**both),
        "all levers, one layer kept": Cache(**both, skip=(best_layer,)),
    }


def caches(best_layer: int, *, with_factors: bool) -> dict[str, dict[str, Cache]]:
    """All that is measured of our format, by table and row."""
    gamma = default_factors()
    orders = [1, *hadamard_orders(128)]
    tables = {
        "levers": levers(best_layer),
        "orders": {
            f"{order} {what}": Cache(order=order, rotate_v=what == "KV")
            for order in orders
            for what in ("K", "KV")
            if order > 1 or what == "K"
        },
        "order levers": {
            f"{order} {name}": Cache(order=order, **gamma, centred=name == "c")
            for order in orders
            for name in ("-", "c")
        },
    }
    if with_factors:
        parts = {"K": ("k_factor",), "V": ("v_factor",), "KV": ("k_factor", "v_factor")}
        tables["factors"] = {
            f"{part} {gamma}": Cache(**dict.fromkeys(fields, gamma))
            for part, fields in parts.items()
            for gamma in GAMMAS
        }
    return tables


def peers(sample: list) -> dict[str, KVQuantizer]:
    found: dict[str, KVQuantizer] = {}
    for order in (1, 128):
        found[f"per channel {order}"] = PerChannelKeys(order)
        found[f"per channel, no exact tail {order}"] = PerChannelKeys(order, residual=0)
        found |= {f"codebook of {n} {order}": Codebook(sample, n, order) for n in (1, 16, 256)}
        found[f"hessian {order}"] = HessianRounding(sample, order)
    return found


def measure(name: str, windows: torch.Tensor, calibration_windows: torch.Tensor, device: str) -> dict:
    """Everything about one model."""
    checkpoint = MODELS[name](Checkpoint.open(EXAMPLE))
    start = time.monotonic()
    calibration = calibrate(checkpoint, calibration_windows, device=device)
    calibration_seconds = time.monotonic() - start
    model = WindowModel(checkpoint.config, checkpoint.load, WINDOW, device)
    # The layer to keep is chosen on the calibration's text, as a user would.
    default = Cache(**default_factors(), centred=True, framed=True).quantizer(model, calibration)
    suggestion = suggest(model, calibration_windows[:2], default)
    tables = caches(suggestion.layers[0].layers[0], with_factors=name == "example")
    unique = {cache: cache.quantizer(model, calibration) for table in tables.values() for cache in table.values()}
    quantizers = {str(i): q for i, q in enumerate(unique.values())}
    others = peers(gather(model, calibration_windows))
    total = len(windows) * (1 + len(quantizers) + len(others))
    with tqdm(total=total, desc=name, unit="window", disable=not sys.stderr.isatty()) as bar:
        found = evaluate(model, windows, {"fp16": model.exact} | quantizers | others, bar.update)
    by_cache = {cache: found[str(i)] for i, cache in enumerate(unique)}
    shown = {row: unique[cache] for row, cache in tables["levers"].items()}
    prompts = windows[:8, :1024]
    for row, agreement in greedy_agreement(model, prompts, shown).items():
        q = by_cache[tables["levers"][row]]
        q.greedy_agreement, q.greedy_identical = agreement
    analysed = {row: shown[row] for row in ("int4", "recipe", "all levers")}
    errors, outliers = analyse(model, windows[:2], analysed)
    results = {t: {row: _numbers(by_cache[c]) for row, c in table.items()} for t, table in tables.items()}
    found_levers = {"fp16": found["fp16"]} | {row: by_cache[c] for row, c in tables["levers"].items()}
    by_position = name == "example"
    results["levers"] = {row: _numbers(q, by_position=by_position) for row, q in found_levers.items()}
    results["peers"] = {row: _numbers(found[row]) | dataclasses.asdict(q.demands) for row, q in others.items()}
    return results | {
        "errors": {row: dataclasses.asdict(e) for row, e in errors.items()},
        "outliers": dataclasses.asdict(outliers),
        "suggestion": dataclasses.asdict(suggestion),
        "calibration_seconds": round(calibration_seconds, 1),
        "seconds": round(time.monotonic() - start, 1),
    }


def _numbers(quality: Quality, *, by_position: bool = False) -> dict:
    numbers = {k: v for k, v in dataclasses.asdict(quality).items() if v is not None}
    if not by_position:
        del numbers["kl_by_position"]
    return numbers


def _windows(paths: list[Path], tokenizer: Tokenizer, num_tokens: int) -> torch.Tensor:
    ids = tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in paths))
    if len(ids) < num_tokens:
        raise ConfigError(f"the texts give {len(ids)} tokens and {num_tokens} are asked for: lower --max_tokens")
    return torch.tensor(ids[:num_tokens]).view(-1, WINDOW)


def run_accuracy(
    models: Sequence[str],
    max_tokens: int,
    device: str,
    command: str,
    commit: str | None,
    previous: AccuracyResults | None,
) -> Iterator[AccuracyResults]:
    """Measure models one after the other.

    Parameters
    ----------
    models : sequence of str
        Of :data:`MODELS`.
    max_tokens : int
        Held-out tokens, a multiple of the window.
    device : str
        Of PyTorch.
    command : str
        As it was typed.
    commit : str, optional
        For a tree without its git repository.
    previous : AccuracyResults, optional
        Whose other models keep their numbers.

    Yields
    ------
    AccuracyResults
        What is known after each model.
    """
    tokenizer = Tokenizer.load(EXAMPLE)
    windows = _windows(HELD_OUT, tokenizer, max_tokens)
    calibration_windows = _windows(CALIBRATION, tokenizer, CALIBRATION_TOKENS)
    found = dict(previous.models) if previous else {}
    environment = describe(
        command,
        commit,
        gpu=torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    for name in models:
        found[name] = rounded(measure(name, windows, calibration_windows, device))
        yield AccuracyResults(
            environment=environment,
            num_tokens=windows.numel(),
            window=WINDOW,
            calibration_tokens=CALIBRATION_TOKENS,
            range_factor=RANGE_FACTORS[128],
            models=found,
        )


#: Fields that the page has no use for.
_UNUSED = {"k_histogram", "k_histogram_rotated", "outputs", "nats", "kl_max", "greedy_identical"}


def rounded(value: Any) -> Any:
    """Six digits are more than any of these numbers means."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items() if k not in _UNUSED}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value
