"""The swap in TensorRT-LLM's own definitions: its front-end's real source over a TensorRT that records networks."""

import importlib
import inspect
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import saw_trtllm.backends.tensorrt_llm
from saw_trtllm.backends.tensorrt_llm.options import SwapOptions
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint, shard
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.format import KVFormat
from saw_trtllm.model.rope import rotary_cos_sin
from saw_trtllm.plan.options import BuildOptions
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_frontend as fake_tensorrt_frontend
from tests.support.fakes import tensorrt_llm as fake_tensorrt_llm
from tests.support.fakes.tensorrt_execute import execute
from tests.support.models import LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE, make_hf_model
from tests.support.tolerance import EPS

pytestmark = [
    pytest.mark.skipif(fake_tensorrt_frontend.missing() is not None, reason=str(fake_tensorrt_frontend.missing())),
    pytest.mark.filterwarnings("ignore"),  # TensorRT-LLM's own
]

#: What TensorRT-LLM's executor feeds; an engine may have fewer of them, never more.
EXECUTOR_INPUTS = {
    *("input_ids", "position_ids", "last_token_ids", "sequence_length", "context_lengths", "host_context_lengths"),
    *("host_request_types", "host_past_key_value_lengths", "host_max_attention_window_sizes", "host_sink_token_length"),
    *("cache_indirection", "kv_cache_block_offsets", "host_kv_cache_block_offsets", "host_kv_cache_pool_pointers"),
    *("host_kv_cache_pool_mapping", "host_runtime_perf_knobs", "host_context_progress", "all_reduce_workspace"),
}
SAW_INPUTS = {
    *("input_ids", "position_ids", "last_token_ids", "sequence_length", "host_request_types"),
    *("host_max_attention_window_sizes", "kv_cache_block_offsets", "host_kv_cache_pool_pointers"),
    "host_kv_cache_pool_mapping",
}
WRITE, ATTENTION = "SawRotateQuantizeKV", "SawInt4PagedAttention"
MODEL_CLS_FILE = Path(saw_trtllm.backends.tensorrt_llm.__file__).parent / "model_cls.py"
CLASS_NAMES = {
    "llama": "SawLLaMAForCausalLM",
    "llama3": "SawLLaMAForCausalLM",
    "mistral": "SawMistralForCausalLM",
    "qwen2": "SawQWenForCausalLM",
    "qwen3": "SawQWenForCausalLM",
    "gemma2": "SawGemmaForCausalLM",
    "gemma3": "SawGemmaForCausalLM",
}
LIMITS = {"max_batch_size": 8, "max_num_tokens": 512}
PROMPTS = [[5, 17, 101, 3, 44, 90, 12, 66, 150, 7, 8, 21, 33, 2, 140, 61, 77, 9], [42, 1, 99]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hugging Face folders and models by family, with fp16 weights and computing in fp32."""
    made = {}

    def make(family, **overrides):
        key = (family, *sorted(overrides))
        if key not in made:
            folder = tmp_path_factory.mktemp("models")
            path, model = make_hf_model(folder, family, torch.float16, **overrides)
            made[key] = path, model.float()
        return made[key]

    return make


@pytest.fixture
def checkpoint(models, tmp_path):
    """A TensorRT-LLM checkpoint folder of a family, perhaps with a section saw_int4."""

    def make(family, tp_size=1, section=None, **changes):
        folder = tmp_path / "ckpt"
        save_checkpoint(Checkpoint.open(models(family)[0]), folder, tp_size)
        config = json.loads((folder / "config.json").read_text())
        if section is not None:
            config["saw_int4"] = section
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


def last_network():
    return fake_tensorrt.Builder.networks[-1]


def plugins(name, network=None):
    return fake_tensorrt.plugin_layers(network or last_network(), name)


def input_names(layer):
    return [t.name for t in layer._inputs]


def by_saw_build(frontend, models, checkpoint, tmp_path, family):
    options = BuildOptions(
        model_dir=models(family)[0], output_dir=tmp_path / "engine", backend="tensorrt_llm", **LIMITS
    )
    build(plan_build(options))


def by_trtllm_build(frontend, models, checkpoint, tmp_path, family, *flags, **kwargs):
    flags = [*(f"--{name}={value}" for name, value in LIMITS.items()), "--max_seq_len=128", *flags]
    flags += ["--model_cls_file", MODEL_CLS_FILE, "--model_cls_name", CLASS_NAMES[family]]
    flags += ["--output_timing_cache", tmp_path / "model.cache"]
    folder = checkpoint(family, **kwargs)
    frontend.trtllm_build("--checkpoint_dir", folder, "--output_dir", tmp_path / "engine", *flags)
    return folder


def stock_model(frontend, folder):
    from tensorrt_llm.models import PretrainedConfig

    config = PretrainedConfig.from_json_file(str(folder / "config.json"))
    return frontend.models.MODEL_MAP[config.architecture].from_checkpoint(str(folder), config=config)


def by_swap(frontend, models, checkpoint, tmp_path, family, rewrite=False, **options):
    from tensorrt_llm.builder import BuildConfig

    from saw_trtllm.backends.tensorrt_llm.model import swap

    model = stock_model(frontend, checkpoint(family))
    config = Checkpoint.open(models(family)[0]).config
    options = {
        "kv_format": KVFormat("saw_int4", config.head_size, "float16"),
        "windows": config.sliding_window,
    } | options
    swap(model, SwapOptions(**options), rewrite)
    cache = str(tmp_path / "model.cache")
    engine = frontend.builder.build(model, BuildConfig(max_seq_len=128, output_timing_cache=cache, **LIMITS))
    engine.save(str(tmp_path / "engine"))


def by_rewriting(*args):
    by_swap(*args, rewrite=True)


WAYS = [by_saw_build, by_trtllm_build, by_swap, by_rewriting]


def prefill_logits():
    """Logits of the last token of each of PROMPTS, from the network that was built last."""
    lengths = torch.tensor([len(p) for p in PROMPTS])
    layers = len(plugins(WRITE))
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
    return execute(last_network(), inputs)["logits"]


def expected_logits(model):
    with torch.no_grad():
        return torch.stack([model(torch.tensor([p])).logits[0, -1] for p in PROMPTS])


def assert_same_model(model):
    got, want = prefill_logits(), expected_logits(model)
    vocab = want.shape[-1]
    # Weights that were folded are rounded to fp16 once more.
    assert (got[:, :vocab] - want).abs().max() < 0.005 * want.std()


# The networks


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", CLASS_NAMES)
def test_every_way_swaps_every_family(frontend, models, checkpoint, tmp_path, family, way):
    way(frontend, models, checkpoint, tmp_path, family)
    network = last_network()
    assert fake_tensorrt.plugin_layers(network, "GPTAttention") == []
    writes, attentions = plugins(WRITE), plugins(ATTENTION)
    config = Checkpoint.open(models(family)[0]).config
    assert len(writes) == len(attentions) == config.num_hidden_layers
    names = {t.name for t in network._inputs}
    assert names <= EXECUTOR_INPUTS
    assert names == SAW_INPUTS if way is not by_rewriting else names >= SAW_INPUTS
    assert [t.name for t in network._outputs] == ["logits"]
    for i, (write, attention) in enumerate(zip(writes, attentions, strict=True)):
        step = ["last_token_ids", "sequence_length", "kv_cache_block_offsets"]
        pool = ["host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping"]
        assert input_names(write)[1:7] == ["position_ids", *step, *pool]
        assert [t.producer for t in attention._inputs[:4]] == [write] * 4
        assert input_names(attention)[4:] == [
            *("host_request_types", *step, *pool, "host_max_attention_window_sizes"),
        ]
        fmt = KVFormat("saw_int4", config.head_size)
        common = {
            "layer_idx": i,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_size,
            "tokens_per_block": 32,
            "dtype": "float16",
            "kv": "saw_int4",
        }
        unfolded = int(way in (by_swap, by_rewriting))
        assert write.plugin.fields == common | {
            "hadamard_order": fmt.hadamard_order,
            "rotate_v": unfolded,
            "range_factor": pytest.approx(fmt.range_factor),
            "use_k_center": 0,
            "use_k_frame": 0,
            "use_q_frame": 0,
        }
        assert attention.plugin.fields == common | {
            "softmax_scale": pytest.approx(config.softmax_scale),
            "softcap": config.attn_logit_softcapping or 0.0,
            "window": config.window(i) or 0,
            "use_sinks": 0,
        }
    assert_same_model(models(family)[1])


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, LINEAR_ROPE, YARN_ROPE], ids=lambda r: r["rope_type"])
def test_rope_tables_are_ours(frontend, models, checkpoint, tmp_path, rope):
    folder, model = models("llama", rope_parameters=rope, max_position_embeddings=256)
    build(plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", backend="tensorrt_llm", **LIMITS)))
    table = plugins(WRITE)[0]._inputs[7].producer.weights.numpy()
    ours = rotary_cos_sin(Checkpoint.open(folder).config, 256)
    np.testing.assert_allclose(table.reshape(ours.shape), ours, rtol=0, atol=2 * 256 * EPS)
    assert_same_model(model)


def test_the_epsilon_of_a_qk_norm_is_the_checkpoints(frontend, models, checkpoint, tmp_path):
    folder, model = models("qwen3", rms_norm_eps=0.3)
    build(plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", backend="tensorrt_llm", **LIMITS)))
    assert_same_model(model)


def test_a_calibration_centres_and_smooths(frontend, models, tmp_path):
    for family in ("llama", "qwen3"):
        folder, model = models(family)
        windows = torch.randint(0, 203, (4, 64), generator=torch.Generator().manual_seed(0))
        calibration = calibrate(Checkpoint.open(folder), windows)
        calibration.save(tmp_path / "calibration.safetensors")
        options = {"calibration": tmp_path / "calibration.safetensors", "output_dir": tmp_path / "engine"}
        build(plan_build(BuildOptions(model_dir=folder, backend="tensorrt_llm", **options, **LIMITS)))
        for i, write in enumerate(plugins(WRITE)):
            assert write.plugin.fields["use_k_center"] == 1
            np.testing.assert_array_equal(
                write._inputs[8].producer.weights.numpy().reshape(2, -1), calibration.k_center[i]
            )
        assert_same_model(model)
        assert EngineConfig.load(tmp_path / "engine").saw_int4.k_center


@pytest.mark.parametrize("kv", ["int4", "fp16"])
def test_the_other_caches(frontend, models, tmp_path, kv):
    folder, model = models("llama")
    options = {"model_dir": folder, "kv": kv, "output_dir": tmp_path / "engine", "backend": "tensorrt_llm"}
    build(plan_build(BuildOptions(**options, **LIMITS)))
    fields = plugins(WRITE)[0].plugin.fields
    assert (fields["kv"], fields["hadamard_order"]) == (kv, 1)
    assert_same_model(model)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())["pretrained_config"]
    written = (config["head_size"], config["quantization"]["kv_cache_quant_algo"])
    assert written == ((36, "INT8") if kv == "int4" else (64, None))
    assert EngineConfig.load(tmp_path / "engine").kv_format == KVFormat(kv, 64)


@pytest.mark.parametrize("rewrite", [False, True])
def test_bfloat16(frontend, models, checkpoint, tmp_path, rewrite):
    folder = models("qwen3")[0]
    if rewrite:
        save_checkpoint(Checkpoint.open(folder), tmp_path / "bf16", dtype="bfloat16")
        by_swap(frontend, models, lambda family: tmp_path / "bf16", tmp_path, "qwen3", rewrite=True)
    else:
        options = {"model_dir": folder, "dtype": "bfloat16", "output_dir": tmp_path / "engine", **LIMITS}
        build(plan_build(BuildOptions(backend="tensorrt_llm", **options)))
    for layer in plugins(WRITE) + plugins(ATTENTION):
        assert layer.plugin.fields["dtype"] == "bfloat16"
        assert layer.get_output(0).dtype == fake_tensorrt.bfloat16
    assert EngineConfig.load(tmp_path / "engine").pretrained_config.dtype == "bfloat16"


# Ranks


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_each_rank_has_its_heads(frontend, models, checkpoint, tmp_path, family, tp_size):
    source = Checkpoint.open(models(family)[0])
    windows = torch.randint(0, 203, (4, 64), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(source, windows)
    calibration.save(tmp_path / "calibration.safetensors")
    section = {"calibration": str(tmp_path / "calibration.safetensors"), "range_factor": 0.5}
    folder = by_trtllm_build(frontend, models, checkpoint, tmp_path, family, tp_size=tp_size, section=section)
    options = {"checkpoint_dir": folder, "calibration": tmp_path / "calibration.safetensors", "range_factor": 0.5}
    plan = plan_build(BuildOptions(backend="tensorrt_llm", **options))
    heads, kv_heads = 8 // tp_size, max(1, 2 // tp_size)
    for rank, network in enumerate(list(fake_tensorrt.Builder.networks)[-tp_size:]):
        assert (tmp_path / "engine" / f"rank{rank}.engine").is_file()
        for i, (write, attention) in enumerate(zip(plugins(WRITE, network), plugins(ATTENTION, network), strict=True)):
            for fields in (write.plugin.fields, attention.plugin.fields):
                assert (fields["layer_idx"], fields["num_heads"], fields["num_kv_heads"]) == (i, heads, kv_heads)
            first = rank * 2 // tp_size
            center = write._inputs[8].producer.weights.numpy().reshape(kv_heads, -1)
            np.testing.assert_array_equal(center, calibration.k_center[i, first : first + kv_heads])
            assert write.plugin.fields["range_factor"] == 0.5
        for kind in ("qkv.weight", "dense.weight"):
            name = f"transformer.layers.1.attention.{kind}"
            ours = shard(name, plan.weights.load(name), plan.config.pretrained_config, tp_size, rank)
            theirs = network.weights_names[name].numpy()
            # TensorRT-LLM may hold a weight transposed.
            assert any(np.array_equal(theirs, w.reshape(-1)) for w in (ours, ours.T))


def test_an_engine_that_gathers_context_logits_has_last_token_ids(frontend, models, checkpoint, tmp_path):
    by_trtllm_build(frontend, models, checkpoint, tmp_path, "llama", "--gather_context_logits")
    assert {t.name for t in last_network()._inputs} == SAW_INPUTS
    logits = prefill_logits()
    ends = torch.tensor([len(p) for p in PROMPTS]).cumsum(0) - 1
    want = expected_logits(models("llama")[1])
    assert logits.shape[0] == sum(map(len, PROMPTS))
    assert (logits[ends, :203] - want).abs().max() < 0.005 * want.std()


# The engine's config


@pytest.mark.parametrize("way", WAYS)
def test_the_executor_reads_the_row_size_and_we_the_truth(frontend, models, checkpoint, tmp_path, way):
    way(frontend, models, checkpoint, tmp_path, "qwen3")
    engine = tmp_path / "engine"
    config = json.loads((engine / "config.json").read_text())
    pretrained, limits = config["pretrained_config"], config["build_config"]
    assert (pretrained["head_size"], pretrained["quantization"]["kv_cache_quant_algo"]) == (36, "INT8")
    assert pretrained["saw_int4"]["head_dim"] == 64
    assert pretrained["rotary_embedding_dim"] == 64
    assert limits["plugin_config"]["gpt_attention_plugin"] is not None
    needed = {"max_batch_size", "max_beam_width", "max_input_len", "max_seq_len", "max_num_tokens", "kv_cache_type"}
    assert needed | {"speculative_decoding_mode", "lora_config"} <= limits.keys()
    switches = {k: limits["plugin_config"][k] for k in ("remove_input_padding", "paged_kv_cache", "context_fmha")}
    assert set(switches.values()) == {True}
    assert limits["plugin_config"]["use_paged_context_fmha"] is True
    ours = EngineConfig.load(engine)
    assert ours.kv_format == KVFormat("saw_int4", 64)
    assert ours.pretrained_config.head_size == 64
    assert ours.pretrained_config.quantization["kv_cache_quant_algo"] is None
    assert ours.saw_int4.backend == "tensorrt_llm"
    assert (ours.saw_int4.plugin_version, ours.saw_int4.tensorrt_version) == ("1", fake_tensorrt.__version__)
    theirs = frontend.builder.EngineConfig.from_json_file(str(engine / "config.json"))
    assert theirs.pretrained_config.head_size == 36
    assert theirs.pretrained_config.quant_mode.has_int8_kv_cache()


def test_a_model_keeps_its_true_config(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.models import SawLLaMAForCausalLM

    model = SawLLaMAForCausalLM.from_checkpoint(str(checkpoint("llama")))
    assert model.config.head_size == 64
    assert model.config.quantization.kv_cache_quant_algo is None
    with pytest.raises(ConfigError, match="a swapped model is no checkpoint to write to there: save the model before"):
        model.save_checkpoint("there")


def test_saw_build_leaves_an_engine_folder(frontend, models, checkpoint, tmp_path):
    seen = []
    plan = plan_build(
        BuildOptions(
            checkpoint_dir=checkpoint("llama", tp_size=2), output_dir=tmp_path / "e", backend="tensorrt_llm", **LIMITS
        )
    )
    size = build(plan, seen.append)
    files = ["config.json", "generation_config.json", "rank0.engine", "rank1.engine"]
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == files
    assert size == sum((tmp_path / "e" / f"rank{r}.engine").stat().st_size for r in range(2))
    assert len(seen) == plan.num_steps
    assert (
        json.loads((tmp_path / "e" / "config.json").read_text())["build_config"]["output_timing_cache"] == "model.cache"
    )


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_beam_width=2"], "beam width 2 .* give --max_beam_width 1$"),
        (["--lora_plugin=auto", "--lora_target_modules=attn_qkv"], "LoRA .* give --lora_plugin disable$"),
        (
            ["--speculative_decoding_mode=draft_tokens_external", "--max_draft_len=4"],
            "speculative decoding .* leave out --speculative_decoding_mode and --max_draft_len$",
        ),
        (["--gpt_attention_plugin=disable"], "give --gpt_attention_plugin auto$"),
        (["--remove_input_padding=disable"], "give --remove_input_padding enable$"),
        (["--kv_cache_type=continuous"], "give --kv_cache_type paged$"),
        (["--use_paged_context_fmha=disable"], "give --use_paged_context_fmha enable$"),
        (["--tokens_per_block=8"], "tokens_per_block 8 .* give --tokens_per_block 16, 32, 64, 128$"),
        (["--max_seq_len=1024"], "max_seq_len 1024 is beyond the 256 positions .* lower --max_seq_len"),
        (["--model_cls_name=SawQWenForCausalLM"], "give --model_cls_name SawLLaMAForCausalLM$"),
    ],
    ids=lambda x: x[0].split("=")[0][2:] if isinstance(x, list) else "",
)
def test_rejections(frontend, models, checkpoint, tmp_path, flags, message):
    classes = ["--model_cls_file", MODEL_CLS_FILE, "--model_cls_name", "SawLLaMAForCausalLM", "--max_seq_len=128"]
    arguments = ["--checkpoint_dir", checkpoint("llama"), "--output_dir", tmp_path / "engine", *classes, *flags]
    with pytest.raises(ConfigError, match=message):
        frontend.trtllm_build(*arguments)
    assert list((tmp_path / "engine").iterdir()) == []


def test_fp8_context_attention_is_rejected(frontend, checkpoint):
    from saw_trtllm.backends.tensorrt_llm.checks import check_build

    model = stock_model(frontend, checkpoint("llama"))
    plugin_config = frontend.builder.PluginConfig(paged_kv_cache=True, dtype="float16")
    assert plugin_config.use_fp8_context_fmha  # what TensorRT-LLM's build leaves in an FP8 model
    with pytest.raises(ConfigError, match=r"FP8 context attention .* give --use_fp8_context_fmha disable$"):
        check_build(model.config, plugin_config, {"max_seq_len": 128})


def make_attention(cls=None, **changes):
    from tensorrt_llm.functional import AttentionMaskType, PositionEmbeddingType
    from tensorrt_llm.layers.attention import Attention

    arguments = {
        "local_layer_idx": 0,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "attention_head_size": 64,
        "dtype": "float16",
        "attention_mask_type": AttentionMaskType.causal,
        "position_embedding_type": PositionEmbeddingType.rope_gpt_neox,
    }
    return (cls or Attention)(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention": True}, "is a cross attention"),
        ({"position_embedding_type": "alibi"}, "position embedding alibi"),
        ({"rotary_embedding_percentage": 0.5}, "RoPE on 32 of 64 channels"),
        ({"attention_mask_type": "bidirectional"}, "the mask bidirectional"),
        ({"clip_qkv": 8.0}, "clipped Q, K and V"),
        ({"use_logn_scaling": True}, "logn scaling"),
        ({"num_attention_heads": 34, "num_kv_heads": 2, "hidden_size": 2176}, "at most 16 may share one"),
    ],
)
def test_attention_that_the_plugins_cannot_stand_in_for(frontend, changes, message):
    from tensorrt_llm.functional import AttentionMaskType, PositionEmbeddingType

    from saw_trtllm.backends.tensorrt_llm.checks import check_attention

    types = {"position_embedding_type": PositionEmbeddingType, "attention_mask_type": AttentionMaskType}
    changes = {k: types[k][v] if k in types else v for k, v in changes.items()}
    check_attention("layers.0.attention", make_attention())
    with pytest.raises(ConfigError, match=message):
        check_attention("layers.0.attention", make_attention(**changes))


def test_attentions_of_other_classes(frontend, checkpoint):
    from tensorrt_llm.layers.attention import Attention, DeepseekV2Attention

    from saw_trtllm.backends.tensorrt_llm.model import swap

    class OtherAttention(Attention):
        pass

    options = SwapOptions(KVFormat("saw_int4", 64))
    model = stock_model(frontend, checkpoint("llama"))
    model.transformer.layers[1].attention = make_attention(OtherAttention)
    with pytest.raises(ConfigError, match=r"layers.1.attention is OtherAttention, an attention that the swap does not"):
        swap(model, options)
    latent = DeepseekV2Attention.__new__(DeepseekV2Attention)
    frontend.builder.PretrainedModel.__mro__[1].__init__(latent)
    latent.kv_lora_rank = 512
    model.transformer.layers[1].attention = latent
    with pytest.raises(ConfigError, match=r"DeepseekV2Attention, a multi-head latent attention \(MLA\)"):
        swap(model, options)
    for layer in model.transformer.layers.children():
        layer._modules.pop("attention")
    with pytest.raises(ConfigError, match="the architecture LlamaForCausalLM is unknown to the swap"):
        swap(model, options)


def test_a_subclass_is_swapped_by_rewriting(frontend, models, checkpoint, tmp_path):
    from tensorrt_llm.builder import BuildConfig
    from tensorrt_llm.layers.attention import Attention

    from saw_trtllm.backends.tensorrt_llm.model import swap

    class OtherAttention(Attention):
        pass

    model = stock_model(frontend, checkpoint("llama"))
    for layer in model.transformer.layers.children():
        layer.attention.__class__ = OtherAttention
    swap(model, SwapOptions(KVFormat("saw_int4", 64)), rewrite=True)
    limits = {"max_seq_len": 128, "output_timing_cache": str(tmp_path / "model.cache"), **LIMITS}
    frontend.builder.build(model, BuildConfig(**limits))
    assert len(plugins(ATTENTION)) == 3
    assert plugins("GPTAttention") == []
    assert_same_model(models("llama")[1])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kv": "int5"}, "section saw_int4 of the checkpoint's config.json is wrong: kv"),
        ({"hadamard_order": 48}, "hadamard_order 48 does not fit head_dim 64"),
        ({"what": 1}, "wrong: what"),
    ],
)
def test_a_wrong_section(frontend, models, checkpoint, tmp_path, section, message):
    with pytest.raises(ConfigError, match=message):
        by_trtllm_build(frontend, models, checkpoint, tmp_path, "llama", section=section)


def test_what_saw_build_rejects(frontend, models, tmp_path):
    folder = models("llama")[0]
    options = {"model_dir": folder, "backend": "tensorrt_llm", "output_dir": tmp_path / "e", **LIMITS}
    with pytest.raises(ConfigError, match="kv_skip_layers was given, and TensorRT-LLM's executor has rows of one size"):
        plan_build(BuildOptions(kv_skip_layers="0", **options))
    with pytest.raises(ConfigError, match=r"the plugins compute in 16 bits: give --dtype float16$"):
        plan_build(BuildOptions(dtype="float32", **options))


def test_a_release_without_the_engine_backend(frontend, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_llm.builder", None)
    with pytest.raises(
        BackendUnavailableError, match=r"TensorRT-LLM 1.2.1 has no engine backend .* install 1\.2\.1, the"
    ):
        plan_build(BuildOptions(model_dir=models("llama")[0], backend="tensorrt_llm"))


# The stand-in that the tests without the source use


@pytest.mark.parametrize(("module", "name"), fake_tensorrt_llm.SIGNATURES)
def test_the_stand_in_has_tensorrt_llms_signatures(frontend, module, name):
    theirs = importlib.import_module(f"tensorrt_llm.{module}")
    for part in name.split("."):
        theirs = getattr(theirs, part)
    theirs = inspect.signature(theirs).parameters
    ours = {k: p for k, p in fake_tensorrt_llm.SIGNATURES[module, name].parameters.items() if k != "self"}
    wildcards = {k for k, p in ours.items() if p.kind is p.VAR_KEYWORD}
    assert ours.keys() - wildcards <= theirs.keys()
    for key, parameter in ours.items():
        if key not in wildcards:
            assert (parameter.kind is parameter.KEYWORD_ONLY) == (theirs[key].kind is parameter.KEYWORD_ONLY)
            assert parameter.default is parameter.empty or theirs[key].default is not parameter.empty


def test_the_stand_in_declares_tensorrt_llms_inputs(frontend, checkpoint, tmp_path):
    from tensorrt_llm.builder import BuildConfig

    cache = str(tmp_path / "model.cache")
    frontend.builder.build(
        stock_model(frontend, checkpoint("llama")), BuildConfig(max_seq_len=128, output_timing_cache=cache, **LIMITS)
    )
    described = lambda net: {t.name: (t.dtype, len(t.shape)) for t in net._inputs}  # noqa: E731
    theirs = described(last_network())
    (attention, *_) = plugins("GPTAttention")
    assert len(attention._inputs) == 17
    net = fake_tensorrt_llm.Network(fake_tensorrt.INetworkDefinition(), None)
    model = fake_tensorrt_llm.PretrainedModel(types.SimpleNamespace(num_hidden_layers=3))
    with fake_tensorrt_llm.net_guard(net):
        model.prepare_inputs(8, 128, 128, 512, True)
    assert described(net.trt_network) == theirs
