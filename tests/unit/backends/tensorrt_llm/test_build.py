"""The swap on small stand-ins for TensorRT-LLM and TensorRT, and what of it needs neither."""

import json
import re
import sys
import types

import numpy as np
import pytest

from saw_trtllm.backends.registry import choose_backend
from saw_trtllm.backends.tensorrt_llm import SwapOptions, as_built, for_executor
from saw_trtllm.backends.tensorrt_llm.checks import check_attention, check_build, check_call
from saw_trtllm.backends.tensorrt_llm.options import CheckpointSection
from saw_trtllm.build import build, plan_build
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint, shard
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.options import BuildOptions
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_llm as fake_tensorrt_llm
from tests.support.fakes.gpu import NAME as GPU_NAME
from tests.support.fakes.gpu import pretend_gpu
from tests.support.frames import random_frames, unpack_frame
from tests.support.models import make_hf_model
from tests.support.plugin_library import SOURCES, STEMS

WRITE, ATTENTION = "SawRotateQuantizeKV", "SawInt4PagedAttention"
INPUTS = {
    *("input_ids", "position_ids", "last_token_ids", "sequence_length", "host_request_types"),
    *("host_max_attention_window_sizes", "kv_cache_block_offsets", "host_kv_cache_pool_pointers"),
    "host_kv_cache_pool_mapping",
}
LIMITS = {"max_batch_size": 8, "max_num_tokens": 512}


@pytest.fixture
def frontend():
    with fake_tensorrt_llm.frontend() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("models")
    return {
        family: make_hf_model(folder, family, torch.float16)[0] for family in ("llama", "mistral", "qwen2", "qwen3")
    }


@pytest.fixture
def checkpoint(models, tmp_path):
    def make(family="llama", tp_size=1, **changes):
        save_checkpoint(Checkpoint.open(models[family]), tmp_path / "ckpt", tp_size)
        config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
        (tmp_path / "ckpt" / "config.json").write_text(json.dumps(config | changes))
        return tmp_path / "ckpt"

    return make


def network():
    return fake_tensorrt.Builder.networks[-1]


def plugins(name, of=None):
    return fake_tensorrt.plugin_layers(of or network(), name)


# The stand-ins are as the plugins' pages say


@pytest.mark.parametrize("plugin", [WRITE, ATTENTION])
def test_the_stand_in_has_the_fields_and_inputs_of_the_plugins_pages(plugin):
    text = (SOURCES / f"{STEMS[plugin]}.md").read_text()
    fields, inputs = (re.split(r"^## ", text, flags=re.M)[i] for i in (1, 2))
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w.]+) \|", fields, flags=re.M)
    kinds = {"int": "INT32", "float": "FLOAT32", "text": "CHAR"}
    documented = {
        name: (kinds[kind], None if default == "required" else float(default)) for name, kind, default in rows
    }
    assert documented == {k: (kind.name, default) for k, (kind, default) in fake_tensorrt.FIELDS[plugin].items()}
    rows = re.findall(r"^\| `(\w+)` \| (\w+)[^|]*\|", inputs, flags=re.M)
    types_ = {"dtype": "dtype", "INT32": fake_tensorrt.int32, "INT64": fake_tensorrt.int64}
    always = [t for t, _ in fake_tensorrt.PLUGIN_INPUTS[plugin]]
    assert [types_.get(t, fake_tensorrt.float32) for _, t in rows][: len(always)] == always
    assert {f"use_{name}" for name, _ in rows[len(always) :]} == {x for x in documented if x.startswith("use_")}


# The swap


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_saw_build(frontend, models, tmp_path, family):
    plan = plan_build(
        BuildOptions(model_dir=models[family], output_dir=tmp_path / "e", backend="tensorrt_llm", **LIMITS)
    )
    assert plan.backend_reason == "asked for; TensorRT-LLM 1.2.1"
    seen = []
    assert build(plan, seen.append) == (tmp_path / "e" / "rank0.engine").stat().st_size
    assert len(seen) == plan.num_steps
    assert {t.name for t in network()._inputs} == INPUTS
    assert [t.name for t in network()._outputs] == ["logits"]
    writes, attentions = plugins(WRITE), plugins(ATTENTION)
    assert plugins("GPTAttention") == []
    assert [w.plugin.fields["layer_idx"] for w in writes] == [0, 1, 2]
    for write, attention in zip(writes, attentions, strict=True):
        assert [t.name for t in write._inputs[1:7]] == [
            *("position_ids", "last_token_ids", "sequence_length", "kv_cache_block_offsets"),
            *("host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping"),
        ]
        assert [(t.producer, t.index) for t in attention._inputs[:4]] == [(write, i) for i in range(4)]
        assert [t.name for t in attention._inputs[4:]] == [
            *("host_request_types", "last_token_ids", "sequence_length", "kv_cache_block_offsets"),
            *("host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping", "host_max_attention_window_sizes"),
        ]
        assert write.plugin.fields["rotate_v"] == 0
        assert write.plugin.fields["range_factor"] == pytest.approx(0.97)
        assert attention.plugin.fields["softmax_scale"] == pytest.approx(1 / 8)
        assert attention.plugin.fields["window"] == (12 if family == "mistral" else 0)
    config = json.loads((tmp_path / "e" / "config.json").read_text())["pretrained_config"]
    assert (config["head_size"], config["quantization"]["kv_cache_quant_algo"]) == (36, "INT8")
    ours = EngineConfig.load(tmp_path / "e")
    assert (ours.kv_format, ours.pretrained_config.head_size) == (KVFormat("saw_int4", 64), 64)
    assert sorted(p.name for p in (tmp_path / "e").iterdir())[::2] == ["config.json", "rank0.engine"]


def test_weights_take_in_the_rotation(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.models import SawLLaMAForCausalLM

    folder = checkpoint(tp_size=2)
    plan = plan_build(BuildOptions(checkpoint_dir=folder, backend="tensorrt_llm"))
    for rank in range(2):
        model = SawLLaMAForCausalLM.from_checkpoint(str(folder), rank=rank)
        loaded = dict(model.named_parameters())
        for kind in ("qkv.weight", "dense.weight"):
            name = f"transformer.layers.1.attention.{kind}"
            want = shard(name, plan.weights.load(name), plan.config.pretrained_config, 2, rank)
            np.testing.assert_array_equal(loaded[name].array, want)
            assert not np.array_equal(want, shard(name, plan.checkpoint.load(name), plan.checkpoint.config, 2, rank))


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks(frontend, checkpoint, tmp_path, tp_size):
    options = {"checkpoint_dir": checkpoint(tp_size=tp_size), "output_dir": tmp_path / "e", "backend": "tensorrt_llm"}
    build(plan_build(BuildOptions(**options, **LIMITS)))
    for rank, net in enumerate(list(fake_tensorrt.Builder.networks)[-tp_size:]):
        assert (tmp_path / "e" / f"rank{rank}.engine").is_file()
        for layer in plugins(WRITE, net) + plugins(ATTENTION, net):
            fields = layer.plugin.fields
            assert (fields["num_heads"], fields["num_kv_heads"]) == (8 // tp_size, max(1, 2 // tp_size))
    assert EngineConfig.load(tmp_path / "e").pretrained_config.mapping.tp_size == tp_size


def make_model(checkpoint, **changes):
    config = fake_tensorrt_llm.PretrainedConfig.from_json_file(checkpoint(**changes) / "config.json")
    model = fake_tensorrt_llm.LLaMAForCausalLM(config)
    rng = np.random.default_rng(0)
    for _, parameter in model.named_parameters():
        parameter.value = rng.standard_normal(parameter.shape).astype(np.float16)
    return model


@pytest.mark.parametrize("rewrite", [False, True])
def test_swap_of_a_model_that_is_there(frontend, checkpoint, rewrite):
    from saw_trtllm.backends.tensorrt_llm.model import swap

    model = make_model(checkpoint)
    attention = model.transformer.layers._modules["1"].attention
    attention.max_attn_value, attention.q_scaling = 30.0, 2.0
    center = np.arange(3 * 2 * 64, dtype=np.float32).reshape(3, 2, 64)
    frames = dict(zip(("k_frame", "q_frame"), random_frames((3, 2), 64), strict=True))
    options = SwapOptions(
        KVFormat("saw_int4", 64, hadamard_order=32), k_center=center, windows=[None, 7, None], **frames
    )
    assert swap(model, options, rewrite) is model
    fake_tensorrt_llm.build(model, fake_tensorrt_llm.BuildConfig(max_seq_len=128, **LIMITS))
    write, attend = plugins(WRITE)[1], plugins(ATTENTION)[1]
    assert plugins("GPTAttention") == []
    assert (write.plugin.fields["hadamard_order"], write.plugin.fields["rotate_v"]) == (32, 1)
    np.testing.assert_array_equal(write._inputs[8].producer.weights.numpy().reshape(2, 64), center[1])
    for x, frame in zip(write._inputs[9:], frames.values(), strict=True):
        packed = x.producer.weights.numpy().reshape(2, 2, 64, 64)
        np.testing.assert_allclose(unpack_frame(packed), frame[1], rtol=2**-22, atol=2**-36)
    wanted = {"window": 7, "softcap": 30.0, "softmax_scale": pytest.approx(1 / 16)}
    assert wanted.items() <= attend.plugin.fields.items()
    # V's rotation is not in these weights, so it is undone after the attention.
    rotated = [layer for layer in fake_tensorrt.live_layers(network()) if attend.get_output(0) in layer._inputs]
    assert [layer.type.name for layer in rotated] == ["SHUFFLE"]
    names = {t.name for t in network()._inputs}
    assert names >= INPUTS if rewrite else names == INPUTS


def test_last_token_ids_is_declared_where_tensorrt_llm_does_not(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.model import swap

    model = swap(make_model(checkpoint), SwapOptions(KVFormat("saw_int4", 64)))
    config = fake_tensorrt_llm.BuildConfig(max_seq_len=128, gather_context_logits=True, **LIMITS)
    fake_tensorrt_llm.build(model, config)
    assert {t.name for t in network()._inputs} == INPUTS


def test_an_input_that_the_executor_does_not_feed_is_never_declared(frontend):
    from saw_trtllm.backends.tensorrt_llm.attention import network_input

    net = fake_tensorrt_llm.Network(fake_tensorrt.INetworkDefinition(), None)
    with fake_tensorrt_llm.net_guard(net):
        for name in ("host_request_types", "last_token_ids", "something"):
            with pytest.raises(ConfigError, match=rf"no input {name}, .* --kv_cache_type paged"):
                network_input(name)
    assert net.trt_network.num_inputs == 0


def test_a_qk_norm_has_the_models_epsilon(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.models import SawQWenForCausalLM

    model = SawQWenForCausalLM.from_checkpoint(str(checkpoint("qwen3", norm_epsilon=0.25)))
    frontend.build(model, fake_tensorrt_llm.BuildConfig(max_seq_len=128, **LIMITS))
    norms = [layer for layer in network()._layers if layer.type.name == "IDENTITY"]
    assert [layer.eps for layer in norms] == [0.25] * 6


def test_attention_rejects_what_it_is_not_given(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.model import swap

    model = swap(make_model(checkpoint), SwapOptions(KVFormat("saw_int4", 64)))
    attention = model.transformer.layers._modules["0"].attention
    with pytest.raises(ConfigError, match="attention with skip_attn is not supported"):
        attention.forward(None, use_cache=True, skip_attn=object())
    with pytest.raises(ConfigError, match="has no LoRA"):
        attention.forward(None, use_cache=True, lora_layer_params=object())


def test_a_plugin_that_rejects_its_fields(frontend):
    from saw_trtllm.backends.tensorrt_llm.attention import add_plugin

    with pytest.raises(ConfigError, match=r"SawRotateQuantizeKV rejects {'layer_idx': 0}: see TensorRT's log"):
        add_plugin(WRITE, {"layer_idx": 0}, [], [])


def test_a_class_for_another_family(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.models import SawMistralForCausalLM

    with pytest.raises(
        ConfigError, match=r"cannot build a Qwen2ForCausalLM: give --model_cls_name SawQWenForCausalLM$"
    ):
        SawMistralForCausalLM.from_checkpoint(str(checkpoint("qwen2")))
    with pytest.raises(ConfigError, match="preprocess_weights_hook cannot be combined with SawMistralForCausalLM"):
        SawMistralForCausalLM.from_checkpoint(str(checkpoint("qwen2")), preprocess_weights_hook=lambda w: w)


def test_the_file_for_trtllm_build_names_the_classes(frontend):
    from saw_trtllm.backends.tensorrt_llm import model_cls, models

    assert model_cls.__all__ == sorted(models.CLASSES)
    # Found again in trtllm-build's worker processes.
    assert {cls.__module__ for cls in models.CLASSES.values()} == {"saw_trtllm.backends.tensorrt_llm.models"}


def test_models_without_an_attention_to_swap(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.model import swap

    options = SwapOptions(KVFormat("saw_int4", 64))
    model = make_model(checkpoint)
    layers = model.transformer.layers._modules.values()
    for layer in layers:
        layer._modules["attention"] = type("LinearAttention", (fake_tensorrt_llm.Module,), {})()
    with pytest.raises(ConfigError, match="is LinearAttention, an attention that the swap does not know: use swap"):
        swap(model, options)
    layer._modules["attention"].kv_lora_rank = 512
    for layer in layers:
        layer._modules["attention"] = fake_tensorrt_llm.Module()
        layer._modules["attention"].forward = lambda x, **others: (x, None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM is unknown to the swap: it has no layer"):
        swap(model, options)
    model = swap(model, options, rewrite=True)
    with pytest.raises(ConfigError, match="has no GPTAttention to replace"):
        fake_tensorrt_llm.build(model, fake_tensorrt_llm.BuildConfig(max_seq_len=128, **LIMITS))


def test_the_command_says_what_comes_next(frontend, models, tmp_path, capsys):
    from saw_trtllm.cli.build import main

    flags = ["--backend", "tensorrt_llm", "--model_dir", models["llama"], "--output_dir", tmp_path / "e"]
    flags += ["--max_batch_size", 8, "--max_num_tokens", 512]
    assert main([*map(str, flags), "--dry_run"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert main([*map(str, flags)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^backend +tensorrt_llm \(asked for; TensorRT-LLM 1\.2\.1\)$", said, flags=re.M)
    assert re.search(r"^next +saw-triton --backend tensorrtllm --engine_dir ", said, flags=re.M)
    assert "tokens that fit" not in said


# Refusals


def good_build():
    config = types.SimpleNamespace(
        dtype="float16",
        max_position_embeddings=256,
        quantization=types.SimpleNamespace(kv_cache_quant_algo=None),
        mapping=types.SimpleNamespace(cp_size=1),
    )
    limits = {"max_beam_width": 1, "max_draft_len": 0, "max_seq_len": 256, "use_cache": True}
    return config, fake_tensorrt_llm.PluginConfig(), limits


@pytest.mark.parametrize(
    ("part", "change", "flag"),
    [
        (2, {"max_beam_width": 4}, "--max_beam_width 1"),
        (2, {"max_draft_len": 3}, "--speculative_decoding_mode"),
        (2, {"speculative_decoding_draft_tokens_external": True}, "--speculative_decoding_mode"),
        (2, {"use_cache": False}, "--kv_cache_type paged"),
        (2, {"max_seq_len": 257}, "--max_seq_len"),
        (1, {"lora_plugin": "auto"}, "--lora_plugin disable"),
        (1, {"use_fp8_context_fmha": True}, "--use_fp8_context_fmha disable"),
        (1, {"gpt_attention_plugin": None}, "--gpt_attention_plugin auto"),
        (1, {"remove_input_padding": False}, "--remove_input_padding enable"),
        (1, {"paged_kv_cache": False}, "--kv_cache_type paged"),
        (1, {"use_paged_context_fmha": False}, "--use_paged_context_fmha enable"),
        (1, {"tokens_per_block": 24}, "--tokens_per_block 16, 32, 64, 128"),
        (0, {"dtype": "float32"}, "--dtype float16"),
        (0, {"quantization": types.SimpleNamespace(kv_cache_quant_algo="FP8")}, "--kv_cache_dtype"),
        (0, {"mapping": types.SimpleNamespace(cp_size=2)}, "--cp_size 1"),
    ],
)
def test_rejected_builds(part, change, flag):
    given = good_build()
    check_build(*given)
    if part == 2:
        given[2].update(change)
    else:
        vars(given[part]).update(change)
    with pytest.raises(ConfigError) as e:
        check_build(*given)
    assert flag in str(e.value)
    assert "\n" not in str(e.value)


def test_rejected_attentions():
    good = {
        "local_layer_idx": 0,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "attention_head_size": 64,
        "attention_mask_type": fake_tensorrt_llm.AttentionMaskType.causal,
        "position_embedding_type": fake_tensorrt_llm.PositionEmbeddingType.rope_gpt_neox,
    }
    check_attention("layer", fake_tensorrt_llm.Attention(**good))
    for change, message in (
        ({"cross_attention": True}, "is a cross attention"),
        ({"clip_qkv": 8.0}, "clipped Q, K and V"),
        ({"rotary_embedding_percentage": 0.5}, "RoPE on 32 of 64 channels"),
        ({"position_embedding_type": fake_tensorrt_llm.PositionEmbeddingType.rope_gptj}, "embedding rope_gptj"),
        ({"num_attention_heads": 34}, "at most 16 may share one"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_attention("layer", fake_tensorrt_llm.Attention(**good | change))


def test_rejected_calls():
    signature = fake_tensorrt_llm.SIGNATURES["functional", "gpt_attention"]
    good = {name: p.default if p.default is not p.empty else None for name, p in signature.parameters.items()}
    good |= {"num_heads": 8, "num_kv_heads": 2, "hidden_size_per_head": 64, "rotary_embedding_dim": 64}
    good["position_embedding_type"] = fake_tensorrt_llm.PositionEmbeddingType.rope_gpt_neox
    check_call("layer", good)
    for change, message in (
        ({"do_cross_attention": True}, "is a cross attention"),
        ({"is_mla_enabled_flag": True}, "multi-head latent attention"),
        ({"alibi_slopes": object()}, "alibi_slopes"),
        ({"mask_type": fake_tensorrt_llm.AttentionMaskType.bidirectional}, "mask bidirectional"),
        ({"use_cache": False}, "no KV cache"),
        ({"qkv": [1, 2, 3]}, "projected apart"),
        ({"num_kv_heads": 3}, "at most 16 may share one"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_call("layer", good | change)


def test_what_saw_build_rejects(frontend, models, tmp_path):
    options = {"model_dir": models["llama"], "backend": "tensorrt_llm", "output_dir": tmp_path / "e"}
    with pytest.raises(ConfigError, match=r"executor has rows of one size in all layers: leave it out$"):
        plan_build(BuildOptions(kv_skip_layers="0", **options))
    with pytest.raises(ConfigError, match=r"compute in 16 bits: give --dtype float16$"):
        plan_build(BuildOptions(dtype="float32", **options))
    with pytest.raises(ConfigError, match=r"give --max_beam_width 1$"):
        plan_build(BuildOptions(max_beam_width=2, **options))


def test_releases_without_the_engine_backend(frontend, models, monkeypatch):
    options = BuildOptions(model_dir=models["llama"], backend="tensorrt_llm")
    monkeypatch.delitem(sys.modules, "tensorrt_llm.graph_rewriting")
    with pytest.raises(
        BackendUnavailableError,
        match=r"TensorRT-LLM 1.2.1 has no engine backend \(no tensorrt_llm.graph_rewriting\): install 1.2.1, the last",
    ):
        plan_build(options)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(BackendUnavailableError, match=r"needs TensorRT-LLM 1.2.1, .* or use --backend reference"):
        plan_build(options)


def test_auto_builds_for_it_where_it_is(frontend, monkeypatch):
    pretend_gpu(monkeypatch)
    backend, reason = choose_backend("auto")
    assert backend.name == "tensorrt_llm"
    assert reason == f"the best here; TensorRT 10.14.1 on {GPU_NAME}, for TensorRT-LLM 1.2.1"
    monkeypatch.delitem(sys.modules, "tensorrt_llm.graph_rewriting")
    assert choose_backend("auto")[0].name == "tensorrt"


# Configs


def test_the_sections_of_checkpoints(tmp_path):
    config = types.SimpleNamespace(head_size=128, dtype="bfloat16", sliding_window=[None, 4])
    options = SwapOptions.of_config(config)
    assert (options.kv_format, options.v_folded) == (KVFormat("saw_int4", 128, "bfloat16"), False)
    assert [options.window(i) for i in range(2)] == [0, 4]
    config.saw_int4 = {"kv": "saw_int4", "hadamard_order": 16, "rotate_v": False, "range_factor": 1.0}
    assert SwapOptions.of_config(config).kv_format == KVFormat("saw_int4", 128, "bfloat16", 16, False, 1.0)
    given = CheckpointSection.of(config).build_options(tmp_path)
    assert (given.backend, given.hadamard_order, given.rotate_v, given.range_factor) == (
        "tensorrt_llm",
        16,
        "disable",
        1,
    )
    config.saw_int4 = {"calibration": "file"}
    assert CheckpointSection.of(config).build_options(tmp_path).calibration == tmp_path / "file"
    with pytest.raises(ConfigError, match="folded into weights, and this model has none"):
        SwapOptions.of_config(config)
    config.saw_int4 = {"order": 16}
    with pytest.raises(ConfigError, match=r"the section saw_int4 of the checkpoint's config.json is wrong: order"):
        SwapOptions.of_config(config)


def test_centers_and_frames_of_a_rank():
    center = np.arange(2 * 4 * 8, dtype=np.float64).reshape(2, 4, 8)
    k_frame, q_frame = np.random.default_rng(0).standard_normal((2, 2, 4, 8, 8))
    whole = {"k_center": center, "k_frame": k_frame, "q_frame": q_frame}
    options = SwapOptions(KVFormat("saw_int4", 64), **whole)
    for tp_size, heads in ((1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (8, [[r // 2] for r in range(8)])):
        for rank, local in enumerate(heads):
            found = options.local_constants(1, tp_size, rank)
            assert found.keys() == whole.keys()
            for name, part in found.items():
                assert (part.dtype, part.flags["C_CONTIGUOUS"]) == (np.float32, True)
                np.testing.assert_array_equal(part, whole[name][1, local].astype(np.float32))
    assert SwapOptions(KVFormat("saw_int4", 64)).local_constants(0, 1, 0) == {}


@pytest.mark.parametrize(("kv", "written"), [("saw_int4", (68, "INT8")), ("int4", (68, "INT8")), ("fp16", (128, None))])
def test_the_config_for_the_executor(kv, written):
    section = {"kv": kv, "head_dim": 128, "row_bytes": 256 if kv == "fp16" else 68}
    true = {"head_size": 128, "quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}
    config = for_executor(true | {"saw_int4": section})
    assert (config["head_size"], config["quantization"]["kv_cache_quant_algo"]) == written
    assert true["quantization"]["kv_cache_quant_algo"] is None
    limits = {"max_input_len": 1024, "max_seq_len": 128}
    whole = {"version": "1.2.1", "pretrained_config": config, "build_config": limits}
    assert as_built(whole) == {
        "version": "1.2.1",
        "pretrained_config": true,
        "build_config": {"max_input_len": 127, "max_seq_len": 128},
        "saw_int4": section,
    }
    assert whole["pretrained_config"] is config
    assert limits["max_input_len"] == 1024
    for other in ({}, {"saw_int4": section, "pretrained_config": config}, {"pretrained_config": true}):
        assert as_built(other) is other
