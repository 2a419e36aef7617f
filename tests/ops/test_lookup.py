"""lookup on the GPU, from Python and through TensorRT's interfaces without it."""

from __future__ import annotations

import pytest
import torch

from saw_trtllm import ops
from tests.support.plugin_library import LOOKUP


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [4096, 18])
def test_rows_of_a_table(width, dtype, make_plugin):
    """Those that are not there are zeros."""
    plugin = make_plugin(LOOKUP, dtype, vocab_size=300, hidden_size=width)
    table = torch.randn(300, width, dtype=dtype, device="cuda")
    rows = torch.tensor([0, 299, 7, 7, -1, 300, 150], dtype=torch.int32, device="cuda")
    y = torch.full((len(rows), width), torch.nan, dtype=dtype, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    bound = [(t.data_ptr(), list(t.shape)) for t in (rows, table)]
    assert plugin.enqueue(bound, [y.data_ptr()], 0, stream) == 0
    want = table[rows.clamp(0, 299).long()]
    want[4:6] = 0
    assert torch.equal(y, want)
    y.fill_(torch.nan)
    ops.lookup(table, rows, out=y, stream=torch.cuda.current_stream())
    assert torch.equal(y, want)
