"""The kernels together, on steps of prefills and decodes, against the CPU reference."""

from __future__ import annotations

import pytest

from saw_trtllm.format import KVFormat
from tests.support.steps import CASES, DECODES, PREFILLS, Step, assert_matches, run_kernels


@pytest.mark.parametrize(
    ("prefills", "decodes"), [(PREFILLS, DECODES), (PREFILLS, []), ([], DECODES)], ids=["mixed", "prefill", "decode"]
)
@pytest.mark.parametrize(("kv", "head_dim", "dtype", "options"), CASES)
def test_a_step_is_the_references(kv, head_dim, dtype, options, prefills, decodes, rng):
    step = Step.make(KVFormat(kv, head_dim, dtype=dtype), rng, prefills=prefills, decodes=decodes, **options)
    assert_matches(step, run_kernels(step), step.reference())
