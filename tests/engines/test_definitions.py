"""Each family's network defined on a real TensorRT: on one that lacks its builder's kernels too."""

from __future__ import annotations

import numpy as np
import pytest

from saw_trtllm.backends.tensorrt.constants import weight_inputs
from saw_trtllm.backends.tensorrt.decoder import define_decoder
from saw_trtllm.backends.tensorrt.graph import Graph
from saw_trtllm.backends.tensorrt.profiles import step_inputs
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.build import plan_build
from saw_trtllm.engine.tensors import LOGITS
from saw_trtllm.plan.options import BuildOptions
from tests.engines.models import FAMILIES, VOCAB, make_model


@pytest.mark.parametrize("use_plugins", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_types(family, use_plugins, tmp_path):
    tensorrt = TensorRT.load()
    tensorrt.load_plugins()
    dtype = "bfloat16" if tensorrt.strongly_typed else "float16"
    model = make_model(tmp_path / "model", family, 64)
    options = {"model_dir": model, "output_dir": tmp_path / "engine", "backend": "tensorrt", "dtype": dtype}
    plan = plan_build(BuildOptions(**options, max_batch_size=16, max_num_tokens=512, max_seq_len=512))
    config = plan.config
    if use_plugins:
        plugins = config.build_config.plugin_config.model_copy(update={"gemm_plugin": dtype})
        limits = config.build_config.model_copy(update={"plugin_config": plugins})
        config = config.model_copy(update={"build_config": limits})
    builder = tensorrt.builder(tensorrt.logger())
    graph = Graph(tensorrt, tensorrt.create_network(builder), use_plugins, refittable=tensorrt.can_strip)
    define_decoder(graph, config, plan.weights.load)
    network = graph.network
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    assert inputs.keys() == {x.name for x in step_inputs(config, tensorrt)} | weight_inputs(config).keys()
    assert network.num_outputs == 1
    logits = network.get_output(0)
    assert (logits.name, tuple(logits.shape), logits.dtype) == (LOGITS.name, (-1, VOCAB), tensorrt.dtype("float32"))
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_outputs):
            shape = tuple(layer.get_output(j).shape)
            assert np.prod(shape) != 0, (layer.name, shape)
            assert len(shape) > 0 or layer.type == tensorrt.trt.LayerType.CONSTANT, layer.name
