"""One order of the plugins' inputs and one set of their fields: a layer is made with what the plugins' tables say."""

import re

import numpy as np
import pytest

from saw_trtllm.engine import tensors
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from saw_trtllm.format import KVFormat
from saw_trtllm.plugins.layer import OPTIONAL_CONSTANTS, ROTARY_COS_SIN, AttentionLayer, add_attention
from tests.support.plugin_library import ATTENTION, SOURCES, STEMS, WRITE

OUTPUTS = {WRITE: ["q", "k", "v", "decode_counters"], ATTENTION: ["context"]}


def table(name, section):
    text = (SOURCES / f"{STEMS[name]}.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)`", text, re.M)


def define(constants):
    added = {}

    def add_plugin(name, fields, inputs, dtypes):
        assert len(dtypes) == len(OUTPUTS[name])
        added[name] = (fields, inputs)
        return OUTPUTS[name]

    layer = AttentionLayer(3, 8, 2, 64, 32, "float16", KVFormat("saw_int4", 64), softcap=50, window=12)
    assert add_attention(layer, "qkv", {name: name for name in constants}, str, add_plugin) == "context"
    return added


@pytest.mark.parametrize("optional", [(), OPTIONAL_CONSTANTS])
def test_fields_and_inputs_are_the_plugins_own(optional):
    added = define((ROTARY_COS_SIN, *optional))
    for name, (fields, inputs) in added.items():
        assert set(fields) == set(table(name, "Fields"))
        unconnected = {"sinks", *OPTIONAL_CONSTANTS} - set(optional)
        assert list(inputs) == [x for x in table(name, "Inputs") if x not in unconnected]
    assert {k: v for k, v in added[WRITE][0].items() if k.startswith("use_")} == {
        f"use_{name}": int(name in optional) for name in OPTIONAL_CONSTANTS
    }
    assert (added[ATTENTION][0]["softcap"], added[ATTENTION][0]["window"]) == (50.0, 12)


def test_a_packed_step_has_the_shapes_of_the_table():
    sequences = [StepSequence([5, 6, 7], 0, 3, PREFILL, [0]), StepSequence([8], 20, 9, DECODE, [1, 2])]
    step = StepInputs.pack(sequences, 4, 2)
    sizes = {tensors.NUM_TOKENS: 4, tensors.NUM_SEQUENCES: 2, tensors.MAX_BLOCKS: 2, tensors.NUM_POOLS: 2}
    packed = [x for x in tensors.INPUTS if hasattr(step, x.name)]
    assert len(packed) == 6  # the rest is the same in every step
    for tensor in packed:
        array = getattr(step, tensor.name)
        assert array.dtype == np.dtype(tensor.dtype)
        assert array.shape == tuple(sizes.get(d, d) for d in tensor.shape)
