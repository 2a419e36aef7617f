"""rms_norm on the GPU, from Python and through TensorRT's interfaces without it: against fp64."""

from __future__ import annotations

import pytest
import torch

from saw_trtllm import ops
from tests.support.exactness import ROUNDING
from tests.support.plugin_library import RMS_NORM


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("width", [4096, 14336, 96, 18])
def test_norms(width, residual, dtype, run_plugin):
    x, added = (torch.randn(2, 77, width, device="cuda") * 3).to(dtype)
    weight = torch.randn(1, width, device="cuda")
    inputs, fields = [x, weight, *[added] * residual], {"hidden_size": width, "use_residual": int(residual)}
    y, *sums = run_plugin(RMS_NORM, dtype, inputs, 1 + residual, epsilon=1e-3, **fields)
    if residual:
        x = x + added
        assert torch.equal(sums[0], x)
    from_python = torch.full_like(x, torch.nan)
    heads = {"x": x.unsqueeze(1), "y": from_python.unsqueeze(1)}
    ops.rms_norm(weight=weight, epsilon=1e-3, stream=torch.cuda.current_stream(), **heads)
    assert torch.equal(y, from_python)
    wide = x.double()
    want = wide / (wide.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert ((y.double() - want).abs() <= (ROUNDING[dtype] + 1e-6) * want.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_heads(dtype, run_plugin):
    """As Qwen3 has them of Q and K: V stays as it is."""
    x, weight = torch.randn(50, 6, 128, device="cuda").to(dtype), torch.randn(5, 128, device="cuda")
    inputs, fields = [x.flatten(1), weight], {"hidden_size": 128, "num_heads": 6, "num_normed": 5}
    (y,) = run_plugin(RMS_NORM, dtype, inputs, epsilon=1e-5, **fields)
    assert torch.equal(y[:, 5 * 128 :], x[:, 5])
    from_python = torch.full_like(x, torch.nan)
    ops.rms_norm(x, weight, y=from_python, epsilon=1e-5, stream=torch.cuda.current_stream())
    assert torch.equal(y, from_python.flatten(1))
    wide = x[:, :5].double()
    want = (wide / (wide.square().mean(2, keepdim=True) + 1e-5).sqrt() * weight.double()).flatten(1)
    assert ((y[:, : 5 * 128].double() - want).abs() <= (ROUNDING[dtype] + 1e-6) * want.abs() + 1e-7).all()
