"""A calibration that has been measured: its levers, on windows of its text that it was not made of, and its length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from saw_trtllm.backends.reference.quantizers import QuantizedRows
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.calibrate import Statistics, check_length, passes
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.errors import ConfigError
from saw_trtllm.eval.metrics import Difference, difference, measure
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.formats import default_rotate_v

ROTATION, FRAMES, CENTERED = "rotation alone", "frames", "centers and frames"
#: Of so many windows one is kept from the calibration, to measure it on.
_HOLD_OUT = 4
#: Caches that the held-out windows are measured with.
_NUM_CACHES = 3
#: Excess of noise by a finite text that is not worth more text.
_MAX_EXCESS = 0.05


@dataclass(frozen=True)
class Measured:
    """A calibration, and what its text says of it.

    Attributes
    ----------
    calibration : Calibration
        With centers, unless the held-out windows are clearly better without.
    kl_mean : dict of str to float
        Divergence from an exact cache by ``rotation alone``, ``frames`` and ``centers and frames``.
    gain : Difference
        Of the calibration from the rotation alone: below 0 where it helps.
    excess : float
        :meth:`~saw_trtllm.calibrate.Statistics.split_half_excess`.
    num_held_out : int
        Tokens that it was measured on.
    """

    calibration: Calibration
    kl_mean: dict[str, float]
    gain: Difference
    excess: float
    num_held_out: int

    @property
    def centered(self) -> bool:
        """Whether the calibration has centers."""
        return bool(self.calibration.k_center.any())

    @property
    def helps(self) -> bool:
        """Whether it is clearly better than the rotation alone."""
        return self.gain.is_real and self.gain.mean < 0

    @property
    def num_tokens_needed(self) -> int:
        """Tokens of such text that leave an excess of 5 %, which falls with the length; 0 where there are enough."""
        # The halves' excess is about twice that of the whole.
        ratio = self.excess / 2 / _MAX_EXCESS
        return 0 if ratio <= 1 else int(round(ratio * self.calibration.num_tokens, -2))


def num_steps(windows: torch.Tensor) -> int:
    """Tokens that :func:`measured_calibration` reports as progress for windows ``[n, T]``."""
    kept = _held_out(windows)
    return windows.shape[1] * (sum(map(len, passes(windows[~kept]))) + _NUM_CACHES * int(kept.sum()))


def measured_calibration(
    checkpoint: Checkpoint,
    windows: torch.Tensor,
    progress: Callable[[int], None] = lambda _: None,
    device: str | torch.device = "cpu",
) -> Measured:
    """Calibrate on three quarters of some windows, measure each lever on the others, and leave out what harms.

    Parameters
    ----------
    checkpoint : Checkpoint
    windows : torch.Tensor
        int64 ``[n, T]``, each from position 0.
    progress : callable, optional
        Called with tokens that are done.
    device : str or torch.device
        Where PyTorch computes.

    Raises
    ------
    CheckpointError
        If a weight cannot be read or is not finite.
    ConfigError
        If the text is too short, or its tokens are not the model's.
    """
    if len(windows) < 3:
        raise ConfigError(
            f"the text gives {len(windows)} sequences of {windows.shape[1]} tokens, and 3 are needed, one of them to "
            "measure the calibration on: give a longer text, or a smaller --max_seq_len"
        )
    kept = _held_out(windows)
    text, held_out = windows[~kept], windows[kept]
    check_length(text, checkpoint.config.head_size)
    model = WindowModel(checkpoint.config, checkpoint.load_finite, windows.shape[1], device)
    model.check_ids(windows)
    statistics = Statistics(checkpoint, model)
    statistics.gather(text, progress)
    found = {FRAMES: statistics.calibration(centered=False), CENTERED: statistics.calibration()}
    rotate_v = default_rotate_v(checkpoint, checkpoint.formats)
    rows = KVFormat("saw_int4", model.config.head_size, model.config.dtype, rotate_v=rotate_v)
    caches = {ROTATION: QuantizedRows(rows)} | {
        name: QuantizedRows.calibrated(rows, rows, c) for name, c in found.items()
    }
    measured = measure(model, held_out, caches, lambda: progress(windows.shape[1]))
    without = difference(measured[FRAMES], measured[CENTERED])
    best = FRAMES if without.is_real and without.mean < 0 else CENTERED
    return Measured(
        found[best],
        {name: sums.quality(0.0).kl_mean for name, sums in measured.items()},
        difference(measured[best], measured[ROTATION]),
        statistics.split_half_excess(),
        held_out.numel(),
    )


def _held_out(windows: torch.Tensor) -> torch.Tensor:
    """Which windows are kept, evenly spread: bool ``[n]``."""
    every = min(_HOLD_OUT, len(windows))
    return torch.arange(len(windows)) % every == every - 1
