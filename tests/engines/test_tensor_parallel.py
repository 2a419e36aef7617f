"""Engines of two ranks on the GPU, step by step: logits and the pool's bytes against the reference's of one rank."""

from __future__ import annotations

import numpy as np
import pytest

from saw_trtllm.checkpoint.layout import kv_heads_of_rank
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE
from tests.engines.cases import RANK_CASES, STEPS, tolerances
from tests.engines.ranks import WAYS, run_ranks
from tests.engines.test_steps import MOVED_CODE, ROUNDING, assert_codes, assert_rows

#: Ranks that one GPU can take by itself.
MOST_ON_ONE = 4


@pytest.fixture(scope="module", params=RANK_CASES, ids=lambda case: case.name)
def run(request, work, reference, supported):
    """A case's config, what the reference gives, and what each rank does."""
    case = request.param
    supported(case)
    from saw_trtllm.backends.tensorrt.cuda import call, runtime

    size = dict(case.options)["tp_size"]
    if size > MOST_ON_ONE and call(runtime.cudaGetDeviceCount) < size:
        pytest.skip(f"{size} ranks want {size} GPUs: so many processes on one stand still")
    expected, config = reference(case), EngineConfig.load(case.engine(work))
    return config, expected, run_ranks(work, case, config.tp_size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_references(name, way, run):
    """Half of the sums more are rounded to the engine's dtype: a rank's part of each, before they are added."""
    config, expected, ranks = run
    model = config.pretrained_config
    decodes = sum(kind == DECODE for *_, kind in STEPS[name])
    want = expected[f"{name}.logits"]
    rounding = 1.5 * ROUNDING[model.dtype]
    own_4bit = rounding + (MOVED_CODE if config.kv_format.quantized else 0)
    for rank, found in enumerate(ranks):
        logits = found[f"{way}.{name}.logits"]
        assert np.array_equal(logits, ranks[0][f"{way}.{name}.logits"])
        error = np.abs(logits - want).max(axis=1) / np.abs(want).max()
        assert (error[: len(error) - decodes] <= rounding).all()
        assert (error[len(error) - decodes :] <= own_4bit).all()
        heads = kv_heads_of_rank(model.num_key_value_heads, config.tp_size, rank)
        pools = [found[f"{way}.{name}.pool{i}"] for i in range(len(config.regions))]
        allowed = tolerances(name, config, pools, rounding, own_4bit)
        for i, (region, rows) in enumerate(zip(config.regions, pools, strict=True)):
            both, tolerance = (rows, expected[f"{name}.pool{i}"][:, :, :, heads]), allowed[i][..., None]
            if region.format.quantized:
                assert_codes(*both, 4, tolerance, model.dtype)
            else:
                assert_rows(*both, tolerance, model.dtype)
