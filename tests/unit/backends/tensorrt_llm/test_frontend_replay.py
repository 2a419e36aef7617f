"""The recording of TensorRT-LLM's network, and its replay under the rules of TensorRT 8.6, on stand-ins."""

import json

import pytest
import torch

from saw_trtllm.backends.tensorrt.versions import TensorRT
from tests.support import ROOT, network_recording, recorded_run
from tests.support.executor.blocks import PRIMARY, SECONDARY
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_86 as fake_tensorrt_86
from tests.support.fakes import tensorrt_frontend as fake_tensorrt_frontend
from tests.support.fakes.tensorrt_execute import execute
from tests.support.record_frontend import CASES, NUM_LAYERS, NUM_STEPS, record

pytestmark = [
    pytest.mark.skipif(fake_tensorrt_frontend.missing() is not None, reason=str(fake_tensorrt_frontend.missing())),
    pytest.mark.filterwarnings("ignore"),  # TensorRT-LLM's own
]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    record(folder, ["llama-swapped"])
    return folder / "llama-swapped"


@pytest.fixture
def replayed(recording):
    """The network of 8.6, and a builder's config with its profiles."""
    tensorrt = TensorRT(fake_tensorrt_86.Module())
    builder = tensorrt.builder(tensorrt.logger())
    replay = network_recording.Replay(recording, tensorrt, builder)
    config = tensorrt.create_config(builder)
    replay.add_profiles(builder, config)
    assert builder.build_serialized_network(replay.network, config)
    return replay.network


def test_it_is_the_network_that_was_recorded(recording, replayed):
    recorded = json.loads((recording / network_recording.NETWORK).read_text())
    kinds = [call["type"].replace("PLUGIN_V3", "PLUGIN_V2") for call in recorded["layers"]]
    assert [layer.type.name for layer in replayed._layers] == kinds
    assert kinds.count("PLUGIN_V2") == 2 * NUM_LAYERS
    for layer, call in zip(replayed._layers, recorded["layers"], strict=True):
        for i, name in enumerate(call["types"]):
            output = layer.get_output(i)
            assert output.dtype.name == name.replace("INT64", "INT32")
    assert {t.name: tuple(t.shape) for t in replayed._inputs}["host_kv_cache_pool_pointers"] == (-1, 2, 2)
    assert [(t.name, t.dtype.name) for t in replayed._outputs] == [("logits", "FLOAT")]


def test_8_6_is_told_the_type_of_each_layer_that_computes(replayed):
    for layer in fake_tensorrt.live_layers(replayed):
        dtype = layer.get_output(0).dtype
        told = layer.type.name not in ("CAST", "PLUGIN_V2", "CONSTANT") and dtype.name in ("FLOAT", "HALF")
        assert not told or layer.types == {0: dtype}


def test_its_logits_are_the_recorded_ones(recording, replayed):
    steps, _ = recorded_run.load(recording)
    assert len(steps) == NUM_STEPS
    moves = {(c.source[0], c.target[0], c.rows > 0) for step in steps for c in step.copies}
    both = [(PRIMARY, SECONDARY, False), (SECONDARY, PRIMARY, False)]
    assert moves >= {(PRIMARY, PRIMARY, True), (SECONDARY, PRIMARY, True), *both}
    inputs, due = steps[0].inputs, torch.from_numpy(steps[0].logits)
    assert not inputs["host_request_types"].any()
    fed = {name: torch.from_numpy(x).long() for name, x in inputs.items()}
    fed["host_kv_cache_pool_pointers"] = torch.zeros(1, 2, 2, dtype=torch.int64)
    found = execute(replayed, fed)["logits"]
    # Q, K and V are rounded to fp16 in the reference.
    assert (found - due).abs().max() < 0.01 * due.std()


def test_the_cases_are_those_that_are_played_back():
    played = (ROOT / "tests" / "engines" / "test_frontend.py").read_text()
    assert f"CASES = {json.dumps(list(CASES))}" in played
