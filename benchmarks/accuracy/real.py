"""What caches cost a real checkpoint, on text that nothing was calibrated on."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.record import AccuracyResults
from benchmarks.accuracy.run import rounded
from benchmarks.common.environment import cpu_name, describe
from saw_trtllm.backends.reference.quantizers import Fp8, KVQuantizer, QuantizedRows
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.calibrate import Statistics
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.eval.analysis import analyse
from saw_trtllm.eval.metrics import Sums, differences, measure, qualities
from saw_trtllm.eval.session import choose_device, open_model
from saw_trtllm.eval.tables import rms
from saw_trtllm.eval.text import (
    GENERATED_LENGTH,
    generated_windows,
    load_tokenizer,
    make_windows,
    prefix_token,
    read_text,
)
from saw_trtllm.format import END_CUTS, RANGE_FACTORS, KVFormat

#: Windows whose layers are looked at, one by one.
_LAYER_WINDOWS = 2


def run_real(
    model_dir: Path,
    text: Path,
    calibration_text: Path,
    max_tokens: int,
    max_seq_len: int,
    calibration_tokens: int,
    device: str,
    command: str,
    commit: str | None,
    own_text: bool = True,
) -> AccuracyResults:
    """Measure every cache on one model.

    Parameters
    ----------
    model_dir : Path
        Hugging Face folder.
    text, calibration_text : Path
        Two texts in UTF-8 that share nothing.
    max_tokens : int
        Tokens of ``text``.
    max_seq_len : int
        Tokens of a window, of both texts.
    calibration_tokens : int
        Tokens of ``calibration_text``, and of the text that the model makes up.
    device : str
        As ``saw-eval --device``.
    command : str
        As it was typed.
    commit : str, optional
        For a tree without its git repository.
    own_text : bool
        Whether the model makes up a text to be calibrated on too, which takes longer than all else.
    """
    start = time.monotonic()
    checkpoint = Checkpoint.open(model_dir)
    tokenizer, longest = load_tokenizer(checkpoint), checkpoint.config.max_positions
    windows = make_windows(tokenizer.encode(read_text(text)), longest, max_seq_len, max_tokens, tokenizer.bos_id)
    calibration_ids = tokenizer.encode(read_text(calibration_text, "--calibration_text"))
    calibration_windows = make_windows(calibration_ids, longest, max_seq_len, calibration_tokens, tokenizer.bos_id)
    model = open_model(checkpoint, max_seq_len, choose_device(device))
    own, statistics = (Statistics(checkpoint, model) for _ in range(2))
    if own_text:
        length = min(GENERATED_LENGTH, max_seq_len)
        own.gather(generated_windows(model, prefix_token(tokenizer), calibration_tokens // length, length))
    statistics.gather(calibration_windows)
    calibrations = (statistics.calibration(), own.calibration() if own_text else None)
    caches = caches_of(checkpoint.config.head_size, *calibrations)
    with tqdm(total=len(windows) * (1 + len(caches)), unit="window", disable=not sys.stderr.isatty()) as bar:
        measured = measure(model, windows, {"fp16": model.exact} | caches, bar.update)
    entry = entry_of(model, windows, caches, measured) | {
        "split_half_excess": statistics.split_half_excess(),
        "seconds": time.monotonic() - start,
    }
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return AccuracyResults(
        environment=describe(
            command,
            commit,
            gpu=gpu,
            cpu=cpu_name(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        ),
        num_tokens=windows.numel(),
        window=max_seq_len,
        calibration_tokens=calibration_windows.numel(),
        range_factor=RANGE_FACTORS[checkpoint.config.head_size],
        models={checkpoint.folder.name: rounded(entry)},
    )


def caches_of(head_dim: int, calibration: Calibration, own: Calibration | None) -> dict[str, KVQuantizer]:
    """What is compared, by name: the peers, the default, and what calibrations on a text and on the model's own add."""
    rows, wide = KVFormat("saw_int4", head_dim), KVFormat("saw_k8v4", head_dim)
    by_itself = (
        {} if own is None else {"saw_int4, calibrated on its own text": QuantizedRows.calibrated(rows, rows, own)}
    )
    return {
        "fp8 e4m3, no scales": Fp8(),
        "plain int4, min-max": QuantizedRows(KVFormat("int4", head_dim, range_factor=1.0)),
        "the paper's recipe": QuantizedRows(KVFormat("saw_int4", head_dim, range_factor=1.0)),
        "saw_int4": QuantizedRows(rows),
        **by_itself,
        "saw_int4, calibrated": QuantizedRows.calibrated(rows, rows, calibration),
        "saw_int4, calibrated, ends chosen": QuantizedRows.calibrated(rows, rows, calibration, END_CUTS),
        "saw_k8v4": QuantizedRows(wide),
        "saw_k8v4, calibrated": QuantizedRows.calibrated(wide, wide, calibration),
    }


def entry_of(
    model: WindowModel, windows: torch.Tensor, caches: dict[str, KVQuantizer], measured: dict[str, Sums]
) -> dict[str, Any]:
    """What the record says of caches that were measured on windows."""
    errors, _ = analyse(model, windows[:_LAYER_WINDOWS], caches)
    return {
        "caches": {
            name: dataclasses.asdict(q)
            for name, q in qualities(model, {"fp16": model.exact} | caches, measured).items()
        },
        "differences": {
            one: {other: dataclasses.asdict(d) for other, d in others.items()}
            for one, others in differences(measured).items()
        },
        "layers": {name: [rms(heads) for heads in e.outputs] for name, e in errors.items()},
    }
