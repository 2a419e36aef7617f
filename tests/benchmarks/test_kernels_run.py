"""The kernels' benchmark on a GPU, on small cases: what is timed is attention, captured in a graph."""

from __future__ import annotations

import pytest

from benchmarks.kernels.cases import Case, Heads
from benchmarks.kernels.record import Bandwidth
from benchmarks.kernels.run import run_case
from benchmarks.kernels.suite import _contenders
from benchmarks.kernels.timing import CudaTimer

pytestmark = pytest.mark.gpu

OURS = ("saw_int4", "int4", "bf16")
BANDWIDTH = Bandwidth(read_gbps=1.0, copy_gbps=1.0)


@pytest.mark.parametrize(
    "case",
    [
        Case("decode", 3, 3, 191, OURS, Heads(8, 2, 128)),
        Case("decode", 1, 1, 4095, OURS, Heads(4, 4, 64)),
        Case("write", 5, 5, 1023, ("saw_int4", "int4")),
        Case("write", 1, 2048, 0, ("saw_int4", "int4")),
        Case("prefill", 1, 256, 0, ("saw_int4", "bf16"), Heads(8, 2, 128)),
        Case("prefill", 1, 256, 1024, ("saw_int4", "bf16"), Heads(8, 2, 128)),
        Case("layers", 3, 3, 191, ("saw_int4",), Heads(8, 2, 128)),
    ],
    ids=lambda case: f"{case.suite}-{case.name}",
)
def test_contenders_compute_what_they_should(case):
    measured = run_case(case, _contenders(case, None, None), CudaTimer(20), BANDWIDTH)
    assert measured.missing == {}
    for m in measured.measurements:
        assert m.cuda_graph
        assert m.repetitions == 20
        assert 0 < m.p10_us <= m.median_us <= m.p90_us
        if case.suite != "write":
            assert m.cosine > (0.999 if m.contender == "bf16" else 0.97)
