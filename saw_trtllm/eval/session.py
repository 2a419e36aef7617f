"""One evaluation from a checkpoint and a text to all that a report shows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from saw_trtllm.backends.reference.quantizers import KVQuantizer
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.eval.analysis import LayerErrors, Outliers, analyse
from saw_trtllm.eval.metrics import Difference, Quality, differences, greedy_agreement, measure, qualities
from saw_trtllm.eval.suggest import Suggestion, num_measurements, suggest
from saw_trtllm.model.quantization import Weight, quantize
from saw_trtllm.plan.formats import engine_formats
from saw_trtllm.version import __version__

if TYPE_CHECKING:
    from saw_trtllm.eval.variants import Variant

#: Tokens of a greedy continuation's prompt at most.
_PROMPT_TOKENS = 256
_NUM_PROMPTS = 8
#: Tokens on which layers are looked at, and measured one by one: whole windows, at least one.
_DETAIL_TOKENS = 4096


@dataclass
class Evaluation:
    """What was found.

    Attributes
    ----------
    about : dict
        Model, text, device, versions, time.
    settings : dict of str to dict
        By the variant's name, its place in the grid.
    qualities : dict of str to Quality
    differences : dict of str to dict of str to Difference
        Each cache's divergence less each other's.
    errors : dict of str to LayerErrors
    outliers : Outliers
    suggestion : Suggestion or None
    suggested_for : str or None
        The variant that the suggestion is for.
    with_weights : dict of str to Quality or None
        Against the model that the weights were quantized from: what weights and cache cost together, and weights alone
        with the exact cache.
    """

    about: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    qualities: dict[str, Quality]
    differences: dict[str, dict[str, Difference]]
    errors: dict[str, LayerErrors]
    outliers: Outliers
    suggestion: Suggestion | None = None
    suggested_for: str | None = None
    with_weights: dict[str, Quality] | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        results = [
            {
                "name": name,
                **self.settings[name],
                **dataclasses.asdict(q),
                "differences": {other: dataclasses.asdict(d) for other, d in self.differences[name].items()},
                "errors": dataclasses.asdict(self.errors[name]),
            }
            for name, q in self.qualities.items()
        ]
        for result in results:
            if self.with_weights is not None:
                result["with_weights"] = dataclasses.asdict(self.with_weights[str(result["name"])])
        data = {**self.about, "results": results, "outliers": dataclasses.asdict(self.outliers)}
        if self.suggestion is not None:
            data["suggestion"] = {"for": self.suggested_for, **dataclasses.asdict(self.suggestion)}
        return data


class Session:
    """A model and a text, ready to be measured.

    Parameters
    ----------
    checkpoint : Checkpoint
    windows : torch.Tensor
        int64 ``[num_windows, T]``.
    device : str
        "auto" takes the GPU where PyTorch has one.
    greedy_tokens : int
        Length of the greedy continuations; 0 leaves them out.
    qformat : str
        As ``saw-build`` has it: the weights are rounded to it.
    original : Checkpoint, optional
        What the weights were quantized from.

    Raises
    ------
    CheckpointError
        If a weight is NaN or infinite, or the model computes such.
    BackendUnavailableError
        If there is no such device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: torch.Tensor,
        device: str = "auto",
        greedy_tokens: int = 128,
        qformat: str = "auto",
        original: Checkpoint | None = None,
    ) -> None:
        config = checkpoint.config
        self.checkpoint = checkpoint
        self.windows = windows
        self.device = choose_device(device)
        self.greedy_tokens = greedy_tokens
        self.prompts = _prompts(windows, config.max_positions - greedy_tokens) if greedy_tokens else None
        positions = windows.shape[1]
        if self.prompts is not None:
            positions = max(positions, self.prompts.shape[1] + greedy_tokens)
        self.model = open_model(checkpoint, positions, self.device, qformat)
        self.original = None if original is None else open_model(original, positions, self.device)
        self.model.check_ids(windows)
        self._detail = windows[: max(1, _DETAIL_TOKENS // windows.shape[1])]

    def num_steps(self, num_variants: int, suggest_for: Variant | None = None, budget: float | None = None) -> int:
        """Times that :meth:`run` reports progress, at most."""
        passes = len(self.windows) * (1 if self.original is None else 2)
        steps = num_variants * (passes + (self.prompts is not None)) + len(self._detail)
        if suggest_for is not None:
            tried = num_measurements(self.model.config.num_hidden_layers, wide=suggest_for.may_widen, budget=budget)
            steps += tried * len(self._detail)
        return steps

    def run(
        self,
        variants: list[Variant],
        quantizers: dict[str, KVQuantizer],
        *,
        suggest_for: Variant | None = None,
        wide: KVQuantizer | None = None,
        budget: float | None = None,
        progress: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Measure ``quantizers``, by the names of ``variants``.

        Parameters
        ----------
        variants : list of Variant
        quantizers : dict of str to KVQuantizer
        suggest_for : Variant, optional
            The one whose layers are to be tried one by one.
        wide, budget : optional
            As :func:`~saw_trtllm.eval.suggest.suggest` has them.
        progress : callable, optional
        """
        start = time.monotonic()
        measured = measure(self.model, self.windows, quantizers, progress)
        found = qualities(self.model, quantizers, measured)
        if self.prompts is not None:
            agreements = greedy_agreement(self.model, self.prompts, quantizers, self.greedy_tokens, progress)
            for name, (agreement, identical) in agreements.items():
                found[name].greedy_agreement, found[name].greedy_identical = agreement, identical
        with_weights = None
        if self.original is not None:
            sums = measure(self.model, self.windows, quantizers, progress, self.original)
            with_weights = qualities(self.model, quantizers, sums)
        errors, outliers = analyse(self.model, self._detail, quantizers, progress)
        suggestion = None
        if suggest_for is not None:
            cache = quantizers[suggest_for.name]
            suggestion = suggest(self.model, self._detail, cache, progress, wide=wide, budget=budget)
        settings = {v.name: v.settings() for v in variants}
        about = self._about(time.monotonic() - start)
        tried = None if suggest_for is None else suggest_for.name
        apart = differences(measured)
        return Evaluation(about, settings, found, apart, errors, outliers, suggestion, tried, with_weights=with_weights)

    def _about(self, seconds: float) -> dict[str, Any]:
        c = self.model.config
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {
            "model": str(self.checkpoint.folder),
            "architecture": c.architecture,
            "dtype": c.dtype,
            "num_layers": c.num_hidden_layers,
            "num_heads": c.num_attention_heads,
            "num_kv_heads": c.num_key_value_heads,
            "head_dim": c.head_size,
            "num_windows": len(self.windows),
            "max_seq_len": self.windows.shape[1],
            "num_tokens": self.windows.numel(),
            "detail_tokens": self._detail.numel(),
            "greedy_prompts": 0 if self.prompts is None else len(self.prompts),
            "greedy_tokens": self.greedy_tokens if self.prompts is not None else 0,
            "device": device,
            "seconds": round(seconds, 1),
            "saw_trtllm": __version__,
            "torch": torch.__version__,
        }


def open_model(
    checkpoint: Checkpoint, max_seq_len: int, device: str | torch.device = "auto", qformat: str = "auto"
) -> WindowModel:
    """Load a checkpoint's weights onto a device, rounded as ``qformat`` says; NaN or infinite ones are rejected."""
    device = choose_device(device) if isinstance(device, str) else device
    formats = engine_formats(checkpoint, qformat)

    def load(name: str) -> Weight:
        weight = checkpoint.load_finite(name)
        rounded = name in formats and name not in checkpoint.formats
        return quantize(weight, formats[name]) if rounded else weight

    return WindowModel(checkpoint.config, load, max_seq_len, device)


def choose_device(name: str) -> torch.device:
    """The named device, or for "auto" the GPU where PyTorch has one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise BackendUnavailableError(f"device {name} is not available ({reason}): give --device cpu or auto") from e
    return device


def _prompts(windows: torch.Tensor, longest: int) -> torch.Tensor | None:
    """Prompts spread over the text, ``[B, T]``; None where the model's positions leave no room for them."""
    length = min(_PROMPT_TOKENS, windows.shape[1], longest)
    if length < 1:
        return None
    text = windows.flatten()
    starts = torch.linspace(0, len(text) - length, min(_NUM_PROMPTS, len(text) // length)).long()
    return torch.stack([text[start : start + length] for start in starts])
