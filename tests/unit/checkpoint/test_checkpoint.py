"""Reading and splitting checkpoints, against transformers' own models and configs."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers.masking_utils import sliding_window_causal_mask_function

from saw_trtllm.checkpoint import NUMPY_DTYPES, Checkpoint, expected_shapes, save_checkpoint, shard, unshard
from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.config import ModelConfig
from tests.support.models import FAMILIES, LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE, make_hf_model

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | changes).items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(config))


def bits(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """Bytes of a tensor, to compare dtypes that NumPy and torch do not share."""
    if isinstance(array, torch.Tensor):
        return array.detach().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).view(np.uint8)


def hugging_face_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold, from the live modules, by TensorRT-LLM's names."""
    tensors = {"transformer.vocab_embedding.weight": model.model.embed_tokens.weight}
    for i, layer in enumerate(model.model.layers):
        attention, mlp, prefix = layer.self_attn, layer.mlp, f"transformer.layers.{i}."
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        tensors[prefix + "input_layernorm.weight"] = layer.input_layernorm.weight
        tensors[prefix + "attention.qkv.weight"] = torch.cat([p.weight for p in qkv])
        if attention.q_proj.bias is not None:
            tensors[prefix + "attention.qkv.bias"] = torch.cat([p.bias for p in qkv])
        if hasattr(attention, "q_norm"):
            tensors[prefix + "attention.q_layernorm.weight"] = attention.q_norm.weight
            tensors[prefix + "attention.k_layernorm.weight"] = attention.k_norm.weight
        tensors[prefix + "attention.dense.weight"] = attention.o_proj.weight
        tensors[prefix + "post_layernorm.weight"] = layer.post_attention_layernorm.weight
        tensors[prefix + "mlp.fc.weight"] = mlp.gate_proj.weight
        tensors[prefix + "mlp.gate.weight"] = mlp.up_proj.weight
        tensors[prefix + "mlp.proj.weight"] = mlp.down_proj.weight
        if hasattr(layer, "pre_feedforward_layernorm"):
            tensors[prefix + "pre_feedforward_layernorm.weight"] = layer.pre_feedforward_layernorm.weight
            tensors[prefix + "post_feedforward_layernorm.weight"] = layer.post_feedforward_layernorm.weight
    tensors["transformer.ln_f.weight"] = model.model.norm.weight
    tensors["lm_head.weight"] = model.lm_head.weight
    if model.config.model_type.startswith("gemma"):  # whose norms multiply by 1 + w, in float32
        norms = [name for name in tensors if name.endswith(("layernorm.weight", "ln_f.weight"))]
        tensors |= {name: 1 + tensors[name].float() for name in norms}
    return tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder to copy and damage."""
    return make_hf_model(tmp_path_factory.mktemp("model"), "llama", max_shard_size="300KB")[0]


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "broken"))


# Hugging Face folders


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_the_model(tmp_path, family, dtype):
    folder, model = make_hf_model(tmp_path, family, TORCH_DTYPES[dtype])
    ckpt = Checkpoint.open(folder)
    expected = hugging_face_tensors(model)
    assert ckpt.names() == list(expected)
    for name, tensor in expected.items():
        loaded = ckpt.load(name)
        assert loaded.dtype == NUMPY_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        assert loaded.shape == ckpt.shape(name) == tuple(tensor.shape)
        np.testing.assert_array_equal(bits(loaded), bits(tensor), err_msg=name)
    assert ckpt.num_parameters() == model.num_parameters()
    assert ckpt.nbytes() == model.num_parameters() * NUMPY_DTYPES[dtype].itemsize
    assert ckpt.nbytes("float16") == 2 * model.num_parameters()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_index_and_tying(tmp_path, family, tied):
    folder, model = make_hf_model(tmp_path, family, max_shard_size="200KB", tie_word_embeddings=tied)
    assert (folder / "model.safetensors.index.json").exists()
    ckpt = Checkpoint.open(folder)
    assert ckpt.config.share_embedding_table is tied
    for name, tensor in hugging_face_tensors(model).items():
        np.testing.assert_array_equal(ckpt.load(name), tensor.detach().numpy(), err_msg=name)
    layer = ckpt.layer(1)
    assert list(layer) == [name for name in ckpt.names() if ".layers.1." in name]
    np.testing.assert_array_equal(
        layer["transformer.layers.1.mlp.proj.weight"], model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    )


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_config(tmp_path, family, head_dim):
    folder, model = make_hf_model(tmp_path, family, torch.bfloat16, head_dim=head_dim, rms_norm_eps=1e-4)
    config, hf = Checkpoint.open(folder).config, model.config
    assert config.architecture == hf.architectures[0] == type(model).__name__
    assert config.dtype == "bfloat16"
    assert config.head_size == head_dim
    assert config.norm_epsilon == hf.rms_norm_eps == 1e-4
    rope = hf.rope_parameters.get("full_attention", hf.rope_parameters)
    assert config.rotary_base == rope["rope_theta"]
    assert config.rope_local_base_freq == (500.0 if family == "gemma3" else None)
    assert config.attn_bias is (family == "qwen2")
    assert config.qk_layernorm is (family in ("qwen3", "gemma3"))
    windows = {"mistral": [12] * 3, "gemma2": [12, None, 12], "gemma3": [12, None, 12]}
    assert config.sliding_window == windows.get(family)
    for key in (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    ):
        assert getattr(config, key) == getattr(hf, key), key


@pytest.mark.parametrize(
    "written",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": LINEAR_ROPE},
        {"rope_parameters": YARN_ROPE | {"beta_fast": 16, "mscale": 0.7, "mscale_all_dim": 0.7, "truncate": False}},
        {"rope_parameters": YARN_ROPE, "original_max_position_embeddings": 32},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {},
    ],
    ids=str,
)
def test_rope_is_read_as_transformers_reads_it(broken, written):
    edit_config(broken, drop=("rope_parameters",) if "rope_parameters" not in written else (), **written)
    hf = transformers.AutoConfig.from_pretrained(broken)
    transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)  # completes rope_parameters
    oracle = dict(hf.rope_parameters)
    oracle.pop("type", None)
    config = Checkpoint.open(broken).config
    assert config.rotary_base == oracle.pop("rope_theta")
    assert config.rotary_scaling == (None if oracle["rope_type"] == "default" else oracle)


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 7}, [7, 7, 7]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, [None, None, 9]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, [9, 9, 9]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 28}, None),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, None),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [5, None, 5],
        ),
    ],
    ids=str,
)
def test_sliding_window(tmp_path, family, fields, expected):
    folder, model = make_hf_model(tmp_path, family, **fields)
    assert Checkpoint.open(folder).config.sliding_window == expected
    if family != "mistral":
        oracle = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
        assert oracle == (expected or [None] * 3)
        edit_config(folder, drop=("layer_types",) if "layer_types" not in fields else ())  # as older releases save it
        assert Checkpoint.open(folder).config.sliding_window == expected


def test_sliding_window_counts_the_current_token():
    mask = sliding_window_causal_mask_function(5)
    assert [k for k in range(20) if mask(0, 0, torch.tensor(10), torch.tensor(k))] == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("same", [True, False])
def test_tied_head_that_is_stored_is_tied_only_if_equal(tmp_path, same):
    folder, model = make_hf_model(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 0.0 if same else 1.0
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.detach().numpy()
    ckpt = Checkpoint.open(folder)
    assert ckpt.config.share_embedding_table is same
    np.testing.assert_array_equal(ckpt.load("lm_head.weight"), oracle)
    assert ckpt.num_parameters() == model.num_parameters() + (0 if same else head.size)


def test_dtype_is_that_of_the_weights_where_the_config_names_none(broken):
    edit_config(broken, drop=("dtype",))
    assert Checkpoint.open(broken).config.dtype == "float32"
    edit_config(broken, torch_dtype="float16")
    assert Checkpoint.open(broken).config.dtype == "float16"


# Splitting


def small_config(heads: int = 8, kv_heads: int = 2, vocab: int = 203, **fields) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen2ForCausalLM",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=6,
        intermediate_size=48,
        vocab_size=vocab,
        max_position_embeddings=64,
        attn_bias=True,
        qk_layernorm=True,
        **fields,
    )


@settings(deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from([1, 3, 4]),
    tp_size=st.sampled_from([1, 2, 4, 8]),
    vocab=st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
def test_unshard_inverts_shard(kv_heads, group, tp_size, vocab, seed):
    heads = kv_heads * group
    if heads % tp_size:
        heads *= tp_size
    config = small_config(heads, kv_heads, vocab)
    rng = np.random.default_rng(seed)
    for name, shape in expected_shapes(config).items():
        whole = rng.standard_normal(shape, np.float32)
        shards = [shard(name, whole, config, tp_size, rank) for rank in range(tp_size)]
        assert len({s.shape for s in shards}) == 1, name
        np.testing.assert_array_equal(unshard(name, shards, config), whole, err_msg=name)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"), [(8, 8, 4), (8, 4, 2), (8, 2, 2), (8, 2, 4), (8, 2, 8), (8, 1, 4), (16, 4, 8)]
)
def test_each_rank_has_the_kv_heads_of_its_queries(heads, kv_heads, tp_size):
    config = small_config(heads, kv_heads)
    D = config.head_size
    head_ids = np.concatenate([np.arange(heads), 100 + np.arange(kv_heads), 200 + np.arange(kv_heads)])
    bias = np.repeat(head_ids, D).astype(np.float32)
    seen = []
    for rank in range(tp_size):
        local = shard("transformer.layers.1.attention.qkv.bias", bias, config, tp_size, rank).reshape(-1, D)[:, 0]
        local_heads = heads // tp_size
        local_kv = (len(local) - local_heads) // 2
        q, k, v = np.split(local, [local_heads, local_heads + local_kv])
        group = local_heads // local_kv
        for j, head in enumerate(q):
            assert k[j // group] == 100 + head // (heads // kv_heads)
            assert v[j // group] == 200 + head // (heads // kv_heads)
        seen += list(q)
    assert seen == list(range(heads))


def test_sharded_matmuls_give_the_whole_layer():
    """Column- and row-parallel parts, summed over ranks, are the MLP of the whole weights."""
    config, rng, tp_size = small_config(), np.random.default_rng(0), 4
    w = {name: rng.standard_normal(shape) for name, shape in expected_shapes(config).items()}
    x = rng.standard_normal((5, config.hidden_size))
    prefix = "transformer.layers.0.mlp."

    def mlp(part):
        fc, gate, proj = (part(prefix + kind + ".weight") for kind in ("fc", "gate", "proj"))
        return (np.maximum(x @ fc.T, 0) * (x @ gate.T)) @ proj.T

    summed = sum(mlp(lambda name, r=rank: shard(name, w[name], config, tp_size, r)) for rank in range(tp_size))
    np.testing.assert_allclose(summed, mlp(w.__getitem__), rtol=1e-10)


# TensorRT-LLM folders


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, tp_size):
    folder, _ = make_hf_model(tmp_path, family, torch.bfloat16)
    direct = Checkpoint.open(folder)
    out = tmp_path / "ckpt"
    written = save_checkpoint(direct, out, tp_size)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        *(f"rank{r}.safetensors" for r in range(tp_size)),
    ]
    assert written == sum(p.stat().st_size for p in out.iterdir() if p.name != "generation_config.json")
    ckpt = Checkpoint.open(out)
    assert ckpt.config.mapping.tp_size == ckpt.config.mapping.world_size == tp_size
    ignored = {"mapping", *(ckpt.config.model_extra or {})}
    assert ckpt.config.model_dump(exclude=ignored) == direct.config.model_dump(exclude=ignored)
    assert ckpt.names() == direct.names()
    for name in direct.names():
        whole = direct.load(name).astype(
            NUMPY_DTYPES["bfloat16"]
        )  # a Gemma's 1 + w is rounded once, as TensorRT-LLM has it
        np.testing.assert_array_equal(bits(ckpt.load(name)), bits(whole), err_msg=name)
    assert ckpt.nbytes() == direct.nbytes()


def test_rank_files_are_what_tensorrt_llm_asks_for(tmp_path):
    """Per-rank names and shapes, spelled out from TensorRT-LLM's layer definitions for two ranks."""
    folder, _ = make_hf_model(tmp_path, "qwen2")
    out = tmp_path / "ckpt"
    save_checkpoint(Checkpoint.open(folder), out, 2, "float16")
    for rank in range(2):
        tensors = load_file(out / f"rank{rank}.safetensors")
        assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
        shapes = {name: t.shape for name, t in tensors.items() if ".layers." not in name or ".layers.2." in name}
        assert shapes == {
            "transformer.vocab_embedding.weight": (203, 96),
            "transformer.layers.2.input_layernorm.weight": (96,),
            "transformer.layers.2.attention.qkv.weight": ((4 + 2) * 64, 96),
            "transformer.layers.2.attention.qkv.bias": ((4 + 2) * 64,),
            "transformer.layers.2.attention.dense.weight": (96, 4 * 64),
            "transformer.layers.2.post_layernorm.weight": (96,),
            "transformer.layers.2.mlp.fc.weight": (80, 96),
            "transformer.layers.2.mlp.gate.weight": (80, 96),
            "transformer.layers.2.mlp.proj.weight": (96, 80),
            "transformer.ln_f.weight": (96,),
            "lm_head.weight": (102, 96),
        }
    assert not load_file(out / "rank1.safetensors")["lm_head.weight"][-1].any()
    config = json.loads((out / "config.json").read_text())
    assert config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert config["dtype"] == "float16"
    assert (config["qwen_type"], config["seq_length"]) == ("qwen2", 8192)


def test_resharding(tmp_path):
    folder, _ = make_hf_model(tmp_path, "llama3")
    save_checkpoint(Checkpoint.open(folder), tmp_path / "one", 1)
    save_checkpoint(Checkpoint.open(folder), tmp_path / "four", 4)
    save_checkpoint(Checkpoint.open(tmp_path / "four"), tmp_path / "back", 1)
    one, back = tmp_path / "one", tmp_path / "back"
    assert (back / "rank0.safetensors").read_bytes() == (one / "rank0.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((one / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"architecture": "MistralForCausalLM"}, {"architecture": "MistralForCausalLM"}),
        ("qwen2", {"architecture": "QWenForCausalLM"}, {"architecture": "Qwen2ForCausalLM", "attn_bias": True}),
        # TensorRT-LLM leaves qk_layernorm false for Qwen3, and goes by qwen_type.
        ("qwen3", {"qk_layernorm": False}, {"architecture": "Qwen3ForCausalLM", "qk_layernorm": True}),
        ("llama", {"share_embedding_table": None, "tie_word_embeddings": False}, {"share_embedding_table": False}),
        ("llama", {"rotary_scaling": {"type": "linear", "factor": 2.0}}, {"rotary_scaling": "linear"}),
        ("llama", {"rotary_scaling": {"type": "llama3"}}, {"rotary_scaling": "llama3"}),
        ("llama", {"moe": {"num_experts": 0, "top_k": 0}, "num_key_value_heads": 2}, {}),
        ("llama", {"quantization": {"quant_algo": None, "group_size": 128}}, {}),
    ],
    ids=str,
)
def test_configs_that_tensorrt_llm_writes(tmp_path, family, changes, expected):
    folder, _ = make_hf_model(tmp_path, family)
    save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt")
    edit_config(tmp_path / "ckpt", drop=tuple(k for k, v in changes.items() if v is None), **changes)
    config = Checkpoint.open(tmp_path / "ckpt").config
    got = config.model_dump() | {"rotary_scaling": (config.rotary_scaling or {}).get("rope_type")}
    assert {key: got[key] for key in expected} == expected


def test_every_key_that_tensorrt_llm_writes_for_llama(tmp_path):
    """The keys of its 1.2 Llama config's ``to_dict``, values as its own conversion of such a model sets them."""
    folder, model = make_hf_model(tmp_path, "llama3")
    out = tmp_path / "ckpt"
    save_checkpoint(Checkpoint.open(folder), out, 2)
    ours = json.loads((out / "config.json").read_text())
    shared = ("architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "intermediate_size", "max_position_embeddings", "head_size", "rotary_base")
    theirs = {key: ours[key] for key in shared} | {
        "hidden_act": "silu",
        "logits_dtype": "float32",
        "norm_epsilon": 1e-06,
        "runtime_defaults": None,
        "position_embedding_type": "rope_gpt_neox",
        "mapping": {
            "world_size": 2,
            "gpus_per_node": 8,
            "cp_size": 1,
            "tp_size": 2,
            "pp_size": 1,
            "moe_tp_size": 2,
            "moe_ep_size": 1,
            "auto_parallel": False,
        },
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "has_zero_point": False,
            "exclude_modules": None,
        },
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "qk_layernorm": False,
        "rotary_embedding_dim": 128,
        "mlp_bias": False,
        "attn_bias": False,
        "rotary_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
        "remove_duplicated_kv_heads": False,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "layer_idx_offset": 0,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "output_multiplier_scale": 1.0,
        "has_partial_lora_mask": False,
        "tie_word_embeddings": False,
    }
    (out / "config.json").write_text(json.dumps(theirs))
    ckpt = Checkpoint.open(out)
    fields = set(ModelConfig.model_fields) - {"mapping", "quantization"}
    assert ckpt.config.model_dump(include=fields) == Checkpoint.open(folder).config.model_dump(include=fields)
    np.testing.assert_array_equal(ckpt.load("lm_head.weight"), model.lm_head.weight.detach().numpy())


def test_lm_head_may_be_left_out(tmp_path):
    folder, model = make_hf_model(tmp_path, "qwen3", tie_word_embeddings=True)
    save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt", 2)
    for rank in range(2):
        path = tmp_path / "ckpt" / f"rank{rank}.safetensors"
        tensors = load_file(path)
        del tensors["lm_head.weight"]
        save_file(tensors, path)
    edit_config(tmp_path / "ckpt", drop=("share_embedding_table", "tie_word_embeddings"))
    ckpt = Checkpoint.open(tmp_path / "ckpt")
    assert ckpt.config.share_embedding_table
    np.testing.assert_array_equal(ckpt.load("lm_head.weight"), model.lm_head.weight.detach().numpy())


@pytest.mark.parametrize("dim", [0, 1])
def test_embedding_may_be_split(tmp_path, dim):
    folder, model = make_hf_model(tmp_path, "llama", vocab_size=200)
    save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt", 2)
    name = "transformer.vocab_embedding.weight"
    for rank in range(2):
        path = tmp_path / "ckpt" / f"rank{rank}.safetensors"
        tensors = load_file(path)
        save_file(tensors | {name: np.ascontiguousarray(np.split(tensors[name], 2, axis=dim)[rank])}, path)
    edit_config(tmp_path / "ckpt", use_parallel_embedding=True, embedding_sharding_dim=dim)
    ckpt = Checkpoint.open(tmp_path / "ckpt")
    np.testing.assert_array_equal(ckpt.load(name), model.model.embed_tokens.weight.detach().numpy())
    save_checkpoint(ckpt, tmp_path / "whole", 2)
    assert load_file(tmp_path / "whole" / "rank1.safetensors")[name].shape == ckpt.shape(name)
    np.testing.assert_array_equal(Checkpoint.open(tmp_path / "whole").load(name), ckpt.load(name))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conversion_rounds_to_nearest(tmp_path, dtype):
    folder, model = make_hf_model(tmp_path, "llama")
    save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt", dtype=dtype)
    ckpt = Checkpoint.open(tmp_path / "ckpt")
    assert ckpt.config.dtype == dtype
    for name, tensor in hugging_face_tensors(model).items():
        np.testing.assert_array_equal(bits(ckpt.load(name)), bits(tensor.to(TORCH_DTYPES[dtype])), err_msg=name)


# Memory


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_conversion_needs_about_a_layer(tmp_path, tp_size, dtype):
    folder, _ = make_hf_model(tmp_path, "llama", num_hidden_layers=12, hidden_size=256, intermediate_size=512)
    ckpt = Checkpoint.open(folder)
    layer = sum(a.nbytes for a in ckpt.layer(0).values())
    assert ckpt.nbytes() > 12 * layer
    tracemalloc.start()
    save_checkpoint(ckpt, tmp_path / "ckpt", tp_size, dtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * layer


@pytest.mark.parametrize("tp_size", [0, 1, 2])
def test_loading_needs_about_a_layer_above_the_result(tmp_path, tp_size):
    """``tp_size`` 0 stands for the Hugging Face folder."""
    folder, _ = make_hf_model(tmp_path, "llama", num_hidden_layers=8, hidden_size=256, intermediate_size=512)
    if tp_size:
        save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt", tp_size)
        folder = tmp_path / "ckpt"
    tracemalloc.start()
    ckpt = Checkpoint.open(folder)
    opened = tracemalloc.get_traced_memory()[1]
    result = {name: ckpt.load(name) for name in ckpt.names()}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layer = sum(a.nbytes for name, a in result.items() if ".layers.0." in name)
    assert opened < layer
    assert peak < ckpt.nbytes() + 1.5 * layer


# What cannot work


def open_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as e:
        Checkpoint.open(folder)
    message = str(e.value)
    assert "\n" not in message
    return message


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_missing_folder(tmp_path):
    assert str(tmp_path / "nowhere") in open_error(tmp_path / "nowhere")


def test_missing_config(broken):
    (broken / "config.json").unlink()
    assert "config.json" in open_error(broken)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "\xff"])
def test_config_that_is_none(broken, text):
    (broken / "config.json").write_bytes(text.encode("latin-1"))
    assert str(broken / "config.json") in open_error(broken)


def test_no_weights(broken):
    for path in broken.glob("model*"):
        path.unlink()
    assert "neither model.safetensors nor" in open_error(broken)
    (broken / "pytorch_model.bin").touch()
    message = open_error(broken)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(broken, keep):
    path = first_shard(broken)
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in open_error(broken)


def test_file_that_is_something_else(broken):
    path = first_shard(broken)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n")
    assert str(path) in open_error(broken)


def test_index_that_names_a_missing_file(broken):
    path = first_shard(broken)
    path.unlink()
    assert path.name in open_error(broken)


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"model.norm.weight": 3}}])
def test_index_without_weight_map(broken, index):
    path = broken / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert str(path) in open_error(broken)


def test_index_that_names_the_wrong_file(broken):
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = other
    path.write_text(json.dumps(index))
    message = open_error(broken)
    assert "model.norm.weight" in message
    assert other in message


def test_missing_tensor(broken):
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    path.write_text(json.dumps(index))
    assert "model.layers.1.mlp.up_proj.weight" in open_error(broken)


def test_wrong_shape(broken):
    edit_config(broken, vocab_size=204)
    message = open_error(broken)
    assert "model.embed_tokens.weight" in message
    assert "[203, 96]" in message
    assert "[204, 96]" in message


def test_stored_dtype_that_is_no_float(tmp_path):
    folder, _ = make_hf_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    message = open_error(folder)
    assert "model.norm.weight" in message
    assert "I8" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ("GemmaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")),
        ({"architectures": None}, ("LlamaForCausalLM",)),
        # GPT-2's own config has n_embd where ours has hidden_size.
        ({"architectures": ["GPT2LMHeadModel"], "hidden_size": None}, ("GPT2LMHeadModel", "LlamaForCausalLM")),
        ({"quantization_config": {"quant_method": "hqq"}}, ("quantization_config", "hqq", "compressed-tensors")),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"attention_bias": True}, ("attention_bias",)),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3")),
        ({"num_attention_heads": 0}, ("num_attention_heads",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic", "llama3")),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ("longrope",)),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ("low_freq_factor",)),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, ("factor", "'2'")),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ("factor", "0")),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("layer type",)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ("sliding_window", "0")),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["chunked"] * 3},
            ("layer_types", "sliding_attention"),
        ),
    ],
    ids=str,
)
def test_unsupported_huggingface_config(broken, changes, words):
    edit_config(broken, **changes)
    message = open_error(broken)
    assert str(broken / "config.json") in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "GPTForCausalLM"}, ("GPTForCausalLM", "MistralForCausalLM")),
        ({"architecture": "QWenForCausalLM", "qwen_type": "qwen2_moe"}, ("qwen2_moe",)),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, ("W4A16_AWQ",)),
        ({"quantization": {"quant_algo": "W4A8_QSERVE_PER_GROUP"}}, ("W4A8_QSERVE_PER_GROUP", "FP8")),
        ({"attn_bias": True}, ("attn_bias",)),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"residual_mlp": True}, ("residual_mlp",)),
        ({"moe": {"num_experts": 8}}, ("mixture of experts",)),
        ({"rotary_embedding_dim": 32}, ("rotary_embedding_dim", "32")),
        ({"rotary_scaling": {"type": "mrope"}}, ("mrope",)),
        ({"position_embedding_type": "learned_absolute"}, ("position_embedding_type",)),
        ({"mapping": {"world_size": 2, "tp_size": 1, "pp_size": 2}}, ("pipeline", "pp_size")),
        ({"mapping": {"world_size": 2, "tp_size": 2}}, ("rank1.safetensors",)),
        ({"mapping": {"world_size": 3, "tp_size": 3}}, ("tp_size 3",)),
        ({"num_hidden_layers": 4}, ("transformer.layers.3.", "rank0.safetensors")),
        ({"vocab_size": 7}, ("transformer.vocab_embedding.weight", "rank0.safetensors")),
        ({"dtype": "int8"}, ("dtype",)),
    ],
    ids=str,
)
def test_unsupported_tensorrt_llm_config(llama, tmp_path, changes, words):
    save_checkpoint(Checkpoint.open(llama), tmp_path / "ckpt")
    edit_config(tmp_path / "ckpt", **changes)
    message = open_error(tmp_path / "ckpt")
    for word in words:
        assert word in message


def test_engine_folder(broken):
    (broken / "config.json").write_text(json.dumps({"version": "1.2.1", "pretrained_config": {}, "build_config": {}}))
    assert "engine" in open_error(broken)


@pytest.mark.parametrize("value", [None, -1, 0, 1.5, "x", [], [None], {}, {"a": 1}, True, 1e4, float("nan")], ids=str)
@pytest.mark.parametrize("format_", ["huggingface", "tensorrt_llm"])
def test_any_value_of_any_key_is_taken_or_rejected_in_one_sentence(tmp_path, format_, value):
    folder, _ = make_hf_model(tmp_path, "qwen2", num_hidden_layers=1, use_sliding_window=True, max_window_layers=0)
    extra = ("rope_theta", "rope_scaling", "quantization_config", "partial_rotary_factor", "layer_types", "torch_dtype")
    if format_ == "tensorrt_llm":
        save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt")
        folder, extra = tmp_path / "ckpt", ("moe", "rotary_embedding_dim")
    original = json.loads((folder / "config.json").read_text())
    for key in (*original, *extra):
        (folder / "config.json").write_text(json.dumps(original | {key: value}))
        try:
            message = Checkpoint.open(folder).config.model_dump_json()
        except CheckpointError as e:
            message = str(e)
        assert "\n" not in message


def test_unknown_tensor(llama):
    with pytest.raises(CheckpointError, match=r"no tensor 'transformer\.wte\.weight'"):
        Checkpoint.open(llama).load("transformer.wte.weight")
