"""silu_mul on the GPU, from Python and through TensorRT's interfaces without it: against fp64."""

from __future__ import annotations

import pytest
import torch

from saw_trtllm import ops
from tests.support.exactness import ROUNDING
from tests.support.plugin_library import SILU_MUL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(64, 14336), (3, 33)])
def test_gates(rows, width, dtype, run_plugin):
    x, gate = ((torch.randn(rows, width, device="cuda") * 5).to(dtype) for _ in range(2))
    x[0, :4] = torch.tensor([-100, 0, 100, -8], dtype=dtype)
    (y,) = run_plugin(SILU_MUL, dtype, [x, gate], hidden_size=width)
    from_python = torch.full_like(x, torch.nan)
    ops.silu_mul(x, gate, y=from_python, stream=torch.cuda.current_stream())
    assert torch.equal(y, from_python)
    want = torch.nn.functional.silu(x.double()) * gate.double()
    assert ((y.double() - want).abs() <= (ROUNDING[dtype] + 1e-5) * want.abs() + 1e-7).all()
