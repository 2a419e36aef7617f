"""What the project's own definitions call of TensorRT is there: names alone, since a builder needs a GPU.

Without PyTorch, so that it runs wherever a TensorRT is installed.
"""

import numpy as np
import pytest

from saw_trtllm.backends.tensorrt.build import serialize_engine
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.checkpoint import NUMPY_DTYPES, expected_shapes
from saw_trtllm.engine.config import EngineConfig, SawSection
from saw_trtllm.engine.limits import BuildConfig
from saw_trtllm.format import KVFormat
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from saw_trtllm.plugins.library import find_creator
from tests.support.fakes import tensorrt_86 as fake_tensorrt_86
from tests.support.fakes.tensorrt_86 import Module, record_methods


@pytest.fixture
def used(monkeypatch, tmp_path):
    """The names that a build of a model with all that a family may have takes of TensorRT 8.6."""
    model = ModelConfig(
        architecture="Qwen3ForCausalLM",
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_size=64,
        intermediate_size=32,
        vocab_size=16,
        max_position_embeddings=64,
        attn_bias=True,
        qk_layernorm=True,
    )
    config = EngineConfig(
        version="0",
        pretrained_config=model,
        build_config=BuildConfig(max_batch_size=4, max_input_len=32, max_seq_len=64, max_num_tokens=64),
        saw_int4=SawSection.of(KVFormat("saw_int4", 64), "tensorrt", "0").model_copy(update={"k_center": True}),
    )
    dims = expected_shapes(model)

    def load(name):
        if name.endswith("k_center"):
            return np.zeros((1, 64), np.float32)
        return np.zeros(dims[name], NUMPY_DTYPES["float16"])

    module, methods = Module(), set()
    with monkeypatch.context() as patch:
        record_methods(patch, methods)
        options = NetworkOptions(output_timing_cache=tmp_path / "model.cache", optimization_level=3)
        serialize_engine(TensorRT(module), config, load, options)
    return {"module": module.used, "methods": methods}


def test_names_are_recorded(used):
    assert {"Builder", "ILogger", "ElementWiseOperation.DIV", "PluginFieldType.CHAR", "float16"} <= used["module"]
    assert {"INetworkDefinition.add_plugin_v2", "ILayer.precision", "ILayer.set_output_type"} <= used["methods"]
    assert {"IPluginCreator.create_plugin", "IOptimizationProfile.set_shape", "ITensor.dtype"} <= used["methods"]


def test_a_real_tensorrt_8_has_them(used):
    trt = pytest.importorskip("tensorrt", reason="needs the package tensorrt")
    if not trt.__version__.startswith("8.6"):
        pytest.skip("needs TensorRT 8.6")
    names = used["module"] | used["methods"]
    assert len(names) > 40
    missing = {name for name in names if not has(trt, name)}
    assert missing == set()


def test_plugins_fields_and_weights_are_taken_by_a_real_tensorrt_8():
    trt = pytest.importorskip("tensorrt", reason="needs the package tensorrt")
    if not trt.__version__.startswith("8.6"):
        pytest.skip("needs TensorRT 8.6")
    tensorrt = TensorRT(trt)
    assert find_creator(trt, "SawNoSuchPlugin") is None
    assert tensorrt.weights(np.ones((2, 3), np.float16)).size == 6
    assert tensorrt.weights(np.ones(1, np.int32)).dtype == tensorrt.dtype("int32")
    logger = tensorrt.logger()
    logger.log(trt.ILogger.Severity.ERROR, "an error")
    assert logger.reason == "an error"


def has(module, name):
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def test_the_stand_in_has_nothing_that_came_later():
    with pytest.raises(AttributeError, match=r"TensorRT 8\.6 has no int64"):
        _ = fake_tensorrt_86.Module().int64
