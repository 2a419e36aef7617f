"""The project's own definitions: recorded by a stand-in for TensorRT, and run in PyTorch against the reference."""

import errno
import os
import re
import sys
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.int4 import TORCH_DTYPES
from saw_trtllm.backends.reference.model import ReferenceModel, calibrated_inputs, rms_norm
from saw_trtllm.backends.reference.paged_attention import paged_attention
from saw_trtllm.backends.reference.rotate_quantize_kv import rotate_quantize_kv
from saw_trtllm.backends.tensorrt import build
from saw_trtllm.backends.tensorrt.backend import TensorRTBackend
from saw_trtllm.backends.tensorrt.build import build_engine, built_for, serialize_engine
from saw_trtllm.backends.tensorrt.constants import PackedWeights, weight_inputs
from saw_trtllm.backends.tensorrt.decoder import define_decoder
from saw_trtllm.backends.tensorrt.graph import Graph
from saw_trtllm.backends.tensorrt.profiles import profiles, shapes, step_inputs
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.build import plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepPacker, StepSequence
from saw_trtllm.errors import BackendUnavailableError, CheckpointError, ConfigError, EngineError
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import split_over_ranks
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from saw_trtllm.runtime.collectives import ALONE
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_86 as fake_tensorrt_86
from tests.support.fakes import tensorrt_execute as fake_tensorrt_execute
from tests.support.fakes.gpu import pretend_gpu
from tests.support.models import make_hf_model
from tests.support.quantized import CASES as QUANTIZED
from tests.support.quantized import write_quantized
from tests.support.ranks import local_group, on_ranks
from tests.support.tolerance import model_rounding

IDS = np.random.default_rng(3).integers(3, 203, (3, 90)).tolist()
#: What a step takes: sequence, first token, count, kind. A prefill, a chunk after history, decodes, and all of them.
STEPS = [
    [(0, 0, 37, PREFILL)],
    [(0, 37, 20, PREFILL), (1, 0, 5, PREFILL)],
    [(0, 57, 1, DECODE), (1, 5, 1, DECODE)],
    [(2, 0, 40, PREFILL), (1, 6, 30, PREFILL), (0, 58, 1, DECODE)],
    [(0, 59, 1, DECODE), (1, 36, 1, DECODE), (2, 40, 1, DECODE)],
]
BLOCKS = [[6, 1, 5, 0, 3], [9, 2, 14, 13, 4], [7, 8, 10, 11, 12]]
TOKENS_PER_BLOCK = 16


@pytest.fixture
def tensorrt(monkeypatch):
    monkeypatch.setattr(fake_tensorrt.get_plugin_registry(), "saw", True)
    return TensorRT(fake_tensorrt)


@pytest.fixture
def tensorrt_86():
    return TensorRT(fake_tensorrt_86.Module())


@pytest.fixture
def plan(tmp_path):
    """Plans a build of a random model."""

    def make(family="llama", calibrated=False, fields=None, **options):
        folder = make_hf_model(tmp_path, family, **{"num_hidden_layers": 2, **(fields or {})})[0]
        if calibrated:
            windows = torch.randint(3, 203, (4, 64), generator=torch.Generator().manual_seed(1))
            calibrate(Checkpoint.open(folder), windows).save(tmp_path / "calibration")
            options["calibration"] = tmp_path / "calibration"
        defaults = {"dtype": "float16", "max_batch_size": 16, "max_num_tokens": 512}
        defaults["tokens_per_block"] = TOKENS_PER_BLOCK
        return plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", **{**defaults, **options}))

    return make


def define(tensorrt, plan, use_plugins=False, rank=None):
    """The graph of a plan, or of a rank of it, which keeps its weights: those that are its inputs in ``weights``."""
    network = tensorrt.create_network(tensorrt.builder(tensorrt.logger()))
    graph = Graph(tensorrt, network, use_plugins)
    config = plan.config
    if use_plugins:
        plugins = config.build_config.plugin_config.model_copy(update={"gemm_plugin": "float16"})
        limits = config.build_config.model_copy(update={"plugin_config": plugins})
        config = config.model_copy(update={"build_config": limits})
    weights = plan.weights if rank is None else plan.weights.of_rank(rank)
    define_decoder(graph, config, PackedWeights(weights.load), rank or 0)
    packed = PackedWeights(weights.load)
    arrays = {name: packed(name) for name in weight_inputs(config)}
    graph.weights = {
        name: torch.from_numpy(x).long() if x.dtype == np.int32 else torch.from_numpy(x.astype(np.float32))
        for name, x in arrays.items()
    }
    return graph


def plugin_layers(graph, name):
    return fake_tensorrt.plugin_layers(graph.network, name)


class Execution:
    """Runs a recorded network step by step, with the reference's operations in the plugins' places.

    In fp32 throughout, where the two differ in the order of their sums only; or in the network's own types.
    """

    def __init__(self, graph, plan, cache, monkeypatch, own_types=False, collectives=ALONE):
        self.network, self.weights, self.config, self.cache = graph.network, graph.weights, plan.config, cache
        self.collectives = collectives
        self.dtype = TORCH_DTYPES[self.config.pretrained_config.dtype] if own_types else torch.float32
        if own_types:
            monkeypatch.setattr(fake_tensorrt_execute._Layers, "constant", staticmethod(self._constant))
            monkeypatch.setattr(fake_tensorrt_execute._Layers, "cast", staticmethod(self._cast))

    def run(self, step):
        self.plans = self.cache.plans(step)
        layers, pools = self.config.pretrained_config.num_hidden_layers, self.config.pools
        places = [next([p, x.layers.index(i)] for p, x in enumerate(pools) if i in x.layers) for i in range(layers)]
        fed = {name: getattr(step, name) for name in StepInputs.__dataclass_fields__}
        fed["host_kv_cache_pool_mapping"] = np.array(places, np.int32)
        fed["host_kv_cache_pool_pointers"] = np.array([[1 << 40, 0]] * len(pools))
        fed["host_max_attention_window_sizes"] = np.full(layers, self.config.build_config.max_seq_len, np.int32)
        values = {t.name: torch.from_numpy(fed[t.name]).long() for t in self.network._inputs if t.name in fed}
        values |= self.weights
        assert values.keys() == {t.name for t in self.network._inputs}
        plugins = {"SawRotateQuantizeKV": self._write, "SawInt4PagedAttention": self._attention}
        plugins |= {"SawAllReduce": self._all_reduce, "SawAllGather": self._all_gather}
        outputs = fake_tensorrt_execute.execute(self.network, values, plugins)
        assert list(outputs) == ["logits"]
        return outputs["logits"]

    def _write(self, fields, x):
        qkv, mapping = x[0], x[6]
        assert qkv.dtype == self.dtype
        D, H, Hkv = fields["head_dim"], fields["num_heads"], fields["num_kv_heads"]
        q, k, v = qkv.unflatten(-1, (-1, D)).split([H, Hkv, Hkv], dim=1)
        pool, index, plan = self._pool(fields, mapping)
        assert fields["hadamard_order"] == pool.format.hadamard_order
        assert fields["range_factor"] == pytest.approx(pool.format.range_factor)
        center = x[8] if fields["use_k_center"] else None
        k_frame, q_frame = fake_tensorrt_execute.frames(x) if fields["use_k_frame"] else (None, None)
        levers = {"k_center": center, "k_frame": k_frame, "q_frame": q_frame}
        rotate_v = bool(fields["rotate_v"])
        rows = rotate_quantize_kv(q, k, v, x[7], pool, index, plan, rotate_v=rotate_v, **levers)
        return [*(a.flatten(1) for a in rows), torch.zeros(len(x[2]), Hkv, dtype=torch.int64)]

    def _attention(self, fields, x):
        q, k, v = (a.unflatten(-1, (-1, fields["head_dim"])) for a in x[:3])
        pool, index, plan = self._pool(fields, x[9])
        window = min(fields["window"] or 1 << 30, int(x[10][fields["layer_idx"]]))
        limits = {"window": window, "softcap": fields["softcap"] or None}
        rows = paged_attention(q, k, v, pool, index, plan, softmax_scale=fields["softmax_scale"], **limits)
        return [rows.flatten(1)]

    def _all_reduce(self, fields, x):
        assert fields["num_ranks"] == self.collectives.size
        total = torch.from_numpy(self.collectives.all_reduce(x[0].numpy()))
        if not fields.get("use_norm"):
            return [total]
        added = total + x[2]
        return [rms_norm(added, x[1][0], fields["epsilon"]), added]

    def _all_gather(self, fields, x):
        assert fields["num_ranks"] == self.collectives.size
        parts = self.collectives.all_gather(x[0].numpy())
        return [torch.from_numpy(np.concatenate(parts, axis=1)[:, : fields["out_features"]])]

    def _pool(self, fields, mapping):
        which, index = mapping[fields["layer_idx"]].tolist()
        pool, table = self.cache.pools[self.config.pools[which].region], self.config.pools[which].table
        assert (fields["kv"], fields["head_dim"]) == (pool.format.kv, pool.format.head_dim)
        assert fields["tokens_per_block"] == pool.tokens_per_block
        return pool, index, self.plans[table]

    @staticmethod
    def _constant(layer):
        array = layer.weights.numpy()
        value = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array.copy())
        value = value.view(torch.bfloat16) if array.dtype == np.uint16 else value
        return value.reshape(layer.shape) if value.is_floating_point() else value.reshape(layer.shape).long()

    @staticmethod
    def _cast(layer, x):
        types = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
        return x.to(types[layer.to_type.name])


def make_cache(plan, dtype):
    """Pools as the plan's, with rows of ``dtype`` where they are not quantized."""
    config = plan.config
    pools = [pool._replace(format=replace(pool.format, dtype=dtype)) for pool in config.pools]
    cache = PagedCache(
        pools, 16 * config.pool_layout.num_tables, config.pretrained_config.num_key_value_heads, TOKENS_PER_BLOCK
    )
    for pool in cache.pools:
        pool.data.zero_()  # so that two caches can be compared
    return cache


def reference(plan, dtype):
    """The reference model of a plan, computing in ``dtype`` from the plan's weights."""
    config, model = plan.config, plan.config.pretrained_config.model_copy(update={"dtype": dtype})
    levers = calibrated_inputs(config, plan.weights.load)
    return ReferenceModel(model, plan.weights.load, config.build_config.max_seq_len, **levers)


def pack(plan, parts):
    layout = plan.config.pool_layout
    sequences = [StepSequence(IDS[i][a : a + n], a, 60, kind, layout.entries(BLOCKS[i])) for i, a, n, kind in parts]
    return StepPacker(layout).pack(sequences)


def differences(graph, plan, monkeypatch, own_types=False):
    """Of each step, how far its logits are from the reference's."""
    dtype = plan.config.pretrained_config.dtype if own_types else "float32"
    model, cache = reference(plan, dtype), make_cache(plan, dtype)
    execution = Execution(graph, plan, make_cache(plan, dtype), monkeypatch, own_types)
    every = plan.config.build_config.gather_context_logits
    for parts in STEPS:
        step = pack(plan, parts)
        expected = model.forward(step, cache, all_logits=every)
        found = execution.run(step)
        assert found.shape == expected.shape
        assert expected.abs().max() > 1
        yield (found - expected).abs().max().item()
        follow(execution.cache, cache)


def follow(cache, reference):
    """What a step wrote is the reference's but for a row here and there that another order of sums rounds to another
    code. The next step begins with the reference's rows, or such a code would be seen in all that follow."""
    for mine, theirs in zip(cache.pools, reference.pools, strict=True):
        if theirs.format.quantized:
            different = (mine.data != theirs.data).sum().item()
            assert different <= 0.01 * theirs.data.count_nonzero().item()
            mine.data.copy_(theirs.data)


CASES = {
    "llama": ("llama", {}, {}),
    "llama, fp16": ("llama", {}, {"kv": "fp16"}),
    "llama, int4": ("llama", {}, {"kv": "int4"}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama, small blocks": ("llama", {}, {"hadamard_order": 16}),
    "llama, V not rotated": ("llama", {}, {"rotate_v": "disable"}),
    "llama, all logits": ("llama", {}, {"gather_context_logits": True}),
    "llama, a layer skipped": ("llama", {"num_hidden_layers": 3}, {"kv_skip_layers": "1"}),
    "llama, keys of 8 bits": ("llama", {}, {"kv": "saw_k8v4", "calibrated": True}),
    "llama, a layer's keys of 8 bits": ("llama", {}, {"kv_bits": "8/4:last"}),
    "llama 3, head_dim 128": ("llama3", {}, {}),
    "llama, head_dim 256": ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}, {}),
    "mistral, window": ("mistral", {}, {}),
    "mistral, head_dim 128": ("mistral", {"head_dim": 128, "sliding_window": None}, {"kv": "int4"}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, head_dim 128, fp16": ("qwen2", {"head_dim": 128, "num_attention_heads": 2}, {"kv": "fp16"}),
    "qwen3, tied": ("qwen3", {}, {}),
    "qwen3, head_dim 128": ("qwen3", {"head_dim": 128, "tie_word_embeddings": False}, {}),
    # The root of 64 is the same in fp32, in which the reference computes, and in the engine's dtype.
    "gemma2": ("gemma2", {"hidden_size": 64}, {}),
    "gemma2, head_dim 256": ("gemma2", {"hidden_size": 64, "head_dim": 256, "num_attention_heads": 2}, {"kv": "fp16"}),
    "gemma3": ("gemma3", {"hidden_size": 64, "num_hidden_layers": 3}, {}),
    "gemma3, calibrated": ("gemma3", {"hidden_size": 64}, {"calibrated": True}),
    "llama, calibrated": ("llama", {}, {"calibrated": True}),
    "qwen3, calibrated": ("qwen3", {}, {"calibrated": True}),
    "llama, weights in INT4": ("llama", {}, {"qformat": "int4_wo"}),
    "qwen2, weights in FP8": ("qwen2", {}, {"qformat": "fp8"}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_references(name, plan, tensorrt, monkeypatch):
    family, fields, options = CASES[name]
    made = plan(family, fields=fields, **options)
    check_differences(define(tensorrt, made), made, monkeypatch)


def check_differences(graph, plan, monkeypatch):
    """A prefill reads no row; later, sums in another order may round a row to another code, if seldom."""
    first, *later = differences(graph, plan, monkeypatch)
    rounding = model_rounding(np.ones(1))  # logits are larger than 1
    assert first < rounding
    assert max(later) < (0.01 if plan.config.kv_format.quantized else rounding)
    assert min(later) < 4 * rounding


@pytest.mark.parametrize(
    ("fields", "tp_size", "message"),
    [
        ({"kind": "int8", "block": (1, 128)}, 1, "a weight is of int8: the kernels take int4 and fp8; give --qformat"),
        ({"kind": "int4", "block": (1, 16)}, 1, "has a scale for 16 inputs: it must be for 32, 64, 128, a multiple"),
        (
            {"kind": "int4", "block": (1, 64), "act_order": True},
            1,
            "in an order of their own (desc_act); give --qformat",
        ),
        ({"kind": "fp8", "block": (1, 128)}, 8, "a quantized weight has the shape [20, "),
    ],
)
def test_quantized_weights_that_no_layer_takes(fields, tp_size, message, plan, tmp_path, monkeypatch):
    model = split_over_ranks(plan().config.pretrained_config, tp_size)
    pretend_gpu(monkeypatch)
    options = BuildOptions(model_dir=tmp_path, output_dir=tmp_path / "engine")
    formats = {"transformer.layers.0.mlp.fc.weight": WeightFormat(**fields)}
    with pytest.raises(ConfigError, match=re.escape(message)):
        TensorRTBackend().check(options, model, formats)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.03), ("bfloat16", 0.3)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_logits_in_16_bits_are_near(family, dtype, tolerance, plan, tensorrt, monkeypatch):
    made = plan(family, dtype=dtype, kv="fp16")
    assert 0 < max(differences(define(tensorrt, made), made, monkeypatch, own_types=True)) < tolerance


@pytest.mark.parametrize("use_plugins", [False, True])
@pytest.mark.parametrize(
    ("family", "tp_size", "options"),
    [
        ("llama", 2, {}),
        ("qwen2", 4, {}),
        ("qwen3", 2, {"calibrated": True}),
        ("gemma2", 4, {}),
        ("llama", 2, {"qformat": "int4_wo"}),
        ("qwen2", 2, {"qformat": "fp8"}),
        ("qwen3", 4, {"qformat": "fp8"}),
    ],
)
def test_logits_of_ranks_are_the_references_of_one(family, tp_size, options, use_plugins, plan, tensorrt, monkeypatch):
    """Each rank's network on its part of the weights, with the reference's sums in the plugins' places.

    An odd vocabulary, and with 4 ranks KV heads that two of them share; centers and frames by heads, quantized weights.
    """
    fields = {"hidden_size": 64, "intermediate_size": 256}
    made = plan(family, fields=fields, kv="saw_int4", tp_size=tp_size, **options)
    graphs = check_ranks(made, use_plugins, tensorrt, monkeypatch)
    sums = [layer.plugin.fields["use_norm"] for layer in plugin_layers(graphs[0], "SawAllReduce")]
    between = not made.config.pretrained_config.inter_layernorms and use_plugins
    layers = made.config.pretrained_config.num_hidden_layers
    assert sums == [0, *[int(between)] * (2 * layers - 1), 0], "a norm follows all but the first and the last"
    # A scale for each token and each output: many rows are multiplied in 8 bits.
    for layer in plugin_layers(graphs[0], "SawQuantizedGemm"):
        whole = layer.plugin.fields["out_features"] % 16 == 0
        assert layer.plugin.fields["quantize_input"] == (options["qformat"] == "fp8" and whole)
    assert len(plugin_layers(graphs[0], "SawAllReduce")) == 1 + 2 * 2
    assert len(plugin_layers(graphs[0], "SawAllGather")) == 1


@pytest.mark.parametrize("case", ["modelopt AWQ", "fp8 blocks"])
def test_logits_of_ranks_of_a_quantized_checkpoint(case, tensorrt, monkeypatch, tmp_path):
    """A rank's inputs have their own factors, a block of 128 rows a scale on each rank that has some of them."""
    fields = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    source, model = make_hf_model(tmp_path / "source", "llama", **fields)
    folder = write_quantized(tmp_path / "quantized", model, source, QUANTIZED[case])
    options = BuildOptions(
        model_dir=folder, output_dir=tmp_path / "engine", dtype="float16", tokens_per_block=TOKENS_PER_BLOCK, tp_size=2
    )
    made = plan_build(options)
    assert all(format.pre_scale == (case == "modelopt AWQ") for format in made.weights.formats.values())
    graphs = check_ranks(made, True, tensorrt, monkeypatch)
    layers = plugin_layers(graphs[0], "SawQuantizedGemm")
    assert not any(layer.plugin.fields["quantize_input"] for layer in layers), "blocks have no scale for each output"


def check_ranks(made, use_plugins, tensorrt, monkeypatch):
    """Run a prefill on all ranks of a plan, which must give the logits of the reference of one; their graphs."""
    tp_size = made.config.tp_size
    ranks = replace(made, config=made.config.of_rank())
    graphs = [define(tensorrt, made, use_plugins, rank) for rank in range(tp_size)]
    executions = [
        Execution(graphs[ours.rank], ranks, make_cache(ranks, "float32"), monkeypatch, collectives=ours)
        for ours in local_group(tp_size)
    ]
    model, cache = reference(made, "float32"), make_cache(made, "float32")
    group = [execution.collectives for execution in executions]
    step = pack(made, STEPS[0])
    expected = model.forward(step, cache)
    logits = on_ranks(group, lambda ours: executions[ours.rank].run(step))
    assert all(torch.equal(found, logits[0]) for found in logits)
    assert (logits[0] - expected).abs().max() <= model_rounding(expected)
    return graphs


# -- the versions of TensorRT


@pytest.mark.parametrize("use_plugins", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_network_of_8_6_is_the_same(family, use_plugins, plan, tensorrt_86, monkeypatch):
    gemma = family == "gemma3"
    made = plan(family, fields={"hidden_size": 64} if gemma else None)
    graph = define(tensorrt_86, made, use_plugins)
    check_differences(graph, made, monkeypatch)
    assert len(plugin_layers(graph, "SawInt4PagedAttention")) == 2
    kinds = {layer.type.name for layer in fake_tensorrt.live_layers(graph.network)}
    own = {"MATRIX_MULTIPLY", "ACTIVATION", "REDUCE"}
    geglu = {"ACTIVATION"} if gemma else set()  # TensorRT's own layers, which it fuses
    assert kinds & own == (geglu if use_plugins else own)
    # The gate's two weights are one product, but those of an activation that the kernels do not have.
    assert len(plugin_layers(graph, "SawGemm")) == (2 * (5 if gemma else 4) + 1) * use_plugins
    assert len(plugin_layers(graph, "SawRmsNorm")) == (2 * (2 + (family == "qwen3") + 3 * gemma) + 1) * use_plugins
    assert not plugin_layers(graph, "SawSiluMul")
    assert len(plugin_layers(graph, "SawLookup")) == use_plugins


def test_8_6_is_told_the_type_of_each_layer(plan, tensorrt_86):
    graph = define(tensorrt_86, plan("qwen3"))
    free = ("CAST", "PLUGIN_V2")
    for layer in fake_tensorrt.live_layers(graph.network):
        dtype = layer.get_output(0).dtype
        fixed = dtype == fake_tensorrt.float32 or layer.type.name != "CONSTANT"
        if layer.type.name in free or dtype == fake_tensorrt.int32 or not fixed:
            assert layer.types == {}
        else:
            assert (layer.precision, layer.types) == (dtype, {0: dtype}), layer.name
    wide = {x.name for x in graph.network._layers if x.types == {0: fake_tensorrt.float32}}
    assert "transformer.layers.1.mlp.sqrt" in wide
    assert "rotary_cos_sin" in wide
    config = tensorrt_86.create_config(tensorrt_86.builder(None))
    assert {flag.name for flag in config.flags} == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert config.tactic_sources == 0b11000


def test_typed_networks_are_strongly_typed(plan, tensorrt):
    made = plan()
    graph = define(tensorrt, made)
    assert graph.network.get_flag(fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert not any(hasattr(layer, "precision") for layer in graph.network._layers)
    assert not tensorrt.create_config(tensorrt.builder(None)).flags


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_are_of_the_checkpoints_logits_dtype(dtype, plan, tensorrt, tensorrt_86):
    made = plan()
    made.config.pretrained_config.logits_dtype = dtype
    for version in (tensorrt, tensorrt_86):
        assert define(version, made).network.get_output(0).dtype == getattr(fake_tensorrt, dtype)
    # In fp32 they are the sums themselves, rounded to nothing before.
    graph = define(tensorrt, made, use_plugins=True)
    assert graph.network.get_output(0).dtype == getattr(fake_tensorrt, dtype)
    assert graph.network.get_output(0).producer.plugin.fields["output_dtype"] == dtype


def test_11_has_no_other_networks(tensorrt, monkeypatch):
    monkeypatch.setattr(fake_tensorrt, "__version__", "11.1.0")
    newest = TensorRT(fake_tensorrt)
    assert newest.create_network(newest.builder(None)).flags == 0


def test_what_does_not_fit_is_rejected(plan, tensorrt, tensorrt_86, monkeypatch):
    with pytest.raises(ConfigError, match=r"^the model is in bfloat16, which TensorRT 8\.6\.0 does not have: "):
        define(tensorrt_86, plan(dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"^the model is in float32, and the plugins compute in 16 bits: "):
        define(tensorrt, plan(dtype="float32"))
    monkeypatch.setattr(fake_tensorrt.get_plugin_registry(), "saw", False)
    with pytest.raises(
        BackendUnavailableError, match=r"^the plugin SawRotateQuantizeKV is not registered with TensorRT"
    ):
        define(tensorrt, plan())
    for version in ("8.5.3", "9.3.0"):
        monkeypatch.setattr(fake_tensorrt, "__version__", version)
        with pytest.raises(BackendUnavailableError, match=f"^TensorRT {version} is not supported: install 8.6"):
            TensorRT(fake_tensorrt)


def test_a_plugin_that_rejects_its_fields_is_an_error(tensorrt):
    network = tensorrt.create_network(tensorrt.builder(None))
    with pytest.raises(ConfigError, match=r"^SawInt4PagedAttention rejects {'head_dim': 80}: see TensorRT's log"):
        tensorrt.add_plugin(network, "SawInt4PagedAttention", {"head_dim": 80}, [])


# -- what the engine is fed


def test_inputs_are_those_of_the_executor(plan, tensorrt, tensorrt_86):
    made = plan(fields={"num_hidden_layers": 3}, kv_skip_layers="1")
    inputs = {t.name: (t.dtype, t.shape) for t in define(tensorrt, made).network._inputs}
    tokens, sequences, i32 = (fake_tensorrt.int32, (-1,)), (fake_tensorrt.int32, (-1,)), fake_tensorrt.int32
    assert inputs == {
        "input_ids": tokens,
        "position_ids": tokens,
        "last_token_ids": sequences,
        "sequence_length": sequences,
        "host_request_types": sequences,
        "kv_cache_block_offsets": (i32, (2, -1, 2, -1)),
        "host_kv_cache_pool_pointers": (fake_tensorrt.int64, (2, 2)),
        "host_kv_cache_pool_mapping": (i32, (3, 2)),
        "host_max_attention_window_sizes": (i32, (3,)),
    }
    older = {t.name: (t.dtype, t.shape) for t in define(tensorrt_86, made).network._inputs}
    assert older == inputs | {"host_kv_cache_pool_pointers": (i32, (2, 2, 2))}


def test_profiles_hold_all_steps_and_decodes(plan, tensorrt):
    made = plan(max_seq_len=250, max_batch_size=200, max_num_tokens=4096)
    limits = made.config.build_config
    whole, decode = profiles(limits, decode_profile=True)
    assert [whole] == profiles(limits, decode_profile=False)
    assert whole == {"num_sequences": (1, 128, 200), "num_tokens": (1, 2048, 4096), "max_blocks_per_seq": (1, 16, 16)}
    assert decode == whole | {"num_tokens": (1, 128, 200)}
    by_name = {x.name: x for x in step_inputs(made.config, tensorrt)}
    assert shapes(by_name["kv_cache_block_offsets"], decode) == ((1, 1, 2, 1), (1, 128, 2, 16), (1, 200, 2, 16))
    assert shapes(by_name["host_kv_cache_pool_mapping"], decode) == ((2, 2),) * 3


def test_plugins_have_each_layers_format_and_window(plan, tensorrt):
    windowed = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    graph = define(tensorrt, plan("qwen2", fields=windowed, kv_skip_layers="0", hadamard_order=32))
    writes, attentions = (plugin_layers(graph, n) for n in ("SawRotateQuantizeKV", "SawInt4PagedAttention"))
    keys = ("layer_idx", "kv", "hadamard_order", "rotate_v", "use_k_center", "dtype")
    assert [[layer.plugin.fields[key] for key in keys] for layer in writes] == [
        [0, "fp16", 1, 0, 0, "float16"],
        [1, "saw_int4", 32, 0, 0, "float16"],
    ]
    assert [layer.plugin.fields["window"] for layer in attentions] == [0, 9]
    assert [layer.name for layer in attentions] == [
        f"transformer.layers.{i}.attention.SawInt4PagedAttention" for i in range(2)
    ]


def test_layers_have_names_of_their_own(plan, tensorrt):
    names = [layer.name for layer in define(tensorrt, plan("qwen3")).network._layers]
    assert len(set(names)) == len(names)
    assert {"transformer.vocab_embedding.weight", "transformer.layers.1.attention.qkv.weight"} <= set(names)


def test_a_tied_head_is_the_embedding(plan, tensorrt):
    tied = define(tensorrt, plan("qwen3")).network._layers
    untied = define(tensorrt, plan("qwen3", fields={"tie_word_embeddings": False})).network._layers
    assert len(untied) == len(tied) + 1


# -- the build


@pytest.fixture
def machine(monkeypatch):
    """One with a GPU, TensorRT, the plugins and cuBLASLt."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.load_cublas_lt", lambda: True)


#: Of an engine whose large weights are its inputs.
RANK_FILES = [f"rank{rank}.{end}" for rank in range(2) for end in ("engine", "weights.safetensors")]


def files(plan):
    return sorted(path.name for path in plan.output_dir.iterdir())


def test_the_folder_holds_an_engine(plan, tensorrt, tensorrt_86, machine, tmp_path):
    cache = tmp_path / "model.cache"
    made, read = plan("qwen3", calibrated=True, backend="tensorrt", output_timing_cache=cache, workers=3), []
    made.output_dir.mkdir()
    size = build_engine(made, read.append, None, tensorrt)
    assert files(made) == ["config.json", "generation_config.json", *RANK_FILES[:2]]
    assert size == sum((made.output_dir / name).stat().st_size for name in RANK_FILES[:2])
    assert sorted(read) == sorted(made.weights.shapes)
    assert len(read) == made.num_steps
    assert cache.read_bytes() == b""
    section = EngineConfig.load(made.output_dir).saw_int4
    assert (section.backend, section.plugin_version) == ("tensorrt", "1")
    assert (section.tensorrt_version, section.compute_capability) == ("10.14.1", "9.0")
    build_engine(made, None, None, tensorrt_86)
    assert EngineConfig.load(made.output_dir).saw_int4.tensorrt_version == "8.6.0"


def test_each_rank_has_an_engine_of_its_part(plan, tensorrt, machine):
    """Beside one config, which has the checksums of both; without weights too, which are the checkpoint's then."""
    made, read = plan("qwen3", calibrated=True, backend="tensorrt", tp_size=2), []
    made.output_dir.mkdir()
    size = build_engine(made, read.append, None, tensorrt)
    assert files(made) == ["config.json", "generation_config.json", *RANK_FILES]
    assert size == sum((made.output_dir / name).stat().st_size for name in RANK_FILES)
    assert len(read) == made.num_steps == 2 * len(made.weights.shapes)
    section = EngineConfig.load(made.output_dir).saw_int4
    assert section.checksums.keys() >= set(RANK_FILES)
    firsts = [load_file(made.output_dir / name)["transformer.vocab_embedding.weight"] for name in RANK_FILES[1::2]]
    assert all(len(x) == 102 for x in firsts)
    whole = made.weights.load("transformer.vocab_embedding.weight")
    assert np.array_equal(np.concatenate(firsts)[:203], whole)
    assert not firsts[1][-1].any()


def test_the_engine_has_the_checkpoints_dtype_without_a_flag(monkeypatch, tmp_path):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.load_cublas_lt", lambda: True)
    folder = make_hf_model(tmp_path, "llama", torch.bfloat16, num_hidden_layers=2)[0]
    options = BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", backend="tensorrt", max_seq_len=64)
    made = plan_build(options)
    made.output_dir.mkdir()
    build_engine(made)
    config = EngineConfig.load(made.output_dir)
    assert config.pretrained_config.dtype == config.build_config.plugin_config.gemm_plugin == "bfloat16"
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt_86.Module())
    with pytest.raises(ConfigError, match=r"^the model is in bfloat16, which TensorRT 8\.6\.0 does not have: give "):
        plan_build(options)


@pytest.mark.parametrize(("choice", "there"), [("auto", 1), ("auto", 0), ("disable", 1), ("float16", 1)])
def test_the_gemm_plugin_is_taken_where_cublaslt_loads(choice, there, plan, tensorrt, tensorrt_86, monkeypatch, caplog):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.load_cublas_lt", lambda: there)
    made = plan(backend="tensorrt", gemm_plugin=choice)
    made.output_dir.mkdir()
    due = None if choice == "disable" or not there else "float16"
    for version in (tensorrt_86, tensorrt):
        build_engine(made, None, None, version)
        switches = EngineConfig.load(made.output_dir).build_config.plugin_config
        assert switches.gemm_plugin == due
        assert switches.tokens_per_block == TOKENS_PER_BLOCK
        network = fake_tensorrt.Builder.networks[-1]
        assert network.builder_config.num_optimization_profiles == (1 if switches.gemm_plugin else 2)
        layers = fake_tensorrt.live_layers(network)
        assert any(layer.type.name == "MATRIX_MULTIPLY" for layer in layers) != bool(switches.gemm_plugin)
    assert ("without cuBLASLt TensorRT's own GEMMs are taken" in caplog.text) != bool(there)


def test_a_gemm_plugin_that_cannot_be(plan, tensorrt, monkeypatch):
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.load_cublas_lt", lambda: False)
    pretend_gpu(monkeypatch)
    made = plan(backend="tensorrt", gemm_plugin="float16")
    with pytest.raises(BackendUnavailableError, match=r"^--gemm_plugin float16 needs cuBLASLt, .*: pip install "):
        build_engine(made, None, None, tensorrt)
    with pytest.raises(ConfigError, match=r"^--gemm_plugin bfloat16 was given and the model is in float16: give auto$"):
        plan(backend="tensorrt", gemm_plugin="bfloat16")
    with pytest.raises(ConfigError, match=r"^gemm_plugin was given, and it is for the backend tensorrt, not reference"):
        plan(backend="reference", gemm_plugin="disable")


def test_timing_caches_are_read_and_written(plan, tensorrt, monkeypatch, tmp_path):
    made, old, new, taken = plan(), tmp_path / "old", tmp_path / "new", []
    old.write_bytes(b"times")
    config = fake_tensorrt.IBuilderConfig
    monkeypatch.setattr(config, "create_timing_cache", lambda self, blob: blob)
    monkeypatch.setattr(config, "set_timing_cache", lambda self, cache, _: taken.append(cache) or True)
    monkeypatch.setattr(fake_tensorrt.ITimingCache, "serialize", lambda self: b"more times")
    for source, target in ((None, None), (None, new), (old, new), (new, None)):
        options = NetworkOptions(input_timing_cache=source, output_timing_cache=target)
        serialize_engine(tensorrt, made.config, made.weights.load, options)
    assert taken == [b"", b"times", b"more times"]
    assert (old.read_bytes(), new.read_bytes()) == (b"times", b"more times")


def test_the_optimization_level_is_tensorrts_own_unless_given(plan, tensorrt, monkeypatch):
    made, given = plan(), []
    monkeypatch.setattr(
        fake_tensorrt.Builder, "build_serialized_network", lambda self, _, config: given.append(config) or b""
    )
    for level in (None, 0):
        serialize_engine(tensorrt, made.config, made.weights.load, NetworkOptions(optimization_level=level))
    assert [getattr(config, "builder_optimization_level", None) for config in given] == [None, 0]


class PhaseLog(list):
    def start(self, *args):
        self.append(("start", *args))

    def step(self, *args):
        self.append(("step", *args))

    def finish(self, *args):
        self.append(("finish", *args))


def test_a_build_tells_of_its_phases_where_tensorrt_does(plan, tensorrt, tensorrt_86, monkeypatch):
    def report(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Timing", "Building Engine", 7)
        assert monitor.step_complete("Timing", 0)
        monitor.phase_finish("Timing")
        return b""

    made, told = plan(), PhaseLog()
    serialize_engine(tensorrt_86, made.config, made.weights.load, NetworkOptions(), told)
    assert told == []
    monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", report)
    serialize_engine(tensorrt, made.config, made.weights.load, NetworkOptions(), told)
    assert told == [
        ("start", "Building Engine", None, 2),
        ("start", "Timing", "Building Engine", 7),
        ("step", "Timing"),
        ("finish", "Timing"),
    ]


def test_a_weight_that_cannot_be_read_ends_the_build(plan, tensorrt, machine, monkeypatch):
    made, asked = plan(backend="tensorrt", workers=2), []
    made.output_dir.mkdir()

    def load(self, name):
        asked.append(name)
        raise CheckpointError("the file is gone: copy it again")

    monkeypatch.setattr(type(made.weights), "load", load)
    with pytest.raises(CheckpointError, match="the file is gone"):
        build_engine(made, None, None, tensorrt)
    assert files(made) == []


@pytest.mark.parametrize("decode_profile", [False, True])
def test_profiles_are_given_to_the_builder(decode_profile, plan, tensorrt, monkeypatch):
    made, given = plan(), []
    monkeypatch.setattr(
        fake_tensorrt.Builder, "build_serialized_network", lambda self, *args: given.append(args) or b""
    )
    serialize_engine(tensorrt, made.config, made.weights.load, NetworkOptions(decode_profile=decode_profile))
    ((network, config),) = given
    assert len(config.profiles) == 1 + decode_profile
    assert all(set(p.shapes) == {t.name for t in network._inputs} for p in config.profiles)
    assert config.profiles[-1].shapes["input_ids"] == ((1,), (16,), (16,)) if decode_profile else ((1,), (512,), (512,))


def test_a_timing_cache_that_does_not_fit_is_started_anew(plan, tensorrt, monkeypatch, caplog, tmp_path):
    made, path, taken = plan(), tmp_path / "model.cache", []
    path.write_bytes(b"of another GPU")
    config = fake_tensorrt.IBuilderConfig
    monkeypatch.setattr(config, "create_timing_cache", lambda self, blob: blob)
    monkeypatch.setattr(config, "set_timing_cache", lambda self, cache, _: taken.append(cache) or not cache)
    serialize_engine(tensorrt, made.config, made.weights.load, NetworkOptions(input_timing_cache=path))
    assert taken == [b"of another GPU", b""]
    assert path.read_bytes() == b"of another GPU"
    assert "model.cache is of another TensorRT or GPU, or damaged: the build starts a new one" in caplog.text


def test_a_build_that_fails_says_why_and_leaves_the_folder(plan, tensorrt, machine, monkeypatch):
    made = plan()
    made.output_dir.mkdir()
    build_engine(made, None, None, tensorrt)
    before = {name: (made.output_dir / name).read_bytes() for name in files(made)}
    logger = tensorrt.logger()
    monkeypatch.setattr(tensorrt, "logger", lambda: logger)

    def fail(builder, network, config):
        logger.log(1, "Could not find any implementation for node gather")
        logger.log(2, "a warning after it")

    monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", fail)
    with pytest.raises(EngineError, match=r"did not build the engine: Could not find any implementation for node gath"):
        build_engine(made, None, None, tensorrt)
    assert {name: (made.output_dir / name).read_bytes() for name in files(made)} == before


def test_a_full_disk_leaves_the_folder(plan, tensorrt, machine, monkeypatch):
    """Also where it is full of the weights, which a thread writes while TensorRT builds."""
    made = plan(backend="tensorrt")
    made.output_dir.mkdir()
    build_engine(made, None, None, tensorrt)
    before = {name: (made.output_dir / name).read_bytes() for name in files(made)}

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("rank0.weights.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        build_engine(made, None, None, tensorrt)
    assert {name: (made.output_dir / name).read_bytes() for name in files(made)} == before
    assert [path.name for path in made.output_dir.parent.iterdir() if path.name.endswith(".part")] == []


def test_a_build_that_fails_waits_for_no_more_of_its_weights(plan, tensorrt, machine, monkeypatch, tmp_path):
    """Neither are they written to their end, nor is what was written hashed."""
    made, ended, loaded, hashed = plan(backend="tensorrt", gemm_plugin="float16"), Event(), [], []

    def load(name):
        loaded.append(name)
        assert ended.wait(60)
        return made.weights.load(name)

    def fail(*args):
        raise EngineError("TensorRT did not build the engine")

    monkeypatch.setattr(build, "Event", lambda: ended)
    monkeypatch.setattr(build, "serialize_engine", fail)
    monkeypatch.setattr(build, "file_checksum", hashed.append)
    config = built_for(made.config, tensorrt, "float16")
    with pytest.raises(EngineError, match="did not build"):
        build.write_engine(tmp_path, tensorrt, config, load, made.network)
    assert (len(loaded) < 2, hashed) == (True, [])


def test_there_is_one_logger_which_forgets(tensorrt_86):
    logger = tensorrt_86.logger()
    logger.log(1, "3: getPluginCreator could not find plugin: SawInt4PagedAttentionsaw version: 1")
    assert logger.reason == "it gave no reason"
    logger.log(1, "1: broken\n  in two\n")
    assert logger.reason == "1: broken in two"
    logger.log(1, "SawGemm: what to do")
    logger.log(1, "5: Error Code 5: Miscellaneous (no further information)")
    assert logger.reason == "SawGemm: what to do"
    assert tensorrt_86.logger() is logger
    assert logger.reason == "it gave no reason"


def test_without_a_gpu_the_builder_does_not_start(tensorrt, monkeypatch):
    def fail(self, logger):
        logger.log(2, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake_tensorrt.Builder, "__init__", fail)
    with pytest.raises(
        BackendUnavailableError, match=r"^TensorRT 10\.14\.1 does not start \(CUDA initialization failure"
    ):
        tensorrt.builder(tensorrt.logger())


def test_a_missing_library_is_said_before_weights_are_read(plan, tensorrt, monkeypatch):
    monkeypatch.setattr(fake_tensorrt.get_plugin_registry(), "saw", False)
    monkeypatch.setattr(
        "saw_trtllm.plugins.library.plugin_library", lambda trt: "/nowhere/libsaw_trtllm_plugins_trt10.so"
    )
    made = plan()
    with pytest.raises(BackendUnavailableError, match="cannot be loaded"):
        serialize_engine(tensorrt, made.config, lambda name: pytest.fail(name), NetworkOptions())
