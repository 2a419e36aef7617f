"""all_reduce on the GPU: the ranks are streams of one GPU here, whose buffers each other's kernels write to."""

from __future__ import annotations

import pytest
import torch

from saw_trtllm.ops.arrays import kernels


@pytest.fixture
def group():
    """Makes a group of so many ranks: its sum of a list of tensors, each rank's on its own stream."""
    buffers = []

    def make(size):
        module = kernels()
        nbytes = module.all_reduce_buffer_bytes(size)
        buffers.extend(torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(size))
        peers = [buffer.data_ptr() for buffer in buffers]
        ranks = [
            module.Ranks(rank=rank, peers=peers, size=size, nccl=0, one_shot_bytes=1 << 20) for rank in range(size)
        ]
        streams = [torch.cuda.Stream() for _ in range(size)]
        torch.cuda.synchronize()

        def enqueue(rank, x, total=None, **norm):
            dtype = getattr(module.DType, str(x.dtype).removeprefix("torch."))
            arguments = {"ranks": ranks[rank], "x": x.data_ptr(), "dtype": dtype, "device": x.device.index}
            arguments["stream"] = torch.cuda.current_stream().cuda_stream
            if norm:
                return module.all_reduce_norm(**arguments, **norm)
            return module.all_reduce(**arguments, y=total.data_ptr(), count=x.numel())

        return streams, enqueue

    return make


def in_order(parts):
    """The sum in fp32, in the order of the ranks, rounded once."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    return total.to(parts[0].dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_sums_of_all_extents_in_a_row(size, dtype, group):
    """From 16 bytes to the largest: the same bits on all ranks, whatever the kernel before it was given.

    The kernels of all ranks must be on the one GPU at once, or they wait for each other for ever: of eight ranks few
    blocks of each are.
    """
    streams, enqueue = group(size)
    largest = 1 << 19 if size < 4 else 8 * 1024
    counts = [8, 4096, largest // 2, 8, 40, largest, 4096 + 1024, largest, 8, 4096]
    parts = [[torch.randn(n, device="cuda").to(dtype) for _ in range(size)] for n in counts]
    sums = [[torch.full_like(x, torch.nan) for x in of_ranks] for of_ranks in parts]
    torch.cuda.synchronize()
    for of_ranks, results in zip(parts, sums, strict=True):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                assert enqueue(rank, of_ranks[rank], results[rank]) == 0
    torch.cuda.synchronize()
    for of_ranks, results in zip(parts, sums, strict=True):
        want = in_order(of_ranks)
        assert all(torch.equal(result, want) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (3, 5120), (64, 4096), (65, 2048), (128, 4096), (64, 8192)])
def test_a_norm_after_a_sum(rows, width, dtype, group):
    """The residual's sum bit for bit, the norm within a rounding more than PyTorch's; a plain sum between them."""
    streams, enqueue = group(2)
    shape = {"device": "cuda", "dtype": dtype}
    x = [torch.randn(rows, width, **shape) for _ in streams]
    residual, weight = torch.randn(rows, width, **shape), torch.rand(width, device="cuda") + 0.5
    y, added, total = ([torch.full_like(residual, torch.nan) for _ in streams] for _ in range(3))
    norm = {"residual": residual.data_ptr(), "weight": weight.data_ptr(), "num_rows": rows, "width": width}
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for _ in range(2):
                outputs = {"y": y[rank].data_ptr(), "sum": added[rank].data_ptr()}
                assert enqueue(rank, x[rank], **norm, **outputs, epsilon=0.125) == 0
                if rows * width <= 1 << 19:
                    assert enqueue(rank, x[rank], total[rank]) == 0
    torch.cuda.synchronize()
    want = (in_order(x).float() + residual.float()).to(dtype)
    normed = want.float() * (want.float().square().mean(1, keepdim=True) + 0.125).rsqrt() * weight
    for rank in range(2):
        assert torch.equal(added[rank], want)
        assert torch.equal(y[rank], y[0])
        torch.testing.assert_close(y[rank].float(), normed, rtol=torch.finfo(dtype).eps, atol=2**-24)
    assert all(torch.equal(found, in_order(x)) for found in total)


@pytest.mark.gpu
def test_in_a_graph_with_ranks_that_come_late(group):
    """Launched again and again, the ranks in turn far ahead of the others: nobody reads what a later sum has sent."""
    size, length = 2, 8
    streams, enqueue = group(size)
    x = [torch.randn(64, 4096, device="cuda").half() for _ in range(size)]
    y = [[torch.zeros_like(x[0]) for _ in range(length)] for _ in range(size)]
    graphs = []
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(length):
                enqueue(rank, x[rank] if i == 0 else y[rank][i - 1], y[rank][i])
        graphs.append(graph)
    for turn in range(20):
        for rank in (0, 1) if turn % 2 else (1, 0):
            with torch.cuda.stream(streams[rank]):
                torch.cuda._sleep(200_000 * (turn % 3))
                graphs[rank].replay()
    torch.cuda.synchronize()
    want = in_order(x)
    for i in range(length):
        assert torch.equal(y[0][i], y[1][i])
        assert torch.equal(y[0][i], want)
        want = in_order([want, want])


@pytest.mark.gpu
def test_what_it_does_not_take(group):
    """Numbers that are no multiple of 8, and more than a buffer has room for."""
    _, enqueue = group(2)
    for count in (4, (1 << 19) + 8):
        x = torch.zeros(count, device="cuda").half()
        assert enqueue(0, x, x) != 0
