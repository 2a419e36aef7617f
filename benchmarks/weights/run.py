"""One run: each model's predictions of a text beside the original's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.environment import cpu_name, describe
from benchmarks.weights.record import Divergence, QuantizedModel, WeightsResults
from saw_trtllm.backends.reference.quantized_input import round_input
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.errors import ConfigError
from saw_trtllm.eval.text import load_tokenizer, make_windows, read_text

#: Predictions whose mean counts as one observation: neighbors depend on each other.
PIECE = 64

Logits = Callable[[torch.Tensor], torch.Tensor]


def run_weights(
    model_dir: Path,
    quantized: Sequence[Path],
    text: Path,
    max_tokens: int,
    max_seq_len: int,
    command: str,
    commit: str | None,
) -> WeightsResults:
    """Measure quantized models on a CPU.

    Parameters
    ----------
    model_dir : Path
        Of the original.
    quantized : sequence of Path
        In the format of compressed-tensors, which dequantizes them for transformers.
    text : Path
        UTF-8.
    max_tokens, max_seq_len : int
        Of the text, and of a window.
    command : str
        As it was typed.
    commit : str, optional
        For a tree without its git repository.

    Raises
    ------
    ConfigError
        If transformers cannot open a model.
    """
    checkpoint = Checkpoint.open(model_dir)
    tokenizer = load_tokenizer(checkpoint)
    ids, longest = tokenizer.encode(read_text(text)), checkpoint.config.max_positions
    windows = make_windows(ids, longest, max_seq_len, max_tokens, tokenizer.bos_id)
    original = _predict(_transformers(model_dir), windows)
    models = [measure_model(folder, windows, original) for folder in quantized]
    return WeightsResults(
        environment=describe(
            command,
            commit,
            cpu=cpu_name(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        ),
        num_tokens=windows.numel(),
        window=max_seq_len,
        model=checkpoint.folder.name,
        models=models,
    )


def measure_model(folder: Path, windows: torch.Tensor, original: torch.Tensor) -> QuantizedModel:
    """One model's divergence from the original's predictions."""
    checkpoint = Checkpoint.open(folder)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.formats}
    ours = Compared.of(original, _predict(_saw(checkpoint, windows.shape[1]), windows))
    rounded = None
    if {format.activation for format in checkpoint.formats.values()} == {"token"}:
        rounded = Compared.of(original, _predict(_saw(checkpoint, windows.shape[1], _W8A8Model), windows)).divergence()
    theirs = Compared.of(original, _predict(_transformers(folder, dequantize=True), windows))
    difference, top1 = pieces(ours.kl - theirs.kl), pieces(ours.top1 - theirs.top1)
    return QuantizedModel(
        name=folder.name,
        weights=", ".join(sorted({f.describe(shapes[name]) for name, f in checkpoint.formats.items()})) or "16 bits",
        ours=ours.divergence(),
        theirs=theirs.divergence(),
        w8a8=rounded,
        kl_difference=difference[0],
        kl_difference_error=difference[1],
        top1_difference=top1[0],
    )


@dataclass
class Compared:
    """By predicted token: the divergence in nats, and whether the likeliest token is the same."""

    kl: torch.Tensor
    top1: torch.Tensor

    @classmethod
    def of(cls, original: torch.Tensor, found: torch.Tensor) -> Compared:
        """Of log probabilities ``[windows, T, vocab]``."""
        kl = F.kl_div(found, original, reduction="none", log_target=True).sum(-1)
        return cls(kl, (found.argmax(-1) == original.argmax(-1)).float())

    def divergence(self) -> Divergence:
        """Their means."""
        (kl, kl_error), (top1, top1_error) = pieces(self.kl), pieces(self.top1)
        return Divergence(kl=kl, kl_error=kl_error, top1=top1, top1_error=top1_error)


def pieces(x: torch.Tensor) -> tuple[float, float]:
    """Mean of ``[windows, T]``, and its standard error over pieces of a window."""
    means = x.double().unfold(1, PIECE, PIECE).mean(-1).flatten()
    return round(float(x.double().mean()), 8), round(float(means.std() / len(means) ** 0.5), 8)


def _predict(logits: Logits, windows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([logits(window[None]).float().log_softmax(-1) for window in windows])


class _W8A8Model(WindowModel):
    """All of whose layers but ``lm_head`` round their inputs, each token by its own scale."""

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x if weight is self._lm_head else round_input(x, "token"), weight, bias)


def _saw(checkpoint: Checkpoint, max_seq_len: int, kind: type[WindowModel] = WindowModel) -> Logits:
    model = kind(checkpoint.config, checkpoint.load_finite, max_seq_len)
    return lambda ids: model.logits(model.hidden(ids))


def _transformers(folder: Path, dequantize: bool = False) -> Logits:
    try:
        config = AutoConfig.from_pretrained(folder)
        if dequantize:
            config.quantization_config["dequantize"] = True
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    except (ImportError, OSError, ValueError) as e:
        raise ConfigError(
            f"transformers cannot open {folder} ({str(e).splitlines()[0]}): give models that it can"
        ) from e
    return lambda ids: model(ids).logits
