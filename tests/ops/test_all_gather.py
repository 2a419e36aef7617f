"""all_gather on the GPU: what NCCL gathers, rank by rank, put together row by row."""

from __future__ import annotations

import pytest
import torch

from saw_trtllm.ops.arrays import kernels


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "rows", "width", "out_width"), [(2, 64, 64128, 128256), (2, 3, 102, 203), (4, 1, 52, 208), (8, 5, 7, 50)]
)
def test_rows_have_all_ranks_columns(size, rows, width, out_width):
    parts = torch.randn(size, rows, width, device="cuda")
    out = torch.full((rows, out_width), torch.nan, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    sizes = {"num_ranks": size, "num_rows": rows, "width": width, "out_width": out_width}
    code = kernels().all_gather(parts=parts.data_ptr(), out=out.data_ptr(), **sizes, device=0, stream=stream)
    assert code == 0
    assert torch.equal(out, torch.cat(list(parts), dim=1)[:, :out_width])
