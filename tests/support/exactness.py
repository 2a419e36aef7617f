"""How exact attention has to be: as exact as PyTorch in the activations' dtype, on the same dequantized values."""

from __future__ import annotations

import torch

#: Half a unit in the last place of a number near one, by dtype.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 0.0}


def assert_as_exact_as_plain(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Within twice the error of the 16-bit computation.

    Parameters
    ----------
    out : torch.Tensor
        ``[n, rows, head_dim]`` in the activations' dtype: each of the n is judged by itself.
    exact, plain : torch.Tensor
        float64 of the same shape: the result, and what the 16-bit computation makes of it.
    """
    assert out.isfinite().all()
    dtype, out = out.dtype, out.double()

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x.square().mean((-2, -1)).sqrt()

    # One rounding to the output's dtype is nobody's error.
    rounding = rms(exact.to(dtype).double() - exact)
    allowed = 2 * torch.maximum(rms(plain - exact), rounding)
    worst = rms(out - exact) / allowed.clamp_min(1e-30)
    assert worst.numel() == 0 or worst.max() <= 1, f"error over allowed: {worst.tolist()}"
    largest = (out - exact).abs().amax((-2, -1))
    assert (largest <= 4 * (plain - exact).abs().amax((-2, -1)) + 4 * rounding).all()
    if len(out):
        cosine = torch.nn.functional.cosine_similarity(out.flatten(1), exact.flatten(1), dim=1)
        assert cosine.min() > 0.9999
