"""Inputs of W8A8 layers are rounded as compressed-tensors rounds them."""

from __future__ import annotations

import pytest
import torch

from saw_trtllm.backends.reference.quantized_input import round_input


def library_round(x: torch.Tensor, strategy: str, scale: torch.Tensor | None) -> torch.Tensor:
    """By the library's own quantization of a linear layer's input."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    group = {"group_size": 128} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, dynamic=scale is None, **group)
    zero = torch.zeros(1)
    if scale is None:
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    return fake_quantize(x, scale, zero, args)


@pytest.mark.parametrize(
    ("activation", "strategy", "scale"),
    [("token", "token", None), ("block", "group", None), ("tensor", "tensor", 0.02)],
)
def test_rounding_is_the_librarys(activation, strategy, scale):
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    want = library_round(x, strategy, None if scale is None else torch.tensor([scale]))
    torch.testing.assert_close(round_input(x, activation, scale), want, rtol=2**-22, atol=0)


def test_a_row_of_zeros_stays_one():
    x = torch.zeros(2, 128)
    x[1, 3] = 5.0
    assert torch.equal(round_input(x, "token"), x)


def test_a_stored_scale_is_needed():
    with pytest.raises(ValueError, match="needs it"):
        round_input(torch.zeros(1, 128), "tensor")
