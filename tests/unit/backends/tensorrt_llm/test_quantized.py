"""Quantized weights in TensorRT-LLM's own layers: its front-end's real source, and the swap around the cache alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saw_trtllm.backends.tensorrt_llm
from saw_trtllm.backends.tensorrt_llm.options import SwapOptions
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.options import BuildOptions
from tests.support import quantized
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_frontend as fake_tensorrt_frontend
from tests.support.fakes.tensorrt_execute import execute, hopper_codes, to_e4m3
from tests.support.models import make_hf_model

pytestmark = [
    pytest.mark.skipif(fake_tensorrt_frontend.missing() is not None, reason=str(fake_tensorrt_frontend.missing())),
    pytest.mark.filterwarnings("ignore"),  # TensorRT-LLM's own
]

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LIMITS = {"max_batch_size": 8, "max_num_tokens": 512}
GROUP = 64  # as TensorRT-LLM's kernels have them, beside 128
PROMPTS = [[5, 17, 101, 3, 44, 90, 12, 66, 150, 7, 8, 21, 33, 2, 140, 61, 77, 9], [42, 1, 99]]
#: As the configs of published models have them, and what a checkpoint of TensorRT-LLM calls it.
CASES = {
    "awq": (quantized.grouped("awq", GROUP), "W4A16_AWQ"),
    "gptq": (quantized.grouped("gptq", GROUP), "W4A16_AWQ"),
    "gptq zeros": (quantized.grouped("gptq zeros", GROUP), "W4A16_AWQ"),
    "modelopt AWQ": (quantized.grouped("modelopt AWQ", GROUP), "W4A16_AWQ"),
    "modelopt FP8": (quantized.CASES["modelopt FP8"], "FP8"),
    "fbgemm_fp8": (quantized.CASES["fbgemm_fp8"], "FP8_PER_CHANNEL_PER_TOKEN"),
}
INT4 = [name for name, (_, algorithm) in CASES.items() if algorithm == "W4A16_AWQ"]
ONE_OF_EACH = ["gptq zeros", "modelopt FP8", "fbgemm_fp8"]
MODEL_CLS_FILE = Path(saw_trtllm.backends.tensorrt_llm.__file__).parent / "model_cls.py"
#: TensorRT-LLM's names of Hugging Face's layers.
PARTS = {
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.dense": ["self_attn.o_proj"],
    "mlp.fc": ["mlp.gate_proj"],
    "mlp.gate": ["mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hugging Face folders of quantized models, and the models that they stand for in float32."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("models")
            source, model = make_hf_model(folder / "source", "llama", torch.float16, **SIZES)
            model = model.float()
            made[name] = quantized.write_quantized(folder / "quantized", model, source, CASES[name][0]), model
            if CASES[name][1] == "FP8":
                round_to_one_scale(load_file(made[name][0] / "model.safetensors"), model)
        return made[name]

    return make


def round_to_one_scale(tensors, model):
    """Give queries, keys and values what they are with the largest of their scales: TensorRT-LLM's layer has one."""
    for i, layer in enumerate(model.model.layers):
        linears = {part: layer.get_submodule(part) for part in PARTS["attention.qkv"]}
        scale = max(tensors[f"model.layers.{i}.{part}.weight_scale"] for part in linears)
        for linear in linears.values():
            linear.weight.data = to_e4m3(linear.weight.data / scale) * scale


def converted(models, name, folder, tp_size=1, dtype="auto"):
    save_checkpoint(Checkpoint.open(models(name)[0]), folder, tp_size, dtype)
    return folder


def stock_model(frontend, folder, rank=0):
    """TensorRT-LLM's own, by its own loader."""
    config = frontend.models.PretrainedConfig.from_json_file(str(folder / "config.json"))
    config.set_rank(rank)
    return frontend.models.MODEL_MAP[config.architecture].from_checkpoint(str(folder), config=config)


def count(*names):
    """Layers of a kind, or of a plugin, that the last network's outputs come from."""
    network = fake_tensorrt.Builder.networks[-1]
    kinds = [layer.type.name for layer in network._layers]
    return [kinds.count(name) or len(fake_tensorrt.plugin_layers(network, name)) for name in names]


# Checkpoints


@pytest.mark.parametrize(("tp_size", "dtype"), [(1, "float16"), (2, "bfloat16")])
@pytest.mark.parametrize("name", CASES)
def test_its_loader_takes_each_parameter_as_it_is(frontend, models, tmp_path, name, tp_size, dtype):
    """A tensor of another name, shape or dtype than its layers declare would be left out, or change its parameter."""
    folder = converted(models, name, tmp_path / "ckpt", tp_size, dtype)
    section = json.loads((folder / "config.json").read_text())["quantization"]
    assert section["quant_algo"] == CASES[name][1]
    config = frontend.models.PretrainedConfig.from_json_file(str(folder / "config.json"))
    declared = {n: (p.shape, p.dtype) for n, p in frontend.models.LLaMAForCausalLM(config).named_parameters()}
    stored = load_file(folder / "rank0.safetensors")
    loaded = dict(stock_model(frontend, folder, tp_size - 1).named_parameters())
    rope = {name for name in declared if name.startswith(("embed_positions", "rotary_inv_freq"))}  # its own constants
    assert loaded.keys() == declared.keys() == stored.keys() | rope
    for parameter, x in loaded.items():
        assert x.is_inited(), parameter
        assert (x.shape, x.dtype) == declared[parameter], parameter


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq zeros"])
def test_int4_is_what_its_own_converter_makes_of_the_model(frontend, models, tmp_path, name):
    """Bit for bit: codes in the order of its kernels, scales, and products of zero points."""
    model = stock_model(frontend, converted(models, name, tmp_path / "ckpt"))
    theirs = load_file(models(name)[0] / "model.safetensors")
    extra = {"config": model.config} | ({"use_autoawq": True} if name == "awq" else {})
    for layer in range(SIZES["num_hidden_layers"]):
        for ours, parts in PARTS.items():
            module = model
            for step in f"transformer.layers.{layer}.{ours}".split("."):
                module = module._modules[step] if step in module._modules else list(module.children())[int(step)]
            names = [f"model.layers.{layer}.{part}." for part in parts]
            weights = [theirs[name + suffix] for name in names for suffix in ("qweight", "scales", "qzeros")]
            made = module.postprocess("x.weight", weights, **extra)
            got = {"weight": module.weight, "weights_scaling_factor": module.weights_scaling_factor}
            got |= {} if module.zero is None else {"zero": module.zero}
            assert (module.zero is None) == (name == "gptq")
            for parameter, x in got.items():
                want = made[f"x.{parameter}"].contiguous().numpy()
                np.testing.assert_array_equal(x.raw_value.view(np.uint16), want.view(np.uint16), err_msg=parameter)
            if module.zero is None:
                assert not made["x.zero"].any()


@pytest.mark.parametrize("name", INT4)
def test_codes_come_back_out_of_its_kernels_order(frontend, models, tmp_path, name):
    ckpt = Checkpoint.open(models(name)[0])
    parameters = dict(stock_model(frontend, converted(models, name, tmp_path / "ckpt")).named_parameters())
    for tensor in ckpt.formats:
        codes = hopper_codes(parameters[tensor].raw_value, *ckpt.shape(tensor))
        np.testing.assert_array_equal(codes.numpy(), ckpt.load_quantized(tensor).values, err_msg=tensor)


def test_fp8_by_tensor_is_what_its_own_converter_makes_of_the_model(frontend, models, tmp_path):
    model = stock_model(frontend, converted(models, "modelopt FP8", tmp_path / "ckpt"))
    theirs = load_file(models("modelopt FP8")[0] / "model.safetensors")
    own = [f"model.layers.1.{part}." for part in PARTS["attention.qkv"]]
    qkv = list(model.transformer.layers.children())[1].attention.qkv
    pairs = [theirs[part + suffix] for part in own for suffix in ("weight", "weight_scale")]
    made = qkv.postprocess("x.weight", pairs)
    np.testing.assert_array_equal(qkv.weight.raw_value.view(np.uint8), made["x.weight"].view(torch.uint8).numpy())
    np.testing.assert_array_equal(qkv.weights_scaling_factor.raw_value, made["x.weights_scaling_factor"].numpy())
    inputs = [theirs[part + "input_scale"] for part in own]
    want = qkv.postprocess("x.activation_scaling_factor", inputs)
    np.testing.assert_array_equal(qkv.activation_scaling_factor.raw_value, want.numpy())


def test_fp8_by_channel_is_what_its_own_converter_makes_of_the_model(frontend, models, tmp_path):
    model = stock_model(frontend, converted(models, "fbgemm_fp8", tmp_path / "ckpt"))
    theirs = load_file(models("fbgemm_fp8")[0] / "model.safetensors")
    own = [f"model.layers.1.{part}." for part in PARTS["attention.qkv"]]
    qkv = list(model.transformer.layers.children())[1].attention.qkv
    made = qkv.postprocess("x.weight", [theirs[p + s] for p in own for s in ("weight", "weight_scale")])
    np.testing.assert_array_equal(qkv.weight.raw_value.view(np.uint8), made["x.weight"].view(torch.uint8).numpy())
    np.testing.assert_array_equal(qkv.per_channel_scale.raw_value, made["x.per_channel_scale"].numpy())


# The swap


def by_saw_build(frontend, models, name, folder):
    options = BuildOptions(
        model_dir=models(name)[0], output_dir=folder / "engine", backend="tensorrt_llm", max_seq_len=128, **LIMITS
    )
    build(plan_build(options))


def by_trtllm_build(frontend, models, name, folder):
    flags = [*(f"--{flag}={value}" for flag, value in LIMITS.items()), "--max_seq_len=128"]
    flags += ["--model_cls_file", MODEL_CLS_FILE, "--model_cls_name", "SawLLaMAForCausalLM"]
    flags += ["--output_timing_cache", folder / "model.cache", "--use_fp8_context_fmha", "disable"]
    ckpt = converted(models, name, folder / "ckpt")
    frontend.trtllm_build("--checkpoint_dir", ckpt, "--output_dir", folder / "engine", *flags)


def by_swap(frontend, models, name, folder, rewrite=False):
    from tensorrt_llm.plugin import PluginConfig

    from saw_trtllm.backends.tensorrt_llm.model import swap

    model = stock_model(frontend, converted(models, name, folder / "ckpt"))
    swap(model, SwapOptions(KVFormat("saw_int4", 64, "float16")), rewrite)
    plugin_config = PluginConfig()
    plugin_config.use_fp8_context_fmha, plugin_config.use_paged_context_fmha = False, True
    limits = {"max_seq_len": 128, "output_timing_cache": str(folder / "model.cache"), **LIMITS}
    config = frontend.builder.BuildConfig(plugin_config=plugin_config, **limits)
    frontend.builder.build(model, config).save(str(folder / "engine"))


def by_rewriting(*args):
    by_swap(*args, rewrite=True)


def prefill_logits():
    """Logits of the last token of each of PROMPTS, from the network that was built last."""
    lengths, layers = torch.tensor([len(p) for p in PROMPTS]), SIZES["num_hidden_layers"]
    inputs = {
        "input_ids": torch.tensor([token for prompt in PROMPTS for token in prompt]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "last_token_ids": lengths.cumsum(0),
        "sequence_length": lengths,
        "host_request_types": torch.zeros(len(PROMPTS), dtype=torch.int64),
        "host_max_attention_window_sizes": torch.full((layers,), 128),
        "kv_cache_block_offsets": torch.zeros(1, len(PROMPTS), 2, 4, dtype=torch.int64),
        "host_kv_cache_pool_pointers": torch.zeros(1, 2, dtype=torch.int64),
        "host_kv_cache_pool_mapping": torch.stack([torch.zeros(layers), torch.arange(layers)], 1).long(),
    }
    return execute(fake_tensorrt.Builder.networks[-1], inputs)["logits"]


def expected_logits(model, algorithm):
    """transformers' dequantized model, its FP8 layers' inputs rounded as their dialect says."""

    def round_input(module, inputs):
        x = inputs[0]
        scale = 0.02 if algorithm == "FP8" else x.abs().amax(-1, keepdim=True) / 448
        return (to_e4m3(x / scale) * scale,)

    hooks = []
    if algorithm != "W4A16_AWQ":
        linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        hooks = [linear.register_forward_pre_hook(round_input) for linear in linears]
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in PROMPTS])
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize(
    ("way", "name"),
    [(by_saw_build, name) for name in CASES]
    + [(way, name) for way in (by_trtllm_build, by_swap, by_rewriting) for name in ONE_OF_EACH],
)
def test_quantized_layers_stay_its_own_and_the_cache_is_ours(frontend, models, tmp_path, way, name):
    way(frontend, models, name, tmp_path)
    layers, algorithm = SIZES["num_hidden_layers"], CASES[name][1]
    assert count("GPTAttention", "SawRotateQuantizeKV", "SawInt4PagedAttention") == [0, layers, layers]
    if algorithm == "W4A16_AWQ":
        assert count("WeightOnlyGroupwiseQuantMatmul") == [5 * layers]
    elif algorithm == "FP8":  # the MLP's first two are one layer to it
        assert count("QUANTIZE", "DEQUANTIZE") == [4 * layers, 8 * layers]
    else:
        plugins = ("Fp8RowwiseGemm", "RmsnormQuantization", "QuantizePerToken")
        assert count(*plugins) == [4 * layers, 2 * layers, 2 * layers]
    got, want = prefill_logits(), expected_logits(models(name)[1], algorithm)
    # Scales and products of zero points are fp16. An input of FP8 that falls on a border moves by a sixteenth, and much
    # that comes after it falls on the other side of one.
    tolerance = 0.005 if algorithm == "W4A16_AWQ" else 0.15
    assert (got[:, : want.shape[1]] - want).abs().max() < tolerance * want.std()
    config = EngineConfig.load(tmp_path / "engine")
    assert config.pretrained_config.quantization["quant_algo"] == algorithm
    assert len(config.saw_int4.quantized) == (5 * layers if way in (by_saw_build, by_trtllm_build) else 0)


@pytest.mark.parametrize("name", ["awq", "fbgemm_fp8"])
def test_each_rank_has_its_part(frontend, models, tmp_path, name):
    options = {"model_dir": models(name)[0], "output_dir": tmp_path / "engine", "backend": "tensorrt_llm", **LIMITS}
    build(plan_build(BuildOptions(tp_size=2, max_seq_len=128, **options)))
    for network in list(fake_tensorrt.Builder.networks)[-2:]:
        products = ("WeightOnlyGroupwiseQuantMatmul", "Fp8RowwiseGemm")
        shapes = [layer._outputs[0].shape[1] for p in products for layer in fake_tensorrt.plugin_layers(network, p)]
        heads = (8 + 2 * 2) * 64 // 2
        assert sorted(set(shapes)) == [128, heads] if name == "awq" else {128, heads} <= set(shapes)


def test_a_calibration_of_the_quantized_model(frontend, models, tmp_path):
    folder, model = models("gptq zeros")
    windows = torch.randint(0, 203, (4, 64), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(Checkpoint.open(folder), windows)
    calibration.save(tmp_path / "calibration.safetensors")
    options = {"calibration": tmp_path / "calibration.safetensors", "output_dir": tmp_path / "engine", **LIMITS}
    build(plan_build(BuildOptions(model_dir=folder, backend="tensorrt_llm", **options)))
    for i, write in enumerate(fake_tensorrt.plugin_layers(fake_tensorrt.Builder.networks[-1], "SawRotateQuantizeKV")):
        center = write._inputs[8].producer.weights.numpy().reshape(2, -1)
        np.testing.assert_array_equal(center, calibration.k_center[i])
    got, want = prefill_logits(), expected_logits(model, "W4A16_AWQ")
    assert (got[:, : want.shape[1]] - want).abs().max() < 0.005 * want.std()


def test_v_is_rotated_in_16_bits_where_it_is_asked_for(frontend, models, tmp_path):
    """Weights that take the rotation in are TensorRT-LLM's plain layers then, and the others stay quantized."""
    folder, model = models("awq")
    options = {"rotate_v": "enable", "output_dir": tmp_path / "engine", "backend": "tensorrt_llm", **LIMITS}
    build(plan_build(BuildOptions(model_dir=folder, **options)))
    assert count("WeightOnlyGroupwiseQuantMatmul") == [3 * SIZES["num_hidden_layers"]]
    got, want = prefill_logits(), expected_logits(model, "W4A16_AWQ")
    assert (got[:, : want.shape[1]] - want).abs().max() < 0.005 * want.std()


def test_the_table_has_bytes_by_kind(frontend, models, tmp_path):
    folder, _ = models("awq")
    plan = plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "e", backend="tensorrt_llm", **LIMITS))
    kinds = plan.weights.bytes_by_kind()
    linear = SIZES["num_hidden_layers"] * (768 * 128 + 128 * 512 + 3 * 128 * 256)
    assert kinds["INT4 in groups of 64"] == linear // 2 + 3 * linear // GROUP  # scales of 16 bits, points of 8
    assert kinds.keys() == {"INT4 in groups of 64", "float16"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fp8 blocks", "FP8 weights in blocks, which TensorRT-LLM's definitions do not have: build it"),
        ("gptq desc_act", "an order of columns, which a checkpoint of TensorRT-LLM holds in the order of one GPU's"),
        ("gptq 8 bits", "INT8 weights, which a checkpoint of TensorRT-LLM holds in the order of one GPU's kernels"),
    ],
)
def test_what_its_layers_lack(frontend, tmp_path, name, words):
    source, model = make_hf_model(tmp_path / "source", "llama", torch.float16, **SIZES)
    folder = quantized.write_quantized(tmp_path / "quantized", model.float(), source, quantized.CASES[name])
    with pytest.raises(ConfigError, match=words):
        plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "e", backend="tensorrt_llm", **LIMITS))
