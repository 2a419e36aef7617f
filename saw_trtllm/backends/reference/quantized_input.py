"""What a layer whose weight and input have 8 bits (W8A8) multiplies by, of its input."""

from __future__ import annotations

import torch

from saw_trtllm.model.quantization import Activation

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
#: Channels of a token that share a scale where weights have theirs for blocks.
BLOCK = 128


def round_input(x: torch.Tensor, activation: Activation, input_scale: float | None = None) -> torch.Tensor:
    """Round a layer's input to e4m3 numbers times scales.

    A scale is the largest number that it holds for, over 448; its product with a number of e4m3 is rounded once.

    Parameters
    ----------
    x : torch.Tensor
        fp32 ``[..., in]``; of blocks ``in`` is a multiple of 128.
    activation : str
        ``token``: a scale for each row. ``block``: for each 128 channels of a row. ``tensor``: the stored one.
    input_scale : float, optional
        That one.

    Returns
    -------
    torch.Tensor
        fp32, of the same shape.
    """
    if activation == "tensor":
        if input_scale is None:
            raise ValueError("an input that is quantized by a stored scale needs it")
        return _round(x, torch.tensor(input_scale, dtype=torch.float32))
    groups = x.unflatten(-1, (-1, BLOCK)) if activation == "block" else x
    largest = groups.abs().amax(-1, keepdim=True)
    # A row of zeros stays one.
    return _round(groups, torch.where(largest > 0, largest / _LARGEST, 1.0)).reshape(x.shape)


def _round(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3).float() * scale
